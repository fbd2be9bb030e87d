"""Pictures in a report of what each method learned, made from its weights and its pretraining data."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from nnssl.data.patients import patient_in_name
from nnssl.paths import Folders
from nnssl.pictures.components import MOST_CASES, embed_cases
from nnssl.pictures.dense_network import dense_network_of
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
from nnssl.weights.preprocessed_cases import open_cases
from nnssl.weights.restored_method import method_of

Maker = Callable[[OpenedCheckpoint, Folders, torch.device], tuple[Picture, ...]]
MATCHES = 4
"""Number of places to match."""
COMPARED_CASES = 3
"""Number of cases shown: that of the query and those of two other patients."""


def picture_of(figure: Figure, alt: str, caption: str) -> Picture:
    """Convert a figure to a picture of a report."""
    file = io.BytesIO()
    save_png(figure, file)
    return Picture(file.getvalue(), alt, caption)


def dense_pictures(pretrained: OpenedCheckpoint, folders: Folders, device: torch.device) -> tuple[Picture, ...]:
    """Draw the similarity of a point to the voxels of other cases, and the principal components of features.

    Args:
        pretrained: Checkpoint of a method that pretrains features of voxels.
        folders: nnU-Net's folders, with the preprocessed cases of the pretraining data set.
        device: Device for the computation.

    Raises:
        UserError: If ``dense_network_of`` or ``open_cases`` rejects the checkpoint.
    """
    provenance = pretrained.own_provenance
    network = dense_network_of(pretrained, None, device)
    store = open_cases(provenance, provenance.dataset_name, folders)
    one_each = {patient_in_name(name): name for name in reversed(store.names)}
    names = sorted(one_each.values())
    query, *others = names[:COMPARED_CASES]
    comparison = compare_cases(network, store, query, None, others, 0)
    similarity = picture_of(
        similarity_figure(comparison, f"{provenance.method}: similarity to one point"),
        f"Slices of {', '.join([query, *others])} overlaid with the cosine similarity of every voxel to one point of {query}; "
        + "; ".join(
            f"nearest in {each.case.name}: cosine {each.nearest_cosine:.2f}" for each in comparison.similarities
        ),
        f"Cosine similarity of all voxels to the marked point of {query}; the circle is the most similar voxel.",
    )
    shown = names[:MOST_CASES]
    embedding = embed_cases(network, [store.case(name) for name in shown], None, 0)
    colours = picture_of(
        embedding_figure(embedding, f"{provenance.method}: features as colours"),
        f"Slices of {', '.join(shown)} with the first three principal components of their features as red, green and blue",
        "Voxels of the same colour have similar features, also in different cases.",
    )
    return similarity, colours


def uncertainty_pictures(pretrained: OpenedCheckpoint, folders: Folders, device: torch.device) -> tuple[Picture, ...]:
    """Draw where the teacher of Pixel-global is uncertain, and the pictures of dense features.

    Raises:
        UserError: If ``teacher_of`` or ``open_cases`` rejects the checkpoint.
    """
    provenance = pretrained.own_provenance
    teacher = teacher_of(pretrained, None, device)
    store = open_cases(provenance, provenance.dataset_name, folders)
    case = store.case(store.names[0])
    picture = picture_of(
        uncertainty_figure(
            measure_uncertainty(teacher, case, None), f"{provenance.method}: uncertainty of the teacher"
        ),
        f"A slice of {case.name} overlaid with the uncertainty of the teacher",
        f"Entropy of {teacher.passes} passes with dropout; bright voxels are those of which the teacher is uncertain.",
    )
    return picture, *dense_pictures(pretrained, folders, device)


def reconstruction_pictures(
    pretrained: OpenedCheckpoint, folders: Folders, device: torch.device
) -> tuple[Picture, ...]:
    """Draw the reconstructions of a patch by PCRL's decoder, and the pictures of dense features.

    Raises:
        UserError: If ``method_of`` or ``open_cases`` rejects the checkpoint.
    """
    method, provenance = method_of(pretrained, device), pretrained.own_provenance
    dense = dense_pictures(pretrained, folders, device)
    if not provenance.settings["reconstruction_weight"]:
        return dense
    store = open_cases(provenance, provenance.dataset_name, folders)
    name = store.names[0]
    made = reconstruct_case(method, store.case(name), None, 0, device)
    picture = picture_of(
        reconstruction_figure(
            made, method.configuration.spacing_mm, f"{provenance.method}: reconstructions", store.case(name).orientation
        ),
        f"For each encoder, the corrupted crop of {name}, the transformed clean crop as target, and the output of the decoder; "
        + "; ".join(f"{each.model}: mean squared error {each.error:.2f}" for each in made),
        "Input, target and output for the encoder, its moving average and the hybrid of both.",
    )
    return picture, *dense


def recovery_pictures(pretrained: OpenedCheckpoint, folders: Folders, device: torch.device) -> tuple[Picture, ...]:
    """Draw the masked tokens that Alice's decoder recovers; no picture if the reconstruction loss was off.

    Raises:
        UserError: If ``method_of`` or ``open_cases`` rejects the checkpoint.
    """
    method, provenance = method_of(pretrained, device), pretrained.own_provenance
    if not provenance.settings["reconstruction_weight"]:
        return ()
    store = open_cases(provenance, provenance.dataset_name, folders)
    name = store.names[0]
    made = reconstruct_case(method, store.case(name), None, 0, device)
    return (
        picture_of(
            reconstruction_figure(
                made,
                method.configuration.spacing_mm,
                f"{provenance.method}: recovered tokens",
                store.case(name).orientation,
            ),
            f"The visible tokens of a patch of {name}, the patch, and the patch with its masked tokens recovered; mean squared "
            f"error {made[0].error:.2f}, of the mean of the visible tokens {made[0].error_untold:.2f}",
            "The visible tokens, the patch, and the recovered masked tokens together with the visible ones.",
        ),
    )


def match_pictures(pretrained: OpenedCheckpoint, folders: Folders, device: torch.device) -> tuple[Picture, ...]:
    """Draw where SAM finds places of a case in another case (if there are two), and the pictures of dense features.

    Raises:
        UserError: If ``matcher_of`` or ``open_cases`` rejects the checkpoint.
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
        f"Places of {query} beside their matches in {key}, by embeddings and by the body's box; "
        + "; ".join(f"similarity {each.score:.2f}, cycle error {each.cycle_mm:.0f} mm" for each in found),
        "A place, its match by embeddings in another case, and the corresponding place in the body's box.",
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
"""Function that draws the pictures of each method; a method without an entry has none."""


def method_pictures(method: str, checkpoint: Path, folders: Folders, device: torch.device) -> tuple[Picture, ...]:
    """Draw the pictures of what a method learned; empty for a method without pictures.

    Raises:
        UserError: If the weights or the cases cannot be shown.
    """
    maker = MAKERS.get(method)
    return () if maker is None else maker(open_checkpoint(checkpoint), folders, device)
