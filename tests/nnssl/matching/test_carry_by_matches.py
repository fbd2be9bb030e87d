"""Labels carried by matched places: against a loop over places, with a matcher that shifts by a known number of voxels."""

from types import SimpleNamespace

import numpy as np

from nnssl.matching.points import Matches
from tools.carry_by_matches import choose, matched_labels

SPACING = {"to": (3.0, 1.0, 2.0), "near": (2.0, 1.5, 1.0), "far": (3.0, 1.0, 2.0)}
SHAPE = {"to": (3, 5, 4), "near": (4, 3, 9), "far": (3, 6, 5)}


class Store:
    def case(self, name):
        return SimpleNamespace(shape=SHAPE[name], spacing_mm=SPACING[name])


class Shift:
    """Shifts every place by 1.5 mm along y; scores rise along x in one case and are constant in the other."""

    def match_points(self, query, points_mm, key):
        score = points_mm[:, 2] if key == "near" else np.full(len(points_mm), 3.0)
        return Matches(points_mm + np.array([0, 1.5, 0]), score)


def test_every_cell_has_the_label_of_its_most_similar_match():
    rng = np.random.default_rng(0)
    references = [SimpleNamespace(name=name, labels=rng.integers(0, 4, SHAPE[name])) for name in ("near", "far")]
    found = matched_labels(Shift(), Store(), "to", references, (1, 2, 3))
    assert found.shape == SHAPE["to"]
    for z, y, x in np.ndindex(SHAPE["to"]):
        centre_mm = [z * 3.0, y // 2 * 2 + 0.5, (x // 3 * 3 + 1) * 2.0]
        reference = references[0] if centre_mm[2] > 3.0 else references[1]
        place = []
        for mm, spacing, length in zip(
            np.add(centre_mm, [0, 1.5, 0]), SPACING[reference.name], SHAPE[reference.name], strict=True
        ):
            place.append(int(min(max(round(mm / spacing), 0), length - 1)))
        assert found[z, y, x] == reference.labels[tuple(place)]


def test_without_scores_the_most_frequent_label_is_taken():
    labels = np.array([[2, 1, 5], [2, 0, 3], [0, 0, 4]])
    assert choose(labels, np.full(labels.shape, np.nan)).tolist() == [2, 0, 3]
