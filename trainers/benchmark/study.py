"""The design of a study: data sets, arms, held-out cases and cells, all fixed before training begins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nnssl.data.contents import Content
from nnssl.data.dataset_json import read_labelled_json
from nnssl.data.patients import find_patients
from nnssl.data.raw import RawDataset, find_dataset, read_dataset
from nnssl.errors import UserError
from nnssl.log import silence
from nnssl.methods import AUTO, find_method
from nnssl.networks.backbone import build_network, planned_configuration
from nnssl.paths import Folders
from nnssl.plan import read_plan
from nnssl.study.table import SCRATCH
from nnssl.weights.opened_checkpoint import open_checkpoint
from planners.finetune_planner import AdoptedPlan, fit_plan
from trainers.benchmark.arms import HYBRID, Arm, Pretraining, Source, configuration_for, locate, parse_arms
from trainers.benchmark.auto_arm import settle_all
from trainers.benchmark.leaks import Seen, seen_by_checkpoint, seen_in_pretraining
from trainers.benchmark.patients import choose_test, choose_validation, order_patients
from trainers.benchmark.selection import select_orders, weights_to_select_with
from trainers.benchmark.settings import StudySettings, check_settings
from trainers.benchmark.shared_plan import SharedPlan, plan_of_checkpoint
from trainers.finetuning.arm import Task
from trainers.finetuning.case_contents import find_contents, labelled_files
from trainers.finetuning.labelled_cases import Split, choose_unlabelled, find_labelled_cases
from trainers.finetuning.recipes import make_schedule, network_kind
from trainers.finetuning.schedule import FinetuneSchedule
from trainers.pretraining.candidates import configuration_to_probe
from trainers.pretraining.pretrain import find_plan


@dataclass(frozen=True)
class CellKey:
    """One cell of the matrix: which weights are fine-tuned, in which mode, on which labels, for how long and how fast."""

    arm: str
    mode: str
    labels: int
    seed: int
    epochs: int
    rate: float | None = None
    """Highest learning rate; None for the default."""


@dataclass(frozen=True)
class Study:
    """A study that is ready to run."""

    settings: StudySettings
    folders: Folders
    dataset: RawDataset
    dataset_json: dict[str, Any]
    labelled: tuple[str, ...]
    patients: dict[str, str]
    test: tuple[str, ...]
    validation: tuple[str, ...]
    """Cases that choose between learning rates; neither labelled, held out nor pretrained on. Empty if there is one rate."""
    orders: tuple[tuple[str, ...], ...]
    """Patients that may be labelled, for every seed in the order in which they are added."""
    arms: tuple[Arm, ...]
    pretrainings: dict[str, Pretraining]
    """Pretrainings by the name of their arm; arms that are checkpoints have none."""
    source: Source | None
    """Data and settings of pretraining; None if all arms are checkpoints."""
    plan: SharedPlan
    adopted: AdoptedPlan
    """The same plan for the labelled data set; its file is written when the study runs."""
    configuration: str
    cells: tuple[CellKey, ...]
    undecided: tuple[Arm, ...]
    """Arms whose method has to be chosen before the study can run, as the user named them."""
    device: torch.device
    processes: int

    def weights_path(self, arm: str) -> Path | None:
        """Return the checkpoint of an arm, which may not exist yet; None for scratch."""
        if arm == SCRATCH:
            return None
        chosen = next(each for each in self.arms if each.name == arm)
        return chosen.checkpoint or self.pretrainings[arm].final

    @cached_property
    def nnunet_configuration(self) -> dict[str, Any]:
        """nnU-Net's section of the configuration that is fine-tuned, with inherited values."""
        return planned_configuration(self.plan.nnunet, self.configuration)

    def build_network(self) -> Any:
        """Return the network that is fine-tuned, with two classes and random weights."""
        configuration = self.nnunet_configuration
        return build_network(configuration["architecture"], len(configuration["normalization_schemes"]), 2, seed=0)

    def schedule(self, cell: CellKey) -> FinetuneSchedule:
        """Return the schedule of a cell."""
        kind = network_kind(self.nnunet_configuration["architecture"]["network_class_name"])
        choices = self.settings.choices(cell.mode, cell.epochs, cell.rate)
        return make_schedule(cell.mode, choices, kind, pretrained=cell.arm != SCRATCH)

    def steps(self, cell: CellKey) -> int:
        """Return the number of optimizer steps of a cell."""
        return cell.epochs * self.settings.iterations_per_epoch

    def split(self, labels: int, seed: int) -> Split:
        """Return the cases that are trained on and those that are held out."""
        chosen = set(self.orders[seed][:labels])
        train = tuple(sorted(case for case in self.pool if self.patients[case] in chosen))
        return Split(train, self.test, f"{len(train)}cases", self.validation)

    def unlabelled(self, split: Split) -> tuple[str, ...]:
        """Return the cases that a mean teacher sees without labels besides the training cases."""
        return choose_unlabelled((*self.pool, *self.test), split, patients=self.patients)

    @property
    def used(self) -> tuple[str, ...]:
        """Cases that any cell needs, sorted."""
        tasks = [self.task(cell) for cell in self.cells if cell.arm == SCRATCH]
        return tuple(sorted({case for task in tasks for case in (*task.split.cases, *task.unlabelled)}))

    @cached_property
    def contents(self) -> dict[str, Content]:
        """Present state of the cases that any cell needs, by which cells are found whose cases have changed since."""
        known = labelled_files(self.dataset.name, self.folders)
        files = {case: known[case] for case in self.used}
        return find_contents(self.dataset.name, files, self.folders, self.processes)

    @property
    def pool(self) -> tuple[str, ...]:
        """Labelled cases of patients that are neither held out nor used for validation."""
        held_out = {self.patients[case] for case in (*self.test, *self.validation)}
        return tuple(case for case in self.labelled if self.patients[case] not in held_out)

    def task(self, cell: CellKey) -> Task:
        """Return the fine-tuning task of a cell."""
        split = self.split(cell.labels, cell.seed)
        return Task(
            dataset_name=self.dataset.name,
            dataset_json=self.dataset_json,
            plan=self.adopted,
            configuration=self.configuration,
            split=split,
            schedule=self.schedule(cell),
            seed=cell.seed,
            device=self.device,
            processes=self.processes,
            mode=cell.mode,
            unlabelled=self.unlabelled(split) if cell.mode == "mean_teacher" else (),
            mirroring=self.settings.mirroring,
        )


