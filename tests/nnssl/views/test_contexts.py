"""PCRL's mixing and the scale of its targets, against numpy and closed formulas."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.views.contexts import (
    ContextViews,
    clean_in_scale,
    counted_targets,
    draw_mixing,
    in_scale,
    mix,
    reconstruction_targets,
)
from nnssl.views.turns import draw_turns, undo_turns

BATCH, CHANNELS, SHAPE = 3, 2, (5, 12, 12)


def generators(batch: int = BATCH, step: int = 0) -> list[torch.Generator]:
    return sample_generators(0, "contexts", step, range(batch))


def make_views() -> ContextViews:
    """Return crops whose channels and samples differ in range, and in which outliers lie beyond it."""
    source = torch.Generator().manual_seed(2)
    factor = torch.tensor([[0.5, 3.0], [1.0, 20.0], [4.0, 0.1]]).view(BATCH, CHANNELS, 1, 1, 1)
    clean_o, clean_m, seen = (factor * torch.randn(BATCH, CHANNELS, *SHAPE, generator=source) - 1 for _ in range(3))
    clean_m = clean_m + factor
    clean_o[0, 0, 0, 0, 0] = 1e3
    turns = {model: draw_turns(generators(step=i), 3, (1, 2), "quarter", (0, 1, 2)) for i, model in enumerate("omh")}
    masks = clean_o[:, 0] > 0, clean_m[:, 0] > 0
    return ContextViews(clean_o, clean_m, seen, seen, turns, {}, torch.tensor([0.2, 0.5, 1.0]), *masks)


def test_without_alpha_the_share_is_the_random_number():
    expected = torch.cat([torch.rand(1, generator=each) for each in generators(50)])
    assert torch.equal(draw_mixing(generators(50), 1.0), expected)


def test_shares_follow_the_beta_distribution():
    """The distribution function of Beta(2, 2) is ``3 x^2 - 2 x^3``, that of Beta(1/2, 1/2) ``2 / pi asin(sqrt x)``."""
    uniform = draw_mixing(generators(2000), 1.0).double()
    two, half = (draw_mixing(generators(2000), alpha).double() for alpha in (2.0, 0.5))
    torch.testing.assert_close(3 * two**2 - 2 * two**3, uniform, atol=1e-5, rtol=0)
    torch.testing.assert_close(2 / np.pi * half.sqrt().asin(), uniform, atol=1e-3, rtol=0)
    assert [float(each.var()) for each in (two, uniform, half)] == pytest.approx([1 / 20, 1 / 12, 1 / 8], rel=0.1)
    assert two.min() >= 0
    assert half.max() <= 1


@pytest.mark.parametrize("alpha", [0.01, 0.4, 1.0, 8.0])
def test_a_share_takes_one_random_number_and_does_not_depend_on_the_batch(alpha):
    used, fresh = generators(), generators()
    shares = draw_mixing(used, alpha)
    assert torch.equal(draw_mixing(generators()[1:], alpha), shares[1:])
    for one, other in zip(used, fresh, strict=True):
        torch.rand(1, generator=other)
        assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=other))


def test_the_unit_range_against_numpy():
    views = make_views()
    kept = [views.clean_o.clone(), views.clean_m.clone()]
    found = clean_in_scale(views, "unit")
    for sample in range(BATCH):
        for channel in range(CHANNELS):
            both = np.concatenate([each[sample, channel].numpy().ravel() for each in kept])
            low, high = np.percentile(both, [1, 99])
            for before, after in zip(kept, (found.clean_o, found.clean_m), strict=True):
                expected = np.clip((before[sample, channel].numpy() - low) / (high - low), 0, 1)
                np.testing.assert_allclose(after[sample, channel].numpy(), expected, atol=1e-4)
                assert expected.std() > 0.1
    assert torch.equal(found.seen_o, views.seen_o)
    assert torch.equal(views.clean_o, kept[0])
    assert torch.equal(views.clean_m, kept[1])
    assert clean_in_scale(views, "z_score").clean_o is views.clean_o


def test_targets_of_the_unit_range_are_turned_and_mixed_in_it():
    views = clean_in_scale(make_views(), "unit")
    targets = reconstruction_targets(views, "mixed_then_turned")
    torch.testing.assert_close(
        undo_turns(targets["h"], views.turns["h"]), mix(views.clean_o, views.clean_m, views.mixing)
    )
    for target in targets.values():
        assert target.min() >= 0
        assert target.max() <= 1


def test_an_empty_channel_is_zero_in_the_unit_range():
    views = make_views()
    empty = torch.full_like(views.clean_o, -0.7)
    views = replace(views, clean_o=empty, clean_m=empty)
    assert torch.equal(clean_in_scale(views, "unit").clean_o, torch.zeros_like(empty))
    assert torch.isfinite(in_scale(views.seen_o, views, "unit")).all()


@pytest.mark.parametrize("hybrid_target", ["mixed_then_turned", "turned_then_mixed"])
def test_voxels_that_count_move_with_the_targets(hybrid_target):
    """Crops that are NaN where they do not count make targets that are NaN exactly where these do not count."""
    views = make_views()
    hidden = [
        torch.where(mask[:, None], clean, torch.nan)
        for clean, mask in ((views.clean_o, views.learnable_o), (views.clean_m, views.learnable_m))
    ]
    targets = reconstruction_targets(replace(views, clean_o=hidden[0], clean_m=hidden[1]), hybrid_target)
    counted = counted_targets(views, hybrid_target)
    for model, target in targets.items():
        assert 0 < int(counted[model].sum()) < counted[model].numel()
        assert torch.equal(~target.isnan(), counted[model][:, None].expand_as(target))
