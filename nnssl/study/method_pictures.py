"""What each method shows of itself in a report: pictures made from its weights and the data it was pretrained on."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from nnssl.data.patients import patient_in_name
from nnssl.paths import Folders
from nnssl.pictures.components import embed_case
from nnssl.pictures.dense_network import dense_network_of, open_cases
from nnssl.pictures.figures import (
    embedding_figure,
    matches_figure,
    reconstruction_figure,
    save_png,
    similarity_figure,
    uncertainty_figure,
)
from nnssl.pictures.matches import find_matches, matcher_of
from nnssl.pictures.reconstructions import reconstruct_case
from nnssl.pictures.similarity import compare_cases
from nnssl.pictures.teacher_uncertainty import measure_uncertainty, teacher_of
from nnssl.study.report import Picture
from nnssl.weights.opened_checkpoint import OpenedCheckpoint, open_checkpoint
from nnssl.weights.restored_method import method_of

Maker = Callable[[OpenedCheckpoint, Folders, torch.device], tuple[Picture, ...]]
MATCHES = 4
"""Places that are looked for."""
COMPARED_CASES = 3
"""The query's case and two of other patients."""


def picture_of(figure: Figure, alt: str, caption: str) -> Picture:
    """Return a figure as a picture of a report."""
    file = io.BytesIO()
    save_png(figure, file)
    return Picture(file.getvalue(), alt, caption)


def dense_pictures(pretrained: OpenedCheckpoint, folders: Folders, device: torch.device) -> tuple[Picture, ...]:
    """Return the similarity of a point to the voxels of other cases, and the first components of the features of a case.

    Args:
        pretrained: checkpoint of a method that pretrains features of voxels.
        folders: nnU-Net's folders, with the preprocessed cases of its data set.
        device: where to compute.

    Raises:
        UserError: as ``dense_network_of`` and ``open_cases``.
    """
    provenance = pretrained.own_provenance
    network = dense_network_of(pretrained, None, device)
    store = open_cases(provenance, provenance.dataset_name, folders)
    one_each = {patient_in_name(name): name for name in reversed(store.names)}
    query, *others = sorted(one_each.values())[:COMPARED_CASES]
    comparison = compare_cases(network, store, query, None, others, 0)
    similarity = picture_of(
        similarity_figure(comparison, f"{provenance.method}: what resembles one point"),
        f"Slices of {', '.join([query, *others])} with the cosine similarity of every voxel to one point of {query} over them; "
        + "; ".join(
            f"nearest in {each.case.name}: cosine {each.nearest_cosine:.2f}" for each in comparison.similarities
        ),
        f"Cosine similarity of all voxels to the marked point of {query}; the circle is the most similar voxel.",
    )
    embedding = embed_case(network, store.case(query), None, 0)
    colours = picture_of(
        embedding_figure(embedding, f"{provenance.method}: features as colours"),
        f"A slice of {query} beside the first three principal components of its features as red, green and blue",
        "Tissue of one colour has similar features.",
    )
    return similarity, colours


def uncertainty_pictures(pretrained: OpenedCheckpoint, folders: Folders, device: torch.device) -> tuple[Picture, ...]:
    """Return where Pixel-global's teacher is not sure of a case, and what dense features show.

    Raises:
        UserError: as ``teacher_of`` and ``open_cases``.
    """
    provenance = pretrained.own_provenance
    teacher = teacher_of(pretrained, None, device)
    store = open_cases(provenance, provenance.dataset_name, folders)
    case = store.case(store.names[0])
    picture = picture_of(
        uncertainty_figure(measure_uncertainty(teacher, case, None), f"{provenance.method}: how sure the teacher is"),
        f"A slice of {case.name} with the uncertainty of the teacher over it",
        f"Entropy of {teacher.passes} passes with dropout: bright where the teacher does not know what it sees.",
    )
    return picture, *dense_pictures(pretrained, folders, device)


