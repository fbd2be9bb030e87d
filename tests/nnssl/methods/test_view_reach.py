"""How much of the intensity changes of every method reaches the features of a network with instance normalisation."""

import pytest

from tools.table_of_steps import plan_of
from tools.view_reach import MODALITIES, STAGES, VOLUMES_ONLY, phantom_patches, random_encoder, ranges_of, reach

NOTHING = 0.01
"""Reach below which a change is none."""
SEEN = 0.1
"""Least reach of a stage's changes together."""
UNSEEN = {
    ("alice.alignment", "MR"),
    ("alice.alignment", "CT"),
    ("pixelglobal.distillation", "CT"),
}
"""Stages whose changes are only contrast and brightness, as in their papers; ``documentation/views.md`` says what follows."""


@pytest.fixture(scope="module")
def plan():
    return plan_of("BTCV", "8gb")


@pytest.fixture(scope="module", params=MODALITIES)
def modality(request):
    patches = phantom_patches(request.param)
    return request.param, patches, random_encoder(patches.ndim - 2)


@pytest.mark.parametrize("stage", STAGES)
def test_changes_reach_the_features_where_it_is_said(plan, modality, stage):
    name, patches, encoder = modality
    axes = patches.ndim - 2
    if axes == 2 and stage in VOLUMES_ONLY:
        return
    ranges, names = ranges_of(stage, plan, name, axes)
    together = reach(patches, encoder, ranges, names)[1]
    if (stage, name) in UNSEEN:
        assert together < NOTHING
    else:
        assert together > SEEN
    for change in names:
        voxels, features = reach(patches, encoder, ranges, [change])
        assert voxels > NOTHING / 2, change
        # convolution and instance normalisation remove ``a x + b``, and nothing else
        assert (features < NOTHING) == (change in ("contrast", "brightness")), (change, features)
