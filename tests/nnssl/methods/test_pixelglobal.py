"""Properties of Pixel-global (methods 5.11 of the specification) on tiny networks, in 2D and in anisotropic 3D."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from nnssl.collapse import collapse_warning, effective_rank, feature_std
from nnssl.draws import sample_generators
from nnssl.errors import UserError
from nnssl.methods.pixelglobal import (
    PixelGlobal,
    check_settings,
    intensity_range,
)
from nnssl.methods.settings import resolve_stage
from nnssl.momentum import cosine_momentum, update_teacher
from nnssl.networks.backbone import build_network
from nnssl.networks.dense import decoder_maps
from nnssl.networks.heads import PointAssignment, PooledAssignment
from nnssl.networks.uncertainty import normalised_entropy, point_uncertainty
from nnssl.views.overlap import common_share
from nnssl.views.points import corner_points, interpolate_at
from tests.nnssl.methods.tiny_configuration import make_configuration, planned
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

CHANNELS = 2
dims = pytest.mark.parametrize("dim", [2, 3])
STABILIZERS = ("none", "literal", "signed_detached", "excess", "added")


def make_stage(dim: int, *overrides: str, residual: bool = False) -> PixelGlobal:
    configuration = make_configuration(dim)
    given = ("points=200", "stabilizer=none", *overrides)
    settings, _ = resolve_stage(PixelGlobal, planned(configuration), "pixelglobal.distillation", given)
    network = build_network(architecture(dim, residual, False), CHANNELS, 3, seed=0)
    torch.manual_seed(0)
    return PixelGlobal(network, settings, configuration)


def still(dim: int) -> tuple[str, ...]:
    """Settings under which both views are the patch itself."""
    rotation = ",".join(["0"] * (1 if dim == 2 else 3))
    return ("intensity_views=", "crop_fraction=1,1", "flip_probability=0", f"rotation_deg={rotation}")


def make_batch(dim: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, *PATCHES[dim], generator=torch.Generator().manual_seed(1))


def generators(step: int = 0, batch: int = 4) -> list[torch.Generator]:
    return sample_generators(0, "test", step, range(batch))


# views


@dims
def test_partners_get_the_same_draws_and_others_do_not(dim):
    """The same patch in all four places: partners give the same views and points to the bit."""
    method = make_stage(dim)
    batch = make_batch(dim, 1).expand(4, *[-1] * (dim + 1)).clone()
    views = method.make_views(batch, generators())
    for name in ("student", "teacher", "points_student", "points_teacher", "valid"):
        first, second, third, fourth = getattr(views, name)
        assert torch.equal(first, second), name
        assert torch.equal(third, fourth), name
        assert name == "valid" or not torch.equal(first, third), name
    assert views.partner.tolist() == [1, 0, 3, 2]
    assert views.seeds[0] == views.seeds[1] != views.seeds[2]


@dims
def test_a_pair_is_the_same_in_any_batch_and_replays(dim):
    method = make_stage(dim)
    batch = make_batch(dim)
    kept = batch.clone()
    whole, part = method.make_views(batch, generators()), method.make_views(batch[2:], generators()[2:])
    again = method.make_views(batch, generators())
    assert torch.equal(batch, kept)
    for name in ("student", "teacher", "points_student", "points_teacher", "valid"):
        torch.testing.assert_close(getattr(whole, name)[2:], getattr(part, name), atol=1e-5, rtol=1e-5)
        assert torch.equal(getattr(whole, name), getattr(again, name))
    assert whole.seeds[2:] == part.seeds


@dims
def test_points_show_the_same_tissue_in_both_views(dim):
    """Voxels that hold their own place: reading both views at the points gives the same places."""
    method = make_stage(dim, "intensity_views=")
    axes = [torch.arange(n, dtype=torch.float32) for n in PATCHES[dim]]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))[-CHANNELS:]
    batch = places.expand(4, *places.shape).clone()
    for step in range(3):
        views = method.make_views(batch, generators(step))
        shape = PATCHES[dim]
        ours, theirs = (
            interpolate_at(side, points, shape)
            for side, points in ((views.student, views.points_student), (views.teacher, views.points_teacher))
        )
        seen = views.valid > 0
        assert seen.float().mean() > 0.9
        torch.testing.assert_close(ours[seen], theirs[seen], atol=2e-3, rtol=1e-3)
        last = torch.tensor(shape) - 1
        assert (views.points_teacher[seen] >= -1e-3).all()
        assert (views.points_teacher[seen] <= last + 1e-3).all()


@dims
def test_crops_overlap(dim, monkeypatch):
    """At least the wanted share of the smaller crop, also where chance alone gives much less."""
    import nnssl.methods.pixelglobal as module

    drawn = []
    original = module.draw_overlapping
    monkeypatch.setattr(module, "draw_overlapping", lambda *a: drawn.append(original(*a)) or drawn[-1])
    method = make_stage(dim, "crop_fraction=0.1,0.15", "flip_probability=0")
    for step in range(10):
        method.make_views(make_batch(dim), generators(step))
    shares = torch.cat([common_share(first, second) for first, second in drawn])
    assert shares.min() >= method.settings.least_overlap == 0.3


# heads, uncertainty, teacher


@dims
def test_interpolated_probabilities_are_those_of_the_corners(dim):
    points = torch.rand(2, 30, dim, generator=torch.Generator().manual_seed(0)) * (torch.tensor(PATCHES[dim]) - 1)
    corners, weights = corner_points(points, PATCHES[dim])
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 30))
    torch.testing.assert_close((corners * weights[..., None]).sum(dim=2), points, atol=1e-5, rtol=1e-5)
    assert torch.equal(corners, corners.round())
    field = torch.randn(2, 3, *PATCHES[dim])
    read = interpolate_at(field, corners.flatten(1, 2), PATCHES[dim]).unflatten(1, corners.shape[1:3])
    torch.testing.assert_close(
        (read * weights[..., None]).sum(dim=2), interpolate_at(field, points, PATCHES[dim]), atol=1e-5, rtol=1e-5
    )


def test_uncertainty_of_certain_and_uniform_predictions():
    """Property 2: 1 for uniform probabilities, near 0 for one class, the plain entropy without dropout; no gradient."""

    class Fixed(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self, features, seeds):
            return self.logits.expand(*features.shape[:2], -1)

    features = torch.randn(2, 5, 4)
    uniform = point_uncertainty(Fixed(torch.zeros(7)), features, (1, 2), 3, 1.0)
    torch.testing.assert_close(uniform, torch.ones(2, 5))
    assert point_uncertainty(Fixed(torch.tensor([90.0, 0, 0])), features, (1, 2), 3, 1.0).max() < 1e-6
    head = PointAssignment(4, 8, 6, dropout=0.0)
    single = normalised_entropy((head(features) / 0.5).softmax(dim=2))
    torch.testing.assert_close(point_uncertainty(head, features, (1, 2), 20, 0.5), single, atol=1e-5, rtol=1e-5)
    dropped = PointAssignment(4, 8, 6, dropout=0.5)
    found = point_uncertainty(dropped, features, (1, 2), 20, 0.5)
    assert not torch.allclose(found, normalised_entropy((dropped(features) / 0.5).softmax(dim=2)), atol=1e-3)
    assert ((found >= 0) & (found <= 1)).all()


def test_passes_with_dropout_differ_and_replay():
    head, features = PointAssignment(4, 8, 6, dropout=0.3), torch.randn(2, 50, 4)
    assert torch.equal(head(features, (3, 4)), head(features, (3, 4)))
    assert not torch.allclose(head(features, (3, 4)), head(features, (5, 6)))
    kept = torch.ones(1, 20000, 4)
    assert float((head._drop(kept, (1,), 0) == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float(head._drop(kept, (1,), 0).mean()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("make", [lambda: PooledAssignment(4, 8, 6, 64), lambda: PointAssignment(4, 8, 6, 0.0)])
@pytest.mark.parametrize("spread", [1.0, 1e-2])
def test_no_output_can_win_for_all(make, spread):
    """Every output has mean 0 over the batch and rows have a length of about 1, also of images that hardly differ, and under
    mixed precision."""
    torch.manual_seed(0)
    head = make()
    shape = (64, 4, 5, 7) if isinstance(head, PooledAssignment) else (8, 40, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = head(torch.randn(shape[1:]) + spread * torch.randn(shape)).flatten(0, -2)
    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(6), atol=1e-4, rtol=0)
    assert float(rows.square().sum(dim=1).mean()) == pytest.approx(1.0, abs=0.03)


@dims
def test_no_gradient_reaches_the_teacher(dim):
    """Property 3, for all stabilizers; and it reaches every part of the student but the segmentation layers."""
    for stabilizer in STABILIZERS:
        method = make_stage(dim, f"stabilizer={stabilizer}", "uncertainty_passes=2")
        views = method.make_views(make_batch(dim), generators())
        sum(method.losses(views, 0.0).losses.values()).backward()
        for _, teacher in method.momentum_pairs():
            assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        for name, parameter in method.network.named_parameters():
            expected = ".seg_layers." not in name
            found = parameter.grad is not None and parameter.grad.abs().sum() > 0
            # a bias before an instance norm has no effect
            assert found == expected or name.endswith("conv.bias"), (stabilizer, name)
        trained = {id(p) for group in method.parameter_groups() for p in group.parameters}
        assert not trained & {id(p) for _, teacher in method.momentum_pairs() for p in teacher.parameters()}
        assert trained >= {id(p) for p in method.local_head.parameters()}


def test_the_teacher_is_kept_not_replaced():
    """Property 1: with a momentum of 1 it never moves, with 0.996 by 0.004 of the gap; equation 2 as printed would swap them."""
    method = make_stage(2)
    student, teacher = method.momentum_pairs()[2]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in teacher.parameters()]
    update_teacher(student, teacher, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    update_teacher(student, teacher, 0.996)
    for a, b in zip(before, teacher.parameters(), strict=True):
        torch.testing.assert_close(b - a, torch.full_like(a, 0.004), atol=1e-6, rtol=1e-4)
    assert method.momentum(1.0) == 1.0
    assert method.momentum(0.0) == cosine_momentum(0, 500, method._momentum) == pytest.approx(0.96)


# losses


def uniform_method(dim: int, *overrides: str) -> PixelGlobal:
    method = make_stage(dim, *overrides)
    for head in (method.global_head, method.local_head, method.teacher_global_head, method.teacher_local_head):
        nn.init.zeros_(head.project.weight)
        nn.init.zeros_(head.project.bias)
    return method


@dims
def test_uniform_outputs_cost_the_log_of_the_dimensions(dim):
    """Property 8."""
    method = uniform_method(dim, "global_dimensions=32", "local_dimensions=16")
    output = method.losses(method.make_views(make_batch(dim), generators()), 0.0)
    assert output.losses["global"].item() == pytest.approx(math.log(32), abs=1e-4)
    assert output.losses["local"].item() == pytest.approx(math.log(16), abs=1e-4)
    assert output.monitors["voxel_cross_entropy"].item() == pytest.approx(math.log(16), abs=1e-4)
    assert output.monitors["uncertainty"].item() == pytest.approx(1.0, abs=1e-4)


@dims
def test_equal_partners_cost_nothing_under_the_printed_formula(dim):
    """Property 4: the other image is the image, so equation 6 is 0, while the cross-entropy that is logged is not."""
    method = make_stage(dim, "stabilizer=literal", "uncertainty_passes=0")
    batch = make_batch(dim, 2)[[0, 0, 1, 1]]
    output = method.losses(method.make_views(batch, generators()), 0.0)
    assert output.losses["local"].item() == pytest.approx(0.0, abs=1e-5)
    assert output.monitors["voxel_cross_entropy"].item() > 0.1


@dims
def test_signed_and_detached_has_the_gradient_of_none(dim):
    """Property 7, through the whole network."""
    gradients = []
    for stabilizer in ("none", "signed_detached", "literal"):
        method = make_stage(dim, f"stabilizer={stabilizer}", "uncertainty_passes=2")
        views = method.make_views(make_batch(dim), generators())
        method.losses(views, 0.0).losses["local"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=0)
    assert not torch.allclose(gradients[0], gradients[2], atol=1e-5)


def written_out_head(head, rows):
    """Hidden layer, projection, what outputs have in common taken away, every output standardised, length about 1."""
    hidden = (rows @ head.hidden.weight.T + head.hidden.bias).clamp_min(0)
    return written_out_last_layer(head, hidden)


def written_out_last_layer(head, hidden):
    logits = hidden @ head.project.weight.T + head.project.bias
    own = logits - logits.mean(dim=1, keepdim=True)
    columns = [(c - c.mean()) / c.std(unbiased=False) for c in own.T]
    return torch.stack(columns, dim=1) / math.sqrt(len(columns))


def read_linearly(feature_map, point):
    """Return the voxels around a point of one image with their weights: [(weight, features), ...]."""
    found = []
    lower = [math.floor(float(place)) for place in point]
    for corner in itertools.product((0, 1), repeat=len(lower)):
        weight = math.prod(
            (float(p) - low if up else 1 - (float(p) - low)) for p, low, up in zip(point, lower, corner, strict=True)
        )
        index = tuple(min(low + up, n - 1) for low, up, n in zip(lower, corner, feature_map.shape[1:], strict=True))
        found.append((weight, feature_map[(slice(None), *index)]))
    return found


def differing(method: PixelGlobal) -> PixelGlobal:
    """Give the teacher weights of its own."""
    with torch.no_grad():
        for _, teacher in method.momentum_pairs():
            for parameter in teacher.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
                parameter.add_(0.3 * noise)
    return method


@dims
def test_exchanged_views_add_the_other_direction(dim):
    """The loss is the mean of both directions; each has a gradient, and none reaches the teacher."""
    both = differing(make_stage(dim, "exchange_views=true", "uncertainty_passes=2"))
    one = differing(make_stage(dim, "uncertainty_passes=2"))
    views = one.make_views(make_batch(dim), generators())
    back = views.exchanged()
    assert torch.equal(back.student, views.teacher)
    assert torch.equal(back.points_teacher, views.points_student)
    assert set(back.seeds).isdisjoint(views.seeds)
    found, first, second = both.losses(views, 0.0), one.losses(views, 0.0), one.losses(back, 0.0)
    for name, value in found.losses.items():
        torch.testing.assert_close(value, (first.losses[name] + second.losses[name]) / 2)
        assert not torch.equal(first.losses[name], second.losses[name])
    sum(found.losses.values()).backward()
    assert all(p.grad is None for _, teacher in both.momentum_pairs() for p in teacher.parameters())


@dims
def test_exchanged_views_of_a_linear_map_are_read_at_the_same_places(dim):
    """Where intensity is a linear function of place, a point has the same value in both crops, at the exchanged places too."""
    method = make_stage(dim, "exchange_views=true", "intensity_views=")
    shape = PATCHES[dim]
    ramp = sum(torch.arange(n).reshape([-1 if a == i else 1 for a in range(dim)]) for i, n in enumerate(shape)).float()
    views = method.make_views(ramp.expand(4, CHANNELS, *shape).contiguous(), generators())
    back = views.exchanged()
    read = [interpolate_at(each.student, each.points_student, shape) for each in (views, back)]
    inside = views.valid[..., None] > 0
    torch.testing.assert_close(read[0] * inside, read[1] * inside, atol=0.5, rtol=0)


@pytest.mark.parametrize("stabilizer", ["none", "literal", "added"])
@torch.no_grad()
def test_both_losses_from_the_views_alone(stabilizer):
    """Equations 3 to 6 in loops: each side its own crop, head and temperature; the teacher's map at the corners, without dropout;
    dropout in student and uncertainty; invalid points without weight."""
    options = ("uncertainty_passes=3", "least_weight=0.1", "dropout=0.3", "points=40", f"stabilizer={stabilizer}")
    method = differing(make_stage(2, *options))
    own = method.settings
    views = method.make_views(make_batch(2), generators())
    valid = views.valid.clone()
    valid[:, ::3] = 0
    views = replace(views, valid=valid)
    output = method.losses(views, 0.0)

    student, teacher = decoder_maps(method.network, views.student), decoder_maps(method.teacher, views.teacher)
    pooled = {}
    for name, head, maps in (
        ("student", method.global_head, student),
        ("teacher", method.teacher_global_head, teacher),
    ):
        tokens = maps[0].flatten(2).transpose(1, 2)
        hidden = (tokens @ head.hidden.weight.T + head.hidden.bias).clamp_min(0).mean(dim=1)
        pooled[name] = written_out_last_layer(head, hidden)
    target = (pooled["teacher"] / own.teacher_temperature).softmax(dim=1)
    said = (pooled["student"] / own.student_temperature).softmax(dim=1)
    expected = -sum(float(t) * math.log(float(q)) for t, q in zip(target.flatten(), said.flatten(), strict=True))
    assert output.losses["global"].item() == pytest.approx(expected / 4, rel=1e-3)

    images, count = views.points_student.shape[:2]
    corners = [[read_linearly(teacher[-1][b], views.points_teacher[b, i]) for i in range(count)] for b in range(images)]
    voxels = torch.stack([features for image in corners for point in image for _, features in point])
    answers = (written_out_head(method.teacher_local_head, voxels) / own.teacher_temperature).softmax(dim=1)
    answers = answers.view(images, count, -1, answers.shape[1])
    weights = torch.tensor([[[weight for weight, _ in point] for point in image] for image in corners])
    local_target = (answers * weights[..., None]).sum(dim=2)
    at_points = torch.stack([torch.stack([sum(w * f for w, f in point) for point in image]) for image in corners])
    passes = [method.teacher_local_head(at_points, [s + 2 * k for s in views.seeds]) for k in (1, 2, 3)]
    mean = sum((each / own.teacher_temperature).softmax(dim=2) for each in passes) / 3
    unsure = -(mean * mean.clamp_min(1e-30).log()).sum(dim=2) / math.log(mean.shape[2])
    places = views.points_student.long()
    seen = torch.stack([student[-1][b][:, places[b, :, 0], places[b, :, 1]].T for b in range(images)])
    logs = (method.local_head(seen, views.seeds) / own.student_temperature).log_softmax(dim=2)
    cost = -(local_target * logs).sum(dim=2)
    total = weight_sum = 0.0
    for b, i in itertools.product(range(images), range(count)):
        difference = abs(float(cost[b, i]) - float(cost[(1, 0, 3, 2)[b], i]))
        plain = float(cost[b, i])
        paid = {"none": plain, "literal": difference, "added": plain + 0.5 * difference}[stabilizer]
        weight = float(valid[b, i]) * max(1 - float(unsure[b, i]), 0.1)
        total, weight_sum = total + weight * paid, weight_sum + weight
    assert 0 < float(valid.mean()) < 1
    assert output.losses["local"].item() == pytest.approx(total / weight_sum, rel=2e-3)


class Pointwise(nn.Module):
    """Stands for a head: the features are the logits."""

    def forward(self, features, seeds=None):
        return features


@dims
def test_the_teacher_s_answer_lies_where_the_student_sees_the_voxel(dim):
    """Property 5: views that are only flipped, a pointwise network: targets are what the network makes of the student's voxel."""
    rotation = ",".join(["0"] * (1 if dim == 2 else 3))
    method = make_stage(
        dim, "intensity_views=", "crop_fraction=1,1", "flip_probability=0.5", f"rotation_deg={rotation}"
    )
    views = method.make_views(make_batch(dim), generators())
    assert not torch.equal(views.student, views.teacher)
    assert views.valid.min() == 1
    method.teacher_local_head = Pointwise()
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dim](CHANNELS, 4, 1)
    with torch.no_grad():
        corners = corner_points(views.points_teacher, PATCHES[dim])[0].flatten(1, 2)
        found = method.local_target(interpolate_at(conv(views.teacher), corners, PATCHES[dim]), views)
        student = interpolate_at(conv(views.student), views.points_student, PATCHES[dim])
    expected = (student / method.settings.teacher_temperature).softmax(dim=2)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@dims
