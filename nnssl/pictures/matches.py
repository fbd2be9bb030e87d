"""Matches of places of one case in another, by the embeddings of SAM and by the body's box."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from nnssl.data.case_store import CaseStore, StoredCase
from nnssl.draws import draw_seed
from nnssl.errors import UserError
from nnssl.matching.body_box import BodyBoxMatcher
from nnssl.matching.embedded import EmbeddingMatcher
from nnssl.matching.points import cycle_error_mm
from nnssl.pictures.places import Voxel
from nnssl.weights.opened_checkpoint import OpenedCheckpoint
from nnssl.weights.restored_method import method_of

METHOD = "sam"


@dataclass(frozen=True)
class PlaceMatch:
    """A place and its matches in another case, with crops that are axial slices of channel 0 centred on them.

    Attributes:
        query_vox: Place (z, y, x) in its preprocessed case, in voxels.
        found_vox: Voxel (z, y, x) nearest to the match by embeddings in the other case.
        box_vox: Voxel (z, y, x) of the match by the body's box.
        score: Mean cosine of the embeddings.
        cycle_mm: Distance in mm between the place and the match of its match.
        query: Crop (y, x) around the place.
        found: Crop (y, x) around the match by embeddings.
        box: Crop (y, x) around the match by the body's box.
    """

    query_vox: Voxel
    found_vox: Voxel
    box_vox: Voxel
    score: float
    cycle_mm: float
    query: Float32[np.ndarray, "y x"]
    found: Float32[np.ndarray, "y x"]
    box: Float32[np.ndarray, "y x"]


def matcher_of(
    pretrained: OpenedCheckpoint,
    store: CaseStore,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[EmbeddingMatcher, Any]:
    """Return the matcher by SAM's embeddings for the cases of a store, and the method.

    Args:
        pretrained: Checkpoint of SAM.
        store: Store of the preprocessed cases.
        device: Device for the computation.
        autocast: Function that returns the context of mixed precision.

    Raises:
        UserError: If the checkpoint is of another method, or ``method_of`` rejects it.
    """
    found = pretrained.own_provenance.method
    if found != METHOD:
        raise UserError(
            f"{pretrained.path}: is of {found} and has no embeddings of places; use a checkpoint of {METHOD}"
        )
    method = method_of(pretrained, device)
    return EmbeddingMatcher(method.embedding, store, method.configuration.patch_size, device, autocast), method


def find_matches(
    matcher: EmbeddingMatcher, store: CaseStore, query: str, key: str, count: int, seed: int, patch: tuple[int, ...]
) -> list[PlaceMatch]:
    """Match random places in the body of a case to another case.

    Args:
        matcher: Matcher by embeddings.
        store: Store with both cases.
        query: Name of the case that the places belong to.
        key: Name of the other case.
        count: Number of places.
        seed: Random seed of the places.
        patch: Shape of a crop in voxels; its middle slice is kept.
    """
    case, other = store.case(query), store.case(key)
    body = case.body_vox
    rng = np.random.default_rng(draw_seed(seed, "matches", query))
    points_vox = body[rng.integers(len(body), size=count)]
    points_mm = points_vox * np.array(case.spacing_mm)
    matches = matcher.match_points(query, points_mm, key)
    cycles = cycle_error_mm(matcher, query, points_mm, key, matches)
    boxed_mm = BodyBoxMatcher(store).match_points(query, points_mm, key).points_mm
    rows = []
    for index, point in enumerate(points_vox):
        places = [_voxel(point), *(_voxel(each[index] / other.spacing_mm) for each in (matches.points_mm, boxed_mm))]
        crops = [_crop(each, place, patch) for each, place in zip((case, other, other), places, strict=True)]
        query_vox, found_vox, box_vox = places
        score, cycle = float(matches.score[index]), float(cycles[index])
        rows.append(PlaceMatch(query_vox, found_vox, box_vox, score, cycle, *crops))
    return rows


def _voxel(place: np.ndarray) -> Voxel:
    z, y, x = (round(float(each)) for each in place)
    return z, y, x


def _crop(case: StoredCase, place: Voxel, patch: tuple[int, ...]) -> Float32[np.ndarray, "y x"]:
    size = (1, *patch[1:])
    lower = [each - length // 2 for each, length in zip(place, size, strict=True)]
    return case.read_box(lower, size)[0, 0]