def reconstruction_pictures(
    pretrained: OpenedCheckpoint, folders: Folders, device: torch.device
) -> tuple[Picture, ...]:
    """Return what PCRL's decoder makes of a patch, and what dense features show.

    Raises:
        UserError: as ``method_of`` and ``open_cases``.
    """
    method, provenance = method_of(pretrained, device), pretrained.own_provenance
    dense = dense_pictures(pretrained, folders, device)
    if not provenance.settings["reconstruction_weight"]:
        return dense
    store = open_cases(provenance, provenance.dataset_name, folders)
    name = store.names[0]
    made = reconstruct_case(method, store.case(name), None, 0, device)
    picture = picture_of(
        reconstruction_figure(made, method.configuration.spacing_mm, f"{provenance.method}: reconstructions"),
        f"For each encoder the corrupted crop of {name}, the turned clean crop that is asked for, and what the decoder makes; "
        + "; ".join(f"{each.model}: mean squared error {each.error:.2f}" for each in made),
        "Input, asked for, made: for the encoder, its moving average and the hybrid of both.",
    )
    return picture, *dense


def recovery_pictures(pretrained: OpenedCheckpoint, folders: Folders, device: torch.device) -> tuple[Picture, ...]:
    """Return what Alice's decoder makes of masked tokens; nothing without a loss for them.

    Raises:
        UserError: as ``method_of`` and ``open_cases``.
    """
    method, provenance = method_of(pretrained, device), pretrained.own_provenance
    if not provenance.settings["reconstruction_weight"]:
        return ()
    store = open_cases(provenance, provenance.dataset_name, folders)
    name = store.names[0]
    made = reconstruct_case(method, store.case(name), None, 0, device)
    return (
        picture_of(
            reconstruction_figure(made, method.configuration.spacing_mm, f"{provenance.method}: recovered tokens"),
            f"The visible tokens of a patch of {name}, the patch, and the patch with its masked tokens recovered; mean squared "
            f"error {made[0].error:.2f}, by the mean of what is visible {made[0].error_untold:.2f}",
            "Visible tokens, the patch, and the masked tokens recovered beside the visible ones.",
        ),
    )


def match_pictures(pretrained: OpenedCheckpoint, folders: Folders, device: torch.device) -> tuple[Picture, ...]:
    """Return where SAM finds places of a case in another case, and what dense features show; the latter alone for one case.

    Raises:
        UserError: as ``matcher_of`` and ``open_cases``.
    """
    dense = dense_pictures(pretrained, folders, device)
    provenance = pretrained.own_provenance
    store = open_cases(provenance, provenance.dataset_name, folders)
    if len(store.names) < 2:
        return dense
    matcher, method = matcher_of(pretrained, store, device)
    query, key = store.names[:2]
    found = find_matches(matcher, store, query, key, MATCHES, 0, method.configuration.patch_size)
    picture = picture_of(
        matches_figure(found, method.configuration.spacing_mm, f"{provenance.method}: {query}, found in {key}"),
        f"Places of {query} beside where embeddings and the body's box find them in {key}; "
        + "; ".join(f"similarity {each.score:.2f}, back within {each.cycle_mm:.0f} mm" for each in found),
        "A place, where embeddings find it in another case, and the same place of the body's box.",
    )
    return picture, *dense


MAKERS: dict[str, Maker] = {
    "pix2rep": dense_pictures,
    "pix2rep_v2": dense_pictures,
    "pcrl": reconstruction_pictures,
    "pixelglobal": uncertainty_pictures,
    "sam": match_pictures,
    "alice": recovery_pictures,
}
"""By method; a method without an entry shows nothing of its own."""


def method_pictures(method: str, checkpoint: Path, folders: Folders, device: torch.device) -> tuple[Picture, ...]:
    """Return what a method shows of itself; empty for one that shows nothing.

    Raises:
        UserError: the weights or the cases cannot be shown.
    """
    maker = MAKERS.get(method)
    return () if maker is None else maker(open_checkpoint(checkpoint), folders, device)