def test_what_is_not_in_both_views_does_not_matter(dim, monkeypatch):
    """Property 6, through the loss: voxels that no point reads may be anything, on both sides."""
    method = make_stage(dim, "crop_fraction=0.3,0.5", "uncertainty_passes=2", "points=40")
    views = method.make_views(make_batch(dim), generators())
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dim](CHANNELS, method.network.encoder.output_channels[0], 1)
    bottleneck = torch.randn(4, method.network.encoder.output_channels[-1], *(2,) * dim)
    monkeypatch.setattr("nnssl.methods.pixelglobal.decoder_maps", lambda _, volumes: [bottleneck, conv(volumes)])
    corners, _ = corner_points(views.points_teacher, PATCHES[dim])
    spoiled = {}
    for name, read in (("student", views.points_student), ("teacher", corners.flatten(1, 2))):
        free = torch.ones(4, *PATCHES[dim], dtype=torch.bool)
        for sample, places in enumerate(read.long()):
            free[(sample, *places.T)] = False
        assert free.any()
        spoiled[name] = torch.where(free[:, None], 1e4, getattr(views, name))
    elsewhere = replace(views, teacher=views.teacher.flip(-1))
    clean, dirty, other = (
        method.losses(each, 0.0).losses["local"] for each in (views, replace(views, **spoiled), elsewhere)
    )
    assert torch.equal(clean, dirty)
    assert not torch.equal(clean, other)


