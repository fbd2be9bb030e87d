"""Choice of the held-out patients of a study, and of the order in which the others are labelled; no patient is in both."""

from collections.abc import Callable, Mapping, Sequence

from nnssl.data.raw import RawDataset
from nnssl.errors import ArgumentError, UserError
from nnssl.files import read_names, some
from nnssl.log import logger
from trainers.benchmark.leaks import Seen, check_unseen, find_leaks
from trainers.benchmark.settings import StudySettings
from trainers.finetuning.held_out import digest_cases
from trainers.finetuning.labelled_cases import label_order, read_case_names

DEFAULT_SHARE = 0.25
"""Share of the labelled patients that are held out by default."""


def choose_test(
    settings: StudySettings,
    dataset: RawDataset,
    labelled: tuple[str, ...],
    patients: Mapping[str, str],
    seen: Sequence[Seen],
) -> tuple[str, ...]:
    """Return the cases to hold out: those that the user lists, or the cases of drawn patients.

    Raises:
        UserError: If a listed case was seen in pretraining, or if too few patients were not.
    """
    if settings.test_cases is None:
        return draw_test_cases(dataset, patients, settings.test_patients, seen)
    test = read_case_names(settings.test_cases, labelled)
    check_unseen(find_leaks(digest_cases(dataset, test), patients, seen), str(settings.test_cases))
    logger.info(f"{len(test)} cases are held out; pretraining has not seen them (checked by voxels and by patient)")
    return test


def draw_test_cases(
    dataset: RawDataset, patients: Mapping[str, str], wanted: int | None, seen: Sequence[Seen]
) -> tuple[str, ...]:
    """Draw patients to hold out among those that pretraining has not seen; the draw is always the same.

    Args:
        dataset: The labelled data set.
        patients: Patients of its labelled cases, by case.
        wanted: Number of patients; None for a quarter of all patients, but at least one.
        seen: Cases that the pretrainings have seen.

    Returns:
        All cases of the drawn patients.

    Raises:
        UserError: If too few patients were not seen.
    """
    number = wanted or max(1, round(DEFAULT_SHARE * len(set(patients.values()))))
    cases, found = _draw_unseen(dataset, patients, number, seen)
    if found < number:
        raise ArgumentError(
            f"{dataset.name}: {number} patients must be held out, but only {found} of {len(set(patients.values()))} were not "
            "seen in pretraining; list the cases to hold out in a file, run nnssl_plan_and_preprocess with --exclude FILE, "
            "pretrain again and pass the file as test_cases",
            "test_cases",
        )
    logger.info(f"{len(cases)} cases of {found} patients are held out; pretraining has not seen them")
    return cases


def choose_validation(
    settings: StudySettings,
    dataset: RawDataset,
    labelled: tuple[str, ...],
    patients: Mapping[str, str],
    test: Sequence[str],
    seen: Sequence[Seen],
) -> tuple[str, ...]:
    """Return the cases that choose between learning rates: listed by the user, or drawn; none if there is nothing to choose.

    Raises:
        UserError: If a listed case was seen in pretraining or its patient is held out, or if too few patients are left.
    """
    if not settings.has_validation:
        return ()
    held_out = {patients[case] for case in test}
    if settings.validation_cases is not None:
        cases = read_case_names(settings.validation_cases, labelled)
        both = [case for case in cases if patients[case] in held_out]
        if both:
            raise ArgumentError(
                f"{settings.validation_cases}: validation_cases must be of other patients than the held-out cases, got "
                f"{some(both)}; list other cases",
                "validation_cases",
            )
        check_unseen(find_leaks(digest_cases(dataset, cases), patients, seen), str(settings.validation_cases))
    else:
        listed = _listed_patients(settings, patients)
        others = {case: patient for case, patient in patients.items() if patient not in held_out | listed}
        number = settings.validation_patients or 1
        cases, found = _draw_unseen(dataset, others, number, seen)
        if found < number:
            raise ArgumentError(
                f"{dataset.name}: validation_patients must be at most {found}, the number of patients that are neither held out "
                f"nor seen in pretraining, got {number}; leave more patients out of pretraining (nnssl_plan_and_preprocess "
                "--exclude FILE)",
                "validation_patients",
            )
    logger.info(f"{len(cases)} cases choose the learning rate; they are neither labelled, held out nor pretrained on")
    return cases


