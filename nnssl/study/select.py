"""Which cases to annotate first: typical and different patients, by features of frozen weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from nnssl.data.case_store import CaseStore
from nnssl.data.jobs import follow_jobs
from nnssl.data.patients import patient_in_name, read_patients
from nnssl.data.raw import find_dataset
from nnssl.devices import find_device
from nnssl.errors import ArgumentError, UserError
from nnssl.evaluation.case_features import case_features, reading_of
from nnssl.evaluation.typical_cases import choose_typical, find_duplicates
from nnssl.files import some, write_atomically, write_csv
from nnssl.log import logger
from nnssl.paths import Folders, make_writable, resolve_folders
from nnssl.pictures.figures import write_picture
from nnssl.study.words import count as count_of
from nnssl.tables import align
from nnssl.weights.opened_checkpoint import OpenedCheckpoint, open_checkpoint
from nnssl.weights.preprocessed_cases import open_cases

LIST, TABLE, PICTURE = "selection.txt", "selection.csv", "selection.png"
COLUMNS = ("rank", "patient", "cases", "group", "typicality", "reason")


@dataclass(frozen=True)
class SelectSettings:
    """Settings of ``select``.

    Attributes:
        patches: Number of patches from which the features of a case are averaged.
        patients: Table of cases and patients; None to derive the patients from the names of the cases.
        seed: Random seed of patches and clusters.
        device: Device to compute on; None for a GPU if one is available, else the CPU.
        output: Folder for the files; None for the current folder.
    """

    patches: int = 16
    patients: Path | None = None
    seed: int = 0
    device: torch.device | str | None = None
    output: Path | None = None


@dataclass(frozen=True)
class SelectedPatient:
    """A patient to annotate.

    Attributes:
        patient: Name of the patient.
        cases: All cases of the patient in the data set.
        group: Number of patients that this one stands for, itself included.
        typicality: Density of the group around this patient, relative to the group's median.
    """

    patient: str
    cases: tuple[str, ...]
    group: int
    typicality: float

    @property
    def reason(self) -> str:
        """Reason for the choice, in words."""
        if self.group == 1:
            return "unlike all other patients"
        return f"the most typical of {self.group} similar patients" if self.group > 2 else "one of two similar patients"


def select(
    dataset: str | int | None,
    number: int,
    weights: Path | str,
    settings: SelectSettings | None = None,
    folders: Folders | None = None,
) -> list[SelectedPatient]:
    """Choose the patients to annotate first, and write their cases in this order with reasons and pictures.

    The features of a patient are those of frozen weights, averaged over patches of all cases. Patients are divided into as many
    groups as are wanted, and the most typical of each group is chosen; the largest groups come first. Of patients whose scans
    nearly coincide, only the first counts.

    Args:
        dataset: Number or name of a preprocessed data set; None for the one that the weights were pretrained on.
        number: Number of patients to choose.
        weights: Checkpoint of pretraining.
        settings: How to choose; None for the defaults.
        folders: nnU-Net's folders; None for those of the environment.

    Returns:
        The chosen patients.

    Raises:
        UserError: If the checkpoint, the data set or a setting is unsuitable, or a file cannot be written.

    Examples:
        >>> chosen = nnssl.select(None, 2, weights, nnssl.SelectSettings(patches=2))
        >>> len(chosen), sum(each.group for each in chosen) <= 6
        (2, True)
    """
    settings, folders = settings or SelectSettings(), folders or resolve_folders()
    for name, value in (("number", number), ("patches", settings.patches)):
        if value < 1:
            raise ArgumentError(f"{name} must be at least 1, got {value}", name)
    checkpoint = open_checkpoint(Path(weights))
    provenance = checkpoint.own_provenance
    name = provenance.dataset_name if dataset is None else find_dataset(dataset, folders)
    store = open_cases(provenance, name, folders)
    output = make_writable(settings.output or Path.cwd())
    cases_of = _patients_of(store.names, settings.patients)
    if number > len(cases_of):
        raise ArgumentError(
            f"number must be at most {len(cases_of)}, as {name} has so many patients, got {number}", "number"
        )
    logger.info(f"Weights: {checkpoint.path} ({checkpoint.label}); {len(cases_of)} patients of {name}")
    chosen = choose_patients(checkpoint, store, cases_of, number, settings)
    _write(output, store, chosen)
    return chosen


def choose_patients(
    checkpoint: OpenedCheckpoint,
    store: CaseStore,
    cases_of: Mapping[str, tuple[str, ...]],
    number: int,
    settings: SelectSettings,
) -> list[SelectedPatient]:
    """Return the patients to annotate first.

    Args:
        checkpoint: The weights whose features are compared.
        store: Preprocessed cases.
        cases_of: Cases of every patient that may be chosen.
        number: Number of patients to choose.
        settings: Patches, seed and device.

    Raises:
        ArgumentError: If fewer patients differ.
    """
    features = _read_features(checkpoint, store, cases_of, settings)
    names = list(cases_of)
    copies = find_duplicates(features)
    if copies:
        pairs = [f"{names[item]} (as {names[first]})" for item, first in copies.items()]
        logger.info(
            f"{count_of(len(copies), 'patient')} nearly coincide with another one and count once: {some(pairs)}"
        )
    different = len(names) - len(copies)
    if number > different:
        raise ArgumentError(f"number must be at most {different}, as so many patients differ, got {number}", "number")
    choices = choose_typical(features, number, settings.seed)
    return [
        SelectedPatient(names[each.item], cases_of[names[each.item]], len(each.group), each.typicality)
        for each in choices
    ]


def _patients_of(cases: Sequence[str], table: Path | None) -> dict[str, tuple[str, ...]]:
    """Return the cases of every patient.

    Raises:
        UserError: If the table lacks a case.
    """
    patients = {case: patient_in_name(case) for case in cases} if table is None else read_patients(table)
    missing = [case for case in cases if case not in patients]
    if missing:
        raise UserError(f"{table}: has no patient of {some(missing)}; add a line for every case")
    found: dict[str, list[str]] = {}
    for case in cases:
        found.setdefault(patients[case], []).append(case)
    return {patient: tuple(own) for patient, own in sorted(found.items())}


def _read_features(
    checkpoint: OpenedCheckpoint, store: CaseStore, cases_of: Mapping[str, tuple[str, ...]], settings: SelectSettings
) -> np.ndarray:
    """Return features (patient, feature): the mean over the cases of a patient."""
    device = find_device(settings.device)
    network = checkpoint.build_network(settings.seed)
    checkpoint.load_into(network)
    network = network.eval().requires_grad_(False).to(device)
    reading = reading_of(checkpoint, network, settings.patches, settings.seed)
    cases = [case for own in cases_of.values() for case in own]
    found = ((case, case_features([network], store.case(case), reading, device)[0]) for case in cases)
    by_case = dict(follow_jobs(found, "reading", "read", len(cases)))
    return np.stack([np.mean([by_case[case] for case in own], axis=0) for own in cases_of.values()])


def _write(output: Path, store: CaseStore, chosen: Sequence[SelectedPatient]) -> None:
    """Write list, table and picture, and print the table."""
    rows = [
        (str(rank), each.patient, " ".join(each.cases), str(each.group), f"{each.typicality:.2f}", each.reason)
        for rank, each in enumerate(chosen, start=1)
    ]
    listed = "".join(f"{case}\n" for each in chosen for case in each.cases)
    write_atomically(output / LIST, lambda file: file.write(listed.encode()))
    write_csv(output / TABLE, COLUMNS, rows)
    write_picture(output / PICTURE, _thumbnails(store, chosen))
    for line in align([COLUMNS, *rows], left=(1, 2, 5)):
        logger.info(line)
    logger.info(f"Cases in this order: {output / LIST}; reasons: {output / TABLE}; pictures: {output / PICTURE}")


def _thumbnails(store: CaseStore, chosen: Sequence[SelectedPatient]) -> Figure:
    """Return the middle slice of the first case of every chosen patient."""
    columns = min(5, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for rank, (panel, each) in enumerate(zip(panels, chosen, strict=False), start=1):
        case = store.case(each.cases[0])
        middle = (case.shape[0] // 2, 0, 0)
        image = case.read_box(middle, (1, *case.shape[1:]))[0, 0]
        low, high = np.percentile(image, (1, 99))
        aspect = case.spacing_mm[1] / case.spacing_mm[2]
        panel.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
        panel.set_title(f"{rank}. {each.patient}\n{each.reason}", fontsize=6)
    return figure