def prepare_study(settings: StudySettings, folders: Folders, device: torch.device, processes: int) -> Study:
    """Find everything that a study needs and check that it is fair; train, preprocess and write nothing.

    Args:
        settings: Settings of the study.
        folders: nnU-Net's folders.
        device: Device to train on.
        processes: Worker processes for preprocessing and evaluation.

    Raises:
        UserError: If a data set, plan or file does not exist, if the arms do not share one plan, if a held-out case was seen
            in pretraining or its patient is trained on, or if there are too few patients for the numbers of labels.
    """
    check_settings(settings)
    arms = parse_arms(settings.arms, folders)
    dataset_name = find_dataset(settings.dataset, folders)
    labelled = find_labelled_cases(dataset_name, folders)
    with silence():
        dataset = read_dataset(dataset_name, folders)
    patients = find_patients(labelled, settings.patients)
    plan = find_source_plan(settings, arms, folders)
    configuration = choose_finetuning(settings, arms, plan)
    source = None
    if plan.pretraining is not None and not pretrains_nothing(settings, arms):
        source = Source(plan.pretraining, configuration, settings.pretrain_overrides, folders, device)
    arms, undecided = settle_all(arms, source)
    pretrainings = {arm.name: locate(arm, source) for arm in arms if arm.method is not None and source is not None}
    for arm in arms:
        if arm.checkpoint is not None:
            check_plan(arm.checkpoint, plan, configuration)
    seen = find_seen(arms, pretrainings, plan, source, settings, folders)
    test = choose_test(settings, dataset, labelled, patients, seen)
    validation = choose_validation(settings, dataset, labelled, patients, test, seen)

    def select(pool: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        weights = weights_to_select_with(arms, pretrainings)
        return select_orders(settings, weights, plan.dataset_name, pool, patients, folders, device)

    orders = order_patients(settings, labelled, patients, (*test, *validation), select)
    cells = tuple(
        CellKey(arm, mode, labels, seed, epochs, rate)
        for seed in range(settings.seeds)
        for labels in sorted(settings.labels)
        for mode in settings.modes
        for epochs in sorted(settings.epochs)
        for rate in settings.rates(mode)
        for arm in (SCRATCH, *(arm.name for arm in arms))
    )
    study = Study(
        settings=settings,
        folders=folders,
        dataset=dataset,
        dataset_json=read_labelled_json(folders.raw / dataset_name / "dataset.json"),
        labelled=labelled,
        patients=patients,
        test=test,
        validation=validation,
        orders=orders,
        arms=arms,
        pretrainings=pretrainings,
        source=source,
        plan=plan,
        adopted=fit_plan(plan.nnunet, dataset_name, folders),
        configuration=configuration,
        cells=cells,
        undecided=undecided,
        device=device,
        processes=processes,
    )
    for cell in cells:
        study.schedule(cell)  # reports a wrong recipe, rate or warm-up before anything is trained
    return study


def pretrains_nothing(settings: StudySettings, arms: Sequence[Arm]) -> bool:
    """Return whether all arms are checkpoints and the user names no data set to pretrain on."""
    return settings.source is None and all(arm.checkpoint is not None for arm in arms)


def find_source_plan(settings: StudySettings, arms: Sequence[Arm], folders: Folders) -> SharedPlan:
    """Return the plan that all arms share: that of the data set to pretrain on, or else that of the first checkpoint.

    Raises:
        UserError: If there is no such plan.
    """
    if pretrains_nothing(settings, arms):
        checkpoint = arms[0].checkpoint
        assert checkpoint is not None
        return plan_of_checkpoint(checkpoint)
    plan = read_plan(find_plan(folders, settings.source, settings.plans_name))
    return SharedPlan(plan.nnunet, plan)


def choose_finetuning(settings: StudySettings, arms: Sequence[Arm], shared: SharedPlan) -> str:
    """Return the configuration to fine-tune, the same for all arms and for scratch.

    This is the configuration that all methods pretrain. If they differ, it is the plain one, because weights of a hybrid
    network also fit the plain U-Net.

    Raises:
        UserError: If the plan has no such configuration.
    """
    if settings.configuration is not None:
        shared.check_configuration(settings.configuration)
        return settings.configuration
    wanted = []
    for arm in arms:
        if arm.checkpoint is not None:
            wanted.append(open_checkpoint(arm.checkpoint).own_provenance.configuration)
            continue
        plan = shared.pretraining
        assert arm.method is not None
        assert plan is not None
        if arm.method == AUTO:
            wanted.append(configuration_to_probe(plan, None))
            continue
        usable = [name for name in find_method(arm.method).configurations if name in plan.pretext.configurations]
        wanted.append(usable[0] if usable else configuration_for(find_method(arm.method), plan, "3d_fullres"))
    if len(set(wanted)) == 1:
        return wanted[0]
    # A method that supports several networks is fine-tuned with the one that the other arms support, too.
    plain = min((name.removesuffix(HYBRID) for name in wanted), key=len)
    shared.check_configuration(plain)
    return plain


def check_plan(checkpoint: Path, plan: SharedPlan, configuration: str) -> None:
    """Check that the weights of a checkpoint were made with the plan of the study.

    Raises:
        UserError: If the configuration is different there, so that arms would differ in more than their weights.
    """
    theirs = open_checkpoint(checkpoint).own_provenance.plans["configurations"].get(configuration)
    if theirs != plan.nnunet["configurations"][configuration]:
        raise UserError(
            f"{checkpoint}: pretrained with another plan than {plan.name} of {plan.dataset_name} ({configuration} differs), "
            "so the comparison would not be fair; compare it in a separate study, or fit it to this plan by nnssl_export "
            f"{checkpoint} --for-plans {plan.dataset_name} -p {plan.name}"
        )


def find_seen(
    arms: Sequence[Arm],
    pretrainings: Mapping[str, Pretraining],
    plan: SharedPlan,
    source: Source | None,
    settings: StudySettings,
    folders: Folders,
) -> list[Seen]:
    """Return the cases that the weights of the arms have seen, or will have seen once they are pretrained."""
    seen = [] if source is None else [seen_in_pretraining(plan.dataset_name, folders, settings.patients)]
    finished = [pretraining.final for pretraining in pretrainings.values() if pretraining.finished]
    for path in (*finished, *(arm.checkpoint for arm in arms if arm.checkpoint is not None)):
        seen += seen_by_checkpoint(path, folders, settings.patients)
    return seen
