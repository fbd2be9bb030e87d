"""Block masks: exact counts, whole blocks, draws that differ between samples and repeat with their generators."""

import math

import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.errors import UserError
from nnssl.views.masking import check_mask, draw_block_mask, visible_tokens


def generators(step: int = 0, samples=range(6)):
    return sample_generators(3, "mask", step, list(samples))


@pytest.mark.parametrize(
    ("grid", "block", "ratio"),
    [((4, 6, 5), (1, 2, 2), 0.75), ((7, 5), (2, 3), 0.6), ((10, 10), (1, 3), 0.55), ((2, 3, 4), (2, 3, 4), 0.5)],
)
def test_every_sample_has_exactly_the_wanted_number(grid, block, ratio):
    tokens = math.prod(grid)
    wanted = -(-round(ratio * 100) * tokens // 100)
    mask = draw_block_mask(generators(), grid, block, ratio)
    assert mask.sum(dim=1).tolist() == [wanted] * 6


@pytest.mark.parametrize(("grid", "block"), [((4, 6, 5), (2, 3, 2)), ((7, 5), (2, 3))])
def test_blocks_are_masked_whole_but_for_one(grid, block):
    mask = draw_block_mask(generators(), grid, block, 0.55)
    for sample in mask.view(-1, *grid):
        partly = 0
        starts = [range(0, length, side) for length, side in zip(grid, block, strict=True)]
        for corner in torch.cartesian_prod(*(torch.tensor(s) for s in starts)).tolist():
            tile = sample[tuple(slice(low, low + side) for low, side in zip(corner, block, strict=True))]
            partly += tile.any().item() and not tile.all().item()
        assert partly <= 1


def test_masks_differ_between_samples_and_steps_and_repeat():
    first = draw_block_mask(generators(), (6, 6), (2, 2), 0.5)
    assert len({tuple(row.tolist()) for row in first}) == 6
    assert not torch.equal(first, draw_block_mask(generators(1), (6, 6), (2, 2), 0.5))
    assert torch.equal(first, draw_block_mask(generators(), (6, 6), (2, 2), 0.5))
    assert torch.equal(first[4:5], draw_block_mask(generators(samples=[4]), (6, 6), (2, 2), 0.5))


def test_every_token_is_masked_equally_often_when_blocks_tile_the_grid():
    mask = draw_block_mask(generators(samples=range(600)), (4, 6), (2, 2), 0.7)
    share = mask.float().mean(dim=0)
    assert share.min() > 0.6
    assert share.max() < 0.8


def test_visible_tokens_are_those_that_are_not_masked():
    mask = draw_block_mask(generators(), (3, 5), (1, 2), 0.7)
    visible = visible_tokens(mask)
    for row in range(6):
        assert visible[row].tolist() == [token for token in range(15) if not mask[row, token]]


def test_blocks_that_do_not_fit_are_refused():
    check_mask((2, 3), (1, 1), 0.5)
    with pytest.raises(UserError, match="mask_block must have 3 numbers, .* got 1,1"):
        check_mask((2, 2, 2), (1, 1), 0.5)
    with pytest.raises(UserError, match=r"mask_ratio must leave .* got 0\.9"):
        check_mask((2, 2), (1, 1), 0.9)


def test_errors():
    with pytest.raises(ValueError, match="ratio must leave some of 4 tokens visible"):
        draw_block_mask(generators(), (2, 2), (1, 1), 0.9)
    with pytest.raises(ValueError, match="3 axes"):
        draw_block_mask(generators(), (2, 2, 2), (1, 1), 0.5)
    with pytest.raises(ValueError, match="between 1 and 2"):
        visible_tokens(torch.tensor([[True, False, False], [True, True, False]]))
