"""Which patients of a study are held out, and in which order the others are labelled. A patient is on one side only."""

from collections.abc import Mapping, Sequence

from nnssl.data.raw import RawDataset
from nnssl.errors import UserError
from nnssl.files import read_names, some
from nnssl.log import logger
from trainers.benchmark.leaks import Seen, check_unseen, digest_cases, find_leaks
from trainers.benchmark.settings import StudySettings
from trainers.finetuning.labelled_cases import label_order, read_case_names

DEFAULT_SHARE = 0.25
"""Of the labelled patients that are held out when the user names none."""


def choose_test(
    settings: StudySettings,
    dataset: RawDataset,
    labelled: tuple[str, ...],
    patients: Mapping[str, str],
    seen: Sequence[Seen],
) -> tuple[str, ...]:
    """Return the cases to hold out: those that the user names, or drawn ones.

    Raises:
        UserError: a case was seen in pretraining, or too few were not.
    """
    if settings.test_cases is None:
        return draw_test_cases(dataset, patients, settings.test_patients, seen)
    test = read_case_names(settings.test_cases, labelled)
    check_unseen(find_leaks(digest_cases(dataset, test), patients, seen), str(settings.test_cases))
    logger.info(f"{len(test)} cases are held out; no pretraining has seen them (checked by voxels and by patient)")
    return test


def draw_test_cases(
    dataset: RawDataset, patients: Mapping[str, str], wanted: int | None, seen: Sequence[Seen]
) -> tuple[str, ...]:
    """Draw patients to hold out among those that pretraining has not seen; always the same ones.

    Args:
        dataset: the labelled data set.
        patients: of its labelled cases.
        wanted: number of patients; None for a quarter of all, one at least.
        seen: what the pretrainings have seen.

    Returns:
        All cases of the patients.

    Raises:
        UserError: too few patients were not seen.
    """
    number = wanted or max(1, round(DEFAULT_SHARE * len(set(patients.values()))))
    cases_of: dict[str, list[str]] = {}
    for case, patient in patients.items():
        cases_of.setdefault(patient, []).append(case)
    chosen: list[str] = []
    for patient in label_order(sorted(cases_of), seed=0):
        if len(chosen) < number and not find_leaks(digest_cases(dataset, cases_of[patient]), patients, seen):
            chosen.append(patient)
    if len(chosen) < number:
        raise UserError(
            f"{dataset.name}: {number} patients were to be held out, and only {len(chosen)} of {len(cases_of)} were not seen "
            "in pretraining; write the cases to hold out to a file, plan with nnssl_plan_and_preprocess --exclude FILE, "
            "pretrain again and give --test-cases FILE"
        )
    cases = tuple(sorted(case for patient in chosen for case in cases_of[patient]))
    logger.info(f"{len(cases)} cases of {len(chosen)} patients are held out, which no pretraining has seen")
    return cases


def order_patients(
    settings: StudySettings, labelled: Sequence[str], patients: Mapping[str, str], test: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Return for every seed the patients that may be labelled, in the order in which they are added.

    Other cases of a held-out patient are neither trained on nor held out.

    Raises:
        UserError: there are fewer patients than labels are wanted, or a list names a held-out patient.
    """
    held_out = {patients[case] for case in test}
    pool = sorted({patients[case] for case in labelled} - held_out)
    if max(settings.labels) > len(pool):
        raise UserError(
            f"--labels {max(settings.labels)}: {len(pool)} labelled patients are not held out; take {len(pool)} at most, or "
            "hold out fewer"
        )
    if settings.subsets is None:
        return tuple(tuple(label_order(pool, seed)) for seed in range(settings.seeds))
    orders = []
    for seed in range(settings.seeds):
        path = settings.subsets / f"seed{seed}.txt"
        names = read_names(path)
        unknown = [name for name in names if name not in patients]
        if unknown:
            raise UserError(f"{path}: {some(unknown)} not among the {len(labelled)} labelled cases; mend the list")
        check_disjoint(names, test, patients)
        order = tuple(dict.fromkeys(patients[name] for name in names))
        if max(settings.labels) > len(order):
            raise UserError(
                f"{path}: names {len(order)} patients, fewer than --labels {max(settings.labels)}; add some"
            )
        orders.append(order)
    return tuple(orders)


def check_disjoint(train: Sequence[str], test: Sequence[str], patients: Mapping[str, str]) -> None:
    """Check that no patient is on both sides of a split.

    Raises:
        UserError: one is; names it and a case of each side.
    """
    held_out = {patients[case]: case for case in test}
    both = sorted({patients[case]: case for case in train}.items() & held_out.items()) or [
        (patients[case], case) for case in sorted(train) if patients[case] in held_out
    ]
    if both:
        patient, case = both[0]
        raise UserError(
            f"patient {patient} is on both sides of the split: {case} is trained on and {held_out[patient]} is held out; "
            "a patient belongs on one side (--patients FILE says which case is of which patient)"
        )