def test_monitors_see_a_collapse(monkeypatch):
    """A decoder that says the same everywhere is no variety, though standardising and dropout would make some."""
    method = make_stage(2, "uncertainty_passes=2")
    views = method.make_views(make_batch(2), generators())
    healthy = method.losses(views, 0.0).embeddings
    maps = decoder_maps(method.network, views.student)
    monkeypatch.setattr(
        "nnssl.methods.pixelglobal.decoder_maps", lambda network, volumes: [maps[0], torch.ones_like(maps[-1])]
    )
    collapsed = method.losses(views, 0.0).embeddings

    def warned(rows):
        return collapse_warning(float(feature_std(rows)), float(effective_rank(rows)), rows.shape[1])

    assert warned(healthy) is None
    assert "has collapsed" in warned(collapsed)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_a_batch_is_learned(residual):
    """The cross-entropy per voxel falls on one batch, and so it is not the moving target that makes the loss small."""
    method = make_stage(2, "uncertainty_passes=2", "points=400", residual=residual)
    views = method.make_views(make_batch(2), generators())
    optimizer = torch.optim.Adam([p for g in method.parameter_groups() for p in g.parameters], lr=3e-3)
    costs = []
    for _ in range(80):
        optimizer.zero_grad()
        output = method.losses(views, 0.0)
        sum(output.losses.values()).backward()
        optimizer.step()
        costs.append(output.monitors["voxel_cross_entropy"].item())
    assert costs[-1] < math.log(64) - 0.2 < costs[0]  # chance is the log of the dimensions


