"""Carries the labels of a few annotated cases to all others by the features of frozen weights, without training."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from matplotlib.figure import Figure

from nnssl.data.case_store import CaseStore
from nnssl.data.changed_cases import contents_of, preprocess_changed_cases
from nnssl.data.dicom_series import SERIES_ENDING
from nnssl.data.image_files import files_of_segmentation, write_segmentation
from nnssl.data.jobs import default_processes, follow_jobs
from nnssl.data.raw import RawCase, RawDataset, find_dataset, read_dataset
from nnssl.devices import find_device
from nnssl.errors import ArgumentError, UserError
from nnssl.evaluation.labels import DATASET_JSON
from nnssl.files import read_names, some, write_atomically, write_json
from nnssl.locks import only_process
from nnssl.log import logger
from nnssl.networks.backbone import planned_configuration
from nnssl.networks.dense import DenseKind
from nnssl.paths import Folders, make_writable, resolve_folders
from nnssl.pictures.dense_network import DenseNetwork
from nnssl.pictures.figures import write_picture
from nnssl.plan import existing_plan, read_plan
from nnssl.propagation.carry import AnnotatedCase, fit_to_cases, probabilities_of
from nnssl.propagation.confidence import expected_dice
from nnssl.propagation.draft_contents import DraftContents
from nnssl.propagation.grids import (
    LabelResampling,
    check_preprocessed,
    read_grid,
    read_labels,
    resampling_of,
    to_case,
    to_image,
)
from nnssl.propagation.network import frozen_network
from nnssl.propagation.picture import drafts_figure
from nnssl.propagation.prototypes import LabelPrototypes
from nnssl.propagation.record import RECORD, SCHEMA_VERSION, TABLE, Draft, PropagationRecord, open_record, write_drafts
from nnssl.propagation.references import References, read_references
from nnssl.study.segmentation_pictures import SegmentedCase
from nnssl.tables import align
from nnssl.weights.opened_checkpoint import OpenedCheckpoint, open_checkpoint
from nnssl.weights.preprocessed_cases import open_cases

PICTURE = "propagate.png"
SHOWN_REFERENCES, SHOWN_DRAFTS = 3, 6
LISTED = 5
"""Number of the least certain drafts that are printed."""


@dataclass(frozen=True)
class PropagateSettings:
    """Settings of ``propagate``.

    Attributes:
        labels: Folder of the annotated cases' label maps; None for ``labelsTr`` of the data set.
        cases: File that lists the cases to label, one name per line; None for all that are not annotated.
        features: Maps of the decoder, ``single`` or ``pyramid``; None for those that were pretrained.
        prototypes: Number of prototypes of each label; the background has four times as many.
        position_weight: Weight of the relative position in the body's box; 0 for features alone.
        smoothing_mm: Standard deviation of the Gaussian that smooths the probabilities, in mm; 0 for none, None for the finest
            spacing of the plan.
        seed: Random seed of drawn voxels and prototypes.
        device: Device to compute on; None for a GPU if one is available, else the CPU.
        restart: Whether to delete earlier drafts in the folder.
    """

    labels: Path | None = None
    cases: Path | None = None
    features: DenseKind | None = None
    prototypes: int = 16
    position_weight: float = 0.1
    smoothing_mm: float | None = None
    seed: int = 0
    device: torch.device | str | None = None
    restart: bool = False


def propagate(
    dataset: str | int | None,
    cases_from: Sequence[str],
    weights: Path | str,
    output: Path | str,
    settings: PropagateSettings | None = None,
    folders: Folders | None = None,
) -> list[Draft]:
    """Label all cases of a data set after the example of a few annotated ones, and write the drafts in nnU-Net's format.

    Nothing is trained. Voxels get the label with the nearest prototype, by features of frozen weights and the relative
    position in the body's box. Finished drafts of the same weights, annotated cases and settings are kept.

    Args:
        dataset: Number or name of a preprocessed data set; None for the one that the weights were pretrained on.
        cases_from: Names of the annotated cases.
        weights: Checkpoint of pretraining.
        output: Folder for the drafts.
        settings: How to carry labels over; None for the defaults.
        folders: nnU-Net's folders; None for those of the environment.

    Returns:
        The drafts, the least certain first.

    Raises:
        UserError: If the checkpoint, the data set, an annotated case or a setting is unsuitable, the folder holds other
            segmentations, or a file cannot be written.

    Examples:
        >>> settings = nnssl.PlanSettings(preset="cpu", configurations=["3d_fullres"], processes=1)
        >>> prepared = nnssl.plan_and_preprocess(4, settings)
        >>> drafts = nnssl.propagate(4, ["phantom_0006"], weights, "drafts", nnssl.PropagateSettings(prototypes=2))
        >>> len(drafts)
        7
    """
    settings, folders = settings or PropagateSettings(), folders or resolve_folders()
    _check(settings, cases_from)
    checkpoint = open_checkpoint(Path(weights))
    job = _prepare(checkpoint, dataset, tuple(cases_from), settings, folders)
    folder = make_writable(Path(output).expanduser())
    with only_process(folder, "labelling", wait=not settings.restart):
        return _propagate(job, checkpoint, folder, cases_from, settings)


def _propagate(
    job: "_Job", checkpoint: OpenedCheckpoint, folder: Path, cases_from: Sequence[str], settings: PropagateSettings
) -> list[Draft]:
    finished = open_record(folder, _record_of(job, checkpoint, settings), job.raw.file_ending, settings.restart)
    now = contents_of(job.store.folder, job.store.names)
    contents = DraftContents(folder, job.raw.file_ending, now, settings.restart)
    contents.check_references(cases_from)
    finished = contents.current(finished)
    contents.write()
    targets = [name for name in job.targets if name not in finished]
    logger.info(
        f"Weights: {checkpoint.path} ({checkpoint.label}); labels of {some(list(cases_from))}; {len(targets)} cases to label, "
        f"{len(job.targets) - len(targets)} already done"
    )
    drafts = {name: draft for name, draft in finished.items() if name in job.targets}
    if targets:
        prototypes = fit_to_cases(job.network, job.annotated(), job.references.values, settings.prototypes,
                                  settings.position_weight, settings.seed)  # fmt: skip
        for draft in follow_jobs(_label(job, prototypes, targets, folder), "labelling", "labelled", len(targets)):
            drafts[draft.case] = draft
            contents.add(draft.case)
            write_drafts(folder, {**finished, **drafts})
    _finish(job, folder, {**finished, **drafts})
    return sorted(drafts.values(), key=lambda draft: (draft.confidence, draft.case))


@dataclass(frozen=True)
class _Job:
    """The inputs of a run, opened and checked."""

    network: DenseNetwork
    raw: RawDataset
    store: CaseStore
    resampling: LabelResampling
    references: References
    targets: tuple[str, ...]
    smoothing_mm: float
    raw_cases: dict[str, RawCase] = field(repr=False)

    def annotated(self) -> list[AnnotatedCase]:
        """Return the annotated cases with their label maps."""
        return [AnnotatedCase(self.store.case(each.name), each.labels) for each in self.references.cases]


def _check(settings: PropagateSettings, cases_from: Sequence[str]) -> None:
    """Check the settings that need no file.

    Raises:
        ArgumentError: If one is out of range.
    """
    if settings.prototypes < 1:
        raise ArgumentError(f"prototypes must be at least 1, got {settings.prototypes}", "prototypes")
    for name in ("position_weight", "smoothing_mm"):
        value = getattr(settings, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ArgumentError(f"{name} must be at least 0 and finite, got {value:g}", name)
    if settings.features not in (None, *get_args(DenseKind)):
        raise ArgumentError(f"features must be {' or '.join(get_args(DenseKind))}, got {settings.features}", "features")
    if not cases_from or len(set(cases_from)) != len(cases_from):
        raise ArgumentError(
            f"cases_from must be different names of annotated cases, got {' '.join(cases_from) or 'none'}", "cases_from"
        )


def _prepare(
    checkpoint: OpenedCheckpoint,
    dataset: str | int | None,
    cases_from: tuple[str, ...],
    settings: PropagateSettings,
    folders: Folders,
) -> _Job:
    """Open everything that a run needs.

    Raises:
        UserError: If something does not fit.
    """
    provenance = checkpoint.own_provenance
    name = provenance.dataset_name if dataset is None else find_dataset(dataset, folders)
    raw = read_dataset(name, folders)
    if raw.file_ending == SERIES_ENDING:
        raise UserError(f"{name}: nnU-Net has no label format for DICOM series; import the images as volumes")
    channels = len(planned_configuration(provenance.plans, provenance.configuration)["normalization_schemes"])
    if len(raw.channel_names) != channels:
        raise UserError(
            f"{name}: has {len(raw.channel_names)} channel(s), but the weights {checkpoint.path} are for {channels}; use weights "
            "that were pretrained on the same channels"
        )
    network = frozen_network(checkpoint, settings.features, find_device(settings.device))
    store = open_cases(provenance, name, folders)
    plan = read_plan(existing_plan(folders, name, provenance.plans_name))
    if preprocess_changed_cases(plan, [provenance.configuration], folders, default_processes()):
        store = CaseStore(store.folder)
    resampling = resampling_of(plan, provenance.configuration)
    references = read_references(cases_from, raw, store, resampling, settings.labels)
    raw_cases = {case.name: case for case in raw.cases}
    missing = sorted(set(raw_cases) - set(store.names))
    if missing:
        logger.info(f"Warning: {some(missing)} not preprocessed, so not labelled; run nnssl_plan_and_preprocess again")
    known = [case for case in raw_cases if case in store.names]
    wanted = known if settings.cases is None else read_names(settings.cases)
    unknown = [case for case in wanted if case not in known]
    if unknown:
        raise UserError(f"{settings.cases}: {name} has no preprocessed case {some(unknown)}; it has {some(known)}")
    targets = tuple(sorted(set(wanted) - set(cases_from)))
    smoothing_mm = settings.smoothing_mm
    if smoothing_mm is None:
        smoothing_mm = min(plan.configuration(provenance.configuration).spacing_mm)
    return _Job(network, raw, store, resampling, references, targets, float(smoothing_mm), raw_cases)


def _record_of(job: _Job, checkpoint: OpenedCheckpoint, settings: PropagateSettings) -> PropagationRecord:
    return PropagationRecord(
        schema_version=SCHEMA_VERSION,
        dataset_name=job.raw.name,
        weights=str(checkpoint.path),
        weights_digest=checkpoint.digest,
        references={each.name: each.digest for each in job.references.cases},
        label_values=job.references.values,
        features="encoder" if job.network.encoder_stages else job.network.kind,
        prototypes=settings.prototypes,
        position_weight=float(settings.position_weight),
        smoothing_mm=job.smoothing_mm,
        seed=settings.seed,
    )


def _label(job: _Job, prototypes: LabelPrototypes, targets: Sequence[str], folder: Path) -> Iterator[Draft]:
    """Label cases, write their segmentations, and yield the drafts."""
    values = np.array(job.references.values)
    for name in targets:
        case = job.store.case(name)
        grid = read_grid(job.raw_cases[name], job.raw.reader, job.resampling)
        check_preprocessed(grid, case, job.resampling)
        probabilities = probabilities_of(job.network, case, prototypes, job.smoothing_mm)
        expected = expected_dice(probabilities, probabilities.argmax(axis=0))
        found = values[to_image(probabilities, grid, case, job.resampling)]
        dtype = np.uint8 if values.max() < 255 else np.uint16
        write_segmentation(
            folder / f"{name}{job.raw.file_ending}", found.astype(dtype), grid.properties, job.raw.reader
        )
        missing = [job.references.name_of(value) for value in job.references.values[1:] if not (found == value).any()]
        yield Draft(name, round(float(expected.mean()), 4), tuple(missing))


def _finish(job: _Job, folder: Path, drafts: dict[str, Draft]) -> None:
    """Complete the folder with the annotated cases, ``dataset.json`` and the picture, and print the least certain drafts."""
    for each in job.references.cases:
        copy_segmentation(each.file, folder)
    content = {key: value for key, value in job.references.dataset_json.items() if key != "dataset"}
    write_json(folder / DATASET_JSON, {**content, "numTraining": len(drafts) + len(job.references.cases)})
    write_drafts(folder, drafts)
    ordered = sorted(drafts.values(), key=lambda draft: (draft.confidence, draft.case))
    write_picture(folder / PICTURE, _picture(job, folder, ordered))
    rows = [(each.case, f"{each.confidence:.2f}", "; ".join(each.missing)) for each in ordered[:LISTED]]
    for line in align([("least certain", "confidence", "missing labels"), *rows], left=(0, 2)):
        logger.info(line)
    logger.info(
        f"{len(drafts)} drafts: {folder}; confidence: {folder / TABLE}; pictures: {folder / PICTURE}; settings: {folder / RECORD}"
    )


def copy_segmentation(segmentation: Path, folder: Path) -> None:
    """Copy a label map to a folder, unless it lies there, with the spacing that belongs to a TIFF."""
    for path in files_of_segmentation(segmentation):
        copy = folder / path.name
        if copy.absolute() != path.absolute():
            with open(path, "rb") as source:
                write_atomically(copy, lambda file, source=source: shutil.copyfileobj(source, file))  # type: ignore[misc]


def _picture(job: _Job, folder: Path, ordered: Sequence[Draft]) -> Figure:
    """Return pictures of some annotated cases, and of drafts from the least to the most certain."""
    places = sorted(set(np.linspace(0, len(ordered) - 1, SHOWN_DRAFTS).round().astype(int).tolist())) if ordered else []
    shown = []
    for each in job.references.cases[:SHOWN_REFERENCES]:
        shown.append(_pictured(job, each.name, each.labels, "annotated"))
    for draft in (ordered[place] for place in places):
        grid = read_grid(job.raw_cases[draft.case], job.raw.reader, job.resampling)
        found = read_labels(folder / f"{draft.case}{job.raw.file_ending}", job.raw.reader, grid)
        labels = to_case(found, grid, job.store.case(draft.case), job.resampling)
        shown.append(_pictured(job, draft.case, labels, f"draft, confidence {draft.confidence:.2f}"))
    names = {job.references.name_of(value): value for value in job.references.values[1:]}
    return drafts_figure(shown, names, f"Labels carried over from {some([each.name for each in job.references.cases])}")


def _pictured(job: _Job, name: str, labels: np.ndarray, note: str) -> SegmentedCase:
    case = job.store.case(name)
    volume = case.read_box((0, 0, 0), case.shape)[0]
    return SegmentedCase(name, volume, case.spacing_mm, labels, {}, {"": note})