def _listed_patients(settings: StudySettings, patients: Mapping[str, str]) -> set[str]:
    """Return the patients whose order of labelling the user lists; none without lists."""
    if settings.subsets is None:
        return set()
    names = [name for seed in range(settings.seeds) for name in read_names(settings.subsets / f"seed{seed}.txt")]
    return {patients[name] for name in names if name in patients}


def _draw_unseen(
    dataset: RawDataset, patients: Mapping[str, str], number: int, seen: Sequence[Seen]
) -> tuple[tuple[str, ...], int]:
    """Draw up to a number of patients that pretraining has not seen; return their cases and the number that was found."""
    cases_of: dict[str, list[str]] = {}
    for case, patient in patients.items():
        cases_of.setdefault(patient, []).append(case)
    chosen: list[str] = []
    for patient in label_order(sorted(cases_of), seed=0):
        if len(chosen) < number and not find_leaks(digest_cases(dataset, cases_of[patient]), patients, seen):
            chosen.append(patient)
    return tuple(sorted(case for patient in chosen for case in cases_of[patient])), len(chosen)


def order_patients(
    settings: StudySettings,
    labelled: Sequence[str],
    patients: Mapping[str, str],
    test: Sequence[str],
    select: Callable[[Sequence[str]], tuple[tuple[str, ...], ...]],
) -> tuple[tuple[str, ...], ...]:
    """Return the patients that may be labelled for every seed, in the order in which they are added.

    Cases of a held-out patient that are not held out themselves are not trained on either. ``test`` holds the cases of
    validation patients, too. ``select`` returns the orders by features among the patients that it receives.

    Raises:
        UserError: If there are too few patients for the numbers of labels, or if a list contains a held-out patient.
    """
    held_out = {patients[case] for case in test}
    pool = sorted({patients[case] for case in labelled} - held_out)
    if max(settings.labels) > len(pool):
        raise ArgumentError(
            f"labels must be at most {len(pool)}, the number of labelled patients that are neither held out nor used for "
            f"validation, got {max(settings.labels)}; hold out fewer patients to use more",
            "labels",
        )
    if settings.choose == "select":
        return select(pool)
    if settings.subsets is None:
        return tuple(tuple(label_order(pool, seed)) for seed in range(settings.seeds))
    orders = []
    for seed in range(settings.seeds):
        path = settings.subsets / f"seed{seed}.txt"
        names = read_names(path)
        unknown = [name for name in names if name not in patients]
        if unknown:
            raise UserError(f"{path}: {some(unknown)} not among the {len(labelled)} labelled cases; correct the list")
        check_disjoint(names, test, patients)
        order = tuple(dict.fromkeys(patients[name] for name in names))
        if max(settings.labels) > len(order):
            raise ArgumentError(
                f"{path}: lists {len(order)} patients, but labels needs {max(settings.labels)}; add patients", "labels"
            )
        orders.append(order)
    return tuple(orders)


def check_disjoint(train: Sequence[str], test: Sequence[str], patients: Mapping[str, str]) -> None:
    """Check that no patient is on both sides of a split.

    Raises:
        ArgumentError: If one is; the message names the patient and a case of each side.
    """
    held_out = {patients[case]: case for case in test}
    both = sorted({patients[case]: case for case in train}.items() & held_out.items()) or [
        (patients[case], case) for case in sorted(train) if patients[case] in held_out
    ]
    if both:
        patient, case = both[0]
        raise ArgumentError(
            f"patient {patient} is on both sides of the split: {case} is trained on and {held_out[patient]} is held out; move "
            "all cases of the patient to one side, or pass a table with the patient of each case as patients if these are "
            "different people",
            "patients",
        )