def test_batches_that_cannot_be_compared_are_refused():
    for options in (("stabilizer=literal", "global_weight=0"), ("stabilizer=none",)):
        with pytest.raises(UserError, match="batch_size must be at least 2, got 1: the global loss and stabilizer"):
            make_stage(2, "batch_size=1", *options)
    method = make_stage(2, "batch_size=1", "global_weight=0")
    assert method.make_views(make_batch(2, 1), generators(batch=1)).partner.tolist() == [0]
    settings = make_stage(2, "batch_size=6").settings
    check_settings(settings, 1)
    with pytest.raises(UserError, match=r"batch_size must be a multiple of 4, got 6: .*2 process.*set batch_size=4"):
        check_settings(settings, 2)


@pytest.mark.parametrize(
    "override", ["rotation_deg=90", "flip_axes=5", "crop_fraction=0.9,0.2", "intensity_views=foo", "gamma=1.5,0.7"]
)
def test_ranges_that_do_not_fit_the_patch_are_refused_before_training(override):
    with pytest.raises(UserError, match=r"rotation|flip|crop|foo|gamma"):
        make_stage(3, override)


def test_only_contrast_and_gamma_are_drawn():
    """The paper's changes: settings of the plan that name others are cut to these, and noise is never on."""
    method = make_stage(2)
    assert method.settings.intensity_views == ("contrast", "gamma")
    ranges = intensity_range(method.settings)
    assert (ranges.noise_probability, ranges.brightness_probability, ranges.contrast_probability) == (0.0, 0.0, 1.0)


def test_what_leaves():
    method = make_stage(3)
    exported = method.exported()
    for name in method.network.state_dict():
        assert name.startswith(exported.pretrained) == (".seg_layers." not in name), name
    assert copy.deepcopy(method).state_dict().keys() == method.state_dict().keys()
