import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.views.fusion import FusionRange, draw_classes, fuse


def generators(samples: range) -> list[torch.Generator]:
    return sample_generators(0, "fusion", 0, list(samples))


@pytest.mark.parametrize("shape", [(32, 48), (1, 16, 24), (8, 16, 24)])
def test_classes_are_boxes_of_the_allowed_sides(shape):
    ranges = FusionRange(coefficients=4, boxes=(1, 1), side=(0.25, 0.5))
    classes = draw_classes(generators(range(200)), ranges, shape)
    assert classes.shape == (200, *shape)
    found = {axis: set() for axis in range(len(shape))}
    for each in classes:
        inside = each.nonzero()
        if not len(inside):
            continue  # class 0 is drawn too
        size = inside.amax(dim=0) - inside.amin(dim=0) + 1
        assert len(inside) == size.prod()
        assert len(each[each > 0].unique()) == 1
        for axis, length in enumerate(size.tolist()):
            found[axis].add(length)
    for axis, length in enumerate(shape):
        low, high = (1, 1) if length == 1 else (length // 4, length // 2)
        assert min(found[axis]) == low
        assert max(found[axis]) == high
    kinds = [int(each.max()) for each in classes]
    assert set(kinds) == {0, 1, 2, 3, 4}
    assert all(25 <= kinds.count(kind) <= 55 for kind in range(5))


def test_boxes_reach_every_border_and_later_ones_cover_earlier_ones():
    classes = draw_classes(generators(range(100)), FusionRange(), (16, 24))
    covered = (classes > 0).float().mean(dim=0)
    assert (covered > 0).all()
    assert covered.mean() > 0.3
    assert all(len(each.unique()) >= 3 for each in classes)


def test_fusion_is_the_weighted_sum():
    foreground, background = torch.randn(2, 2, 2, 4, 4).unbind()
    classes = torch.randint(0, 5, (2, 4, 4))
    made = fuse(foreground, background, classes, 4)
    for index in ((0, 1, 2, 3), (1, 0, 0, 1)):
        sample, channel, y, x = index
        share = int(classes[sample, y, x]) / 4
        assert made[index].item() == pytest.approx(
            share * foreground[index].item() + (1 - share) * background[index].item(), abs=1e-6
        )


def test_a_sample_depends_on_its_generator_alone():
    together = draw_classes(generators(range(4)), FusionRange(), (16, 24))
    assert torch.equal(draw_classes(generators(range(2, 3)), FusionRange(), (16, 24))[0], together[2])


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (FusionRange(coefficients=0), "coefficients must be at least 1, got 0"),
        (FusionRange(boxes=(5, 4)), "boxes must be two ascending numbers of at least 1"),
        (FusionRange(side=(0.5, 1.5)), "side must be two ascending numbers within"),
    ],
)
def test_wrong_ranges_are_refused(ranges, message):
    with pytest.raises(ValueError, match=message):
        draw_classes(generators(range(1)), ranges, (8, 8))
