"""Properties of Pix2Rep (methods 3.11 of the specification) on tiny networks, in 2D and in anisotropic 3D with two channels."""

import copy
import inspect
import itertools
import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nnssl.draws import sample_generators
from nnssl.errors import UserError
from nnssl.losses.barlow_twins import barlow_twins
from nnssl.losses.nt_xent import nt_xent
from nnssl.methods.pix2rep import (
    EquivariantViews,
    Pix2Rep,
    Pix2RepV2,
    embed_points,
    intensity_range,
    points_of_image,
)
from nnssl.methods.settings import resolve_stage
from nnssl.networks.backbone import build_network
from nnssl.networks.dense import decoder_maps, dense_maps
from nnssl.networks.heads import PointProjection
from nnssl.views.intensity import IntensityRange
from nnssl.views.spatial import AffineRange, draw_affine, map_points
from tests.nnssl.losses.test_barlow_twins import by_loops as barlow_by_loops
from tests.nnssl.losses.test_nt_xent import by_loops as nt_xent_by_loops
from tests.nnssl.methods.tiny_configuration import make_configuration, planned
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

CHANNELS = 2
VERSIONS = {"pix2rep": Pix2Rep, "pix2rep_v2": Pix2RepV2}
STILL = (
    "intensity_views=",
    "crop_fraction=1,1",
    "flip_probability=0",
)
dims = pytest.mark.parametrize("dim", [2, 3])
versions = pytest.mark.parametrize("version", VERSIONS)
residuals = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])


def make_stage(version: str, dim: int, *overrides: str, residual: bool = False):
    configuration = make_configuration(dim)
    settings, _ = resolve_stage(VERSIONS[version], planned(configuration), f"{version}.dense", overrides)
    network = build_network(architecture(dim, residual, False), CHANNELS, 3, seed=0)
    torch.manual_seed(0)
    return network, VERSIONS[version](network, settings, configuration)


def still(dim: int) -> tuple[str, ...]:
    """Settings under which both views are the patch itself."""
    return (*STILL, f"rotation_deg={','.join(['0'] * (1 if dim == 2 else 3))}")


def make_batch(dim: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, *PATCHES[dim], generator=torch.Generator().manual_seed(1))


def generators(step: int = 0, batch: int = 4) -> list[torch.Generator]:
    return sample_generators(0, "test", step, range(batch))


class OneMap(nn.Module):
    """A network whose only decoder map is what a given module makes of the input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.decoder = SimpleNamespace(transpconvs=[], stages=[])

    def encoder(self, volumes: torch.Tensor) -> list[torch.Tensor]:
        return [self.module(volumes)]


# views


@dims
@versions
def test_views_replay_and_leave_the_patch_alone(version, dim):
    _, method = make_stage(version, dim)
    batch = make_batch(dim)
    kept = batch.clone()
    views, again = method.make_views(batch, generators()), method.make_views(batch, generators())
    assert torch.equal(batch, kept)
    other = method.make_views(batch, generators(step=1))
    for name in EquivariantViews.__dataclass_fields__:
        assert torch.equal(getattr(views, name), getattr(again, name)), name
        assert not torch.equal(getattr(views, name), getattr(other, name)), name
    assert views.before.shape == views.warped.shape == batch.shape
    assert views.points_before.shape == (4, 64 // 4, dim)


@dims
def test_a_sample_is_the_same_in_any_batch(dim):
    _, method = make_stage("pix2rep", dim)
    batch = make_batch(dim)
    whole, part = method.make_views(batch, generators()), method.make_views(batch[2:], generators()[2:])
    for name in EquivariantViews.__dataclass_fields__:
        torch.testing.assert_close(getattr(whole, name)[2:], getattr(part, name), atol=1e-5, rtol=1e-5)


@dims
def test_points_lie_inside_of_both_views(dim):
    """The map that moves pixels moves points, and a point whose source lies outside is never drawn."""
    _, method = make_stage("pix2rep", dim, "points_per_image=200")
    for step in range(5):
        views = method.make_views(make_batch(dim), generators(step))
        last = torch.tensor(PATCHES[dim]) - 1
        for points in (views.points_before, views.points_warped):
            assert (points >= -1e-3).all()
            assert (points <= last + 1e-3).all()
        assert torch.equal(views.points_warped, views.points_warped.round())


@dims
def test_identity_gives_the_same_embeddings_to_the_bit(dim):
    """Property 1: without changes both views are the patch, and so are the embeddings at every point."""
    network, method = make_stage("pix2rep", dim, *still(dim))
    views = method.make_views(make_batch(dim), generators())
    assert torch.equal(views.before, views.warped)
    assert torch.equal(views.points_before, views.points_warped)
    before, warped = embed_points(network, method.head, views, "pyramid")
    torch.testing.assert_close(before, warped, atol=1e-6, rtol=0)


@dims
def test_a_pointwise_linear_network_is_equivariant(dim):
    """Property 2: resampling commutes with a linear map of channels, for any rotation, zoom and flip."""
    _, method = make_stage("pix2rep", dim, "intensity_views=", "points_per_image=100")
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dim](CHANNELS, 5, 1)
    views = method.make_views(make_batch(dim), generators())
    assert not torch.allclose(views.before, views.warped)
    before, warped = embed_points(OneMap(conv), nn.Identity(), views, "single")
    torch.testing.assert_close(before, warped, atol=1e-4, rtol=1e-4)


@dims
def test_a_mirrored_kernel_is_equivariant_under_flips(dim):
    """Property 2 for kernels of 3 voxels: points away from the border agree to rounding."""
    axes = ",".join(str(axis) for axis in range(dim))
    _, method = make_stage(
        "pix2rep", dim, *still(dim), f"flip_axes={axes}", "flip_probability=1", "points_per_image=100"
    )
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dim](CHANNELS, 3, 3, padding=1)
    with torch.no_grad():
        conv.weight.add_(conv.weight.flip(tuple(range(2, 2 + dim))).clone())
    views = method.make_views(make_batch(dim), generators())
    assert not torch.equal(views.before, views.warped)
    before, warped = embed_points(OneMap(conv), nn.Identity(), views, "single")
    torch.testing.assert_close(before, warped, atol=1e-5, rtol=1e-5)


@dims
def test_what_is_not_in_both_views_does_not_matter(dim):
    """Property 4: with a pointwise network, what lies outside of the crop may be anything; told from the map alone."""
    _, method = make_stage(
        "pix2rep", dim, "crop_fraction=0.3,0.4", "points_per_image=100", "intensity_views=", "foreground_share=0"
    )
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dim](CHANNELS, 5, 1)
    views = method.make_views(make_batch(dim), generators())
    shown = torch.zeros(4, *PATCHES[dim])
    for sample, corner in itertools.product(range(4), range(2**dim)):
        offset = torch.tensor([(corner >> axis) & 1 for axis in range(dim)])
        index = (views.points_before[sample].floor().long() + offset).clamp_max(torch.tensor(PATCHES[dim]) - 1)
        shown[(sample, *index.clamp_min(0).T)] = 1
    other_patch = make_batch(dim) + 1e3 * (shown[:, None] == 0)
    spoiled = method.make_views(other_patch, generators())
    inside = torch.stack([spoiled.warped[s][(slice(None), *p.long().T)] for s, p in enumerate(spoiled.points_warped)])
    kept = torch.stack([views.warped[s][(slice(None), *p.long().T)] for s, p in enumerate(views.points_warped)])
    assert (shown == 0).any()
    torch.testing.assert_close(inside, kept, atol=1e-3, rtol=1e-4)
    clean, dirty = (embed_points(OneMap(conv), nn.Identity(), each, "single") for each in (views, spoiled))
    for one, other in zip(clean, dirty, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@dims
def test_no_point_comes_from_outside_of_the_patch(dim):
    """Property 4: a turned crop leaves the patch; told from the warped patch of ones, not from the drawn points."""
    turns = "rotation_deg=180" if dim == 2 else "rotation_deg=180,0,0"
    _, method = make_stage("pix2rep", dim, "crop_fraction=0.9,1", turns, "points_per_image=200", "intensity_views=")
    views = method.make_views(torch.ones(4, CHANNELS, *PATCHES[dim]), generators())
    assert (views.warped < 0.5).float().mean() > 0.02
    for sample, points in enumerate(views.points_warped.long()):
        torch.testing.assert_close(views.warped[sample][(0, *points.T)], torch.ones(len(points)), atol=1e-3, rtol=0)


@dims
def test_half_of_the_points_lie_in_the_body(dim):
    """A bright block off the centre: the mask moves with the map, so the points of the patch lie in the block."""
    batch = torch.zeros(4, CHANNELS, *PATCHES[dim])
    block = (Ellipsis, slice(1, 5), slice(2, 8))
    batch[block] = 1.0
    share = float(batch.mean())
    assert share < 0.15
    for preferred, low, high in ((0.5, 0.5, 0.75), (0.0, 0.0, 0.3)):
        overrides = (*still(dim), f"foreground_share={preferred}", "points_per_image=20", "flip_probability=1")
        _, method = make_stage("pix2rep", dim, *overrides)
        found = []
        for step in range(10):
            views = method.make_views(batch, generators(step))
            places = views.points_before.round().long()
            found.append([batch[(sample, 0, *points.T)].mean() for sample, points in enumerate(places)])
        assert low <= float(torch.tensor(found).mean()) <= high


def test_blur_hardly_mixes_thick_slices():
    """Spacing 6 x 1 x 1.5 mm: sigma is the same in mm along all axes, so a sixth of a voxel's along z."""
    _, method = make_stage("pix2rep", 3, "blur_vox=1.2")
    assert intensity_range(method.settings, (6.0, 1.0, 1.5)).blur_vox == pytest.approx((0.2, 1.2, 0.8))
    assert intensity_range(method.settings, (1.0, 1.5)).blur_vox[1:] == pytest.approx((1.2, 0.8))


def test_every_intensity_change_is_a_setting():
    """No default of the views reaches a method unseen: all fields are given, CT's window too."""
    _, method = make_stage("pix2rep", 2, "intensity_views=window", "window=0.1", "window_probability=1")
    ranges = intensity_range(method.settings, (1.0, 1.5))
    assert (ranges.window_std, ranges.window_probability) == (0.1, 1.0)
    source = inspect.getsource(intensity_range)
    assert all(f"{field.name}=" in source for field in fields(IntensityRange))


@pytest.mark.parametrize("override", ["rotation_deg=90", "flip_axes=5", "crop_fraction=0.9,0.2", "intensity_views=foo"])
def test_ranges_that_do_not_fit_the_patch_are_refused_before_training(override):
    with pytest.raises(UserError, match=r"rotation|flip|crop|foo"):
        make_stage("pix2rep", 3, override)


def test_inversion_and_modality():
    """CT has no inversion in its plan, so a view of it is never inverted; MR may be."""
    _, method = make_stage("pix2rep", 2, *still(2)[1:], "intensity_views=inversion", "inversion_probability=1")
    views = method.make_views(make_batch(2), generators())
    correlation = torch.corrcoef(torch.stack([views.before.flatten(), make_batch(2).flatten()]))[0, 1]
    assert correlation < -0.9
    _, method = make_stage("pix2rep", 2, *still(2)[1:], "intensity_views=contrast", "inversion_probability=1")
    views = method.make_views(make_batch(2), generators())
    assert torch.corrcoef(torch.stack([views.before.flatten(), make_batch(2).flatten()]))[0, 1] > 0.9


def test_intensities_of_the_two_views_are_drawn_apart():
    _, method = make_stage("pix2rep", 2, *still(2)[1:])
    views = method.make_views(make_batch(2), generators())
    assert torch.equal(views.points_before, views.points_warped)
    assert not torch.allclose(views.before, views.warped, atol=0.1)


def test_number_of_points():
    _, method = make_stage("pix2rep", 2)
    settings = method.settings
    assert settings.points_per_image == points_of_image(settings, (64, 64)) == 16  # the plan's
    assert points_of_image(settings, (4, 6)) == 6  # a quarter of the voxels
    _, method = make_stage("pix2rep", 2, "points_per_image=9")
    assert points_of_image(method.settings, (64, 64)) == 9
    assert Pix2Rep.defaults.points_per_image * Pix2Rep.defaults.training.batch_size == 1000  # as in the code


@versions
def test_every_image_has_its_points_whatever_the_batch(version):
    """The draws of an image depend neither on the batch nor on the number of processes that share it."""
    whole, half = (make_stage(version, 2, f"batch_size={size}")[1] for size in (4, 2))
    batch = make_batch(2)
    together = whole.make_views(batch, generators())
    assert together.points_warped.shape == (4, 16, 2)
    for start in (0, 2):
        part = half.make_views(batch[start : start + 2], generators()[start : start + 2])
        assert torch.equal(part.points_warped, together.points_warped[start : start + 2])


# features


@dims
@residuals
def test_decoder_maps_are_what_the_segmentation_layers_read(dim, residual):
    network = build_network(architecture(dim, residual, False), CHANNELS, 3, seed=0)
    batch = make_batch(dim)
    maps = decoder_maps(network, batch)
    outputs = network(batch)
    for layer, own, expected in zip(network.decoder.seg_layers, maps[1:], outputs[::-1], strict=True):
        assert torch.equal(layer(own), expected)
    assert torch.equal(maps[0], network.encoder(batch)[-1])
    assert [m.shape[1] for m in maps] == [12, 8, 4]
    assert len(dense_maps(network, batch, "single")) == 1


# loss


@dims
@versions
@residuals
@pytest.mark.parametrize("features", ["single", "pyramid"])
def test_loss_is_the_formula(version, dim, residual, features):
    """The loss in loops, on embeddings made point by point: g on features that are read off the maps by hand."""
    network, method = make_stage(version, dim, f"features={features}", residual=residual)
    views = method.make_views(make_batch(dim), generators())
    loss = sum(method.losses(views, 0.0).losses.values()).item()
    sides = []
    for volumes, points in ((views.before, views.points_before), (views.warped, views.points_warped)):
        maps = decoder_maps(network, volumes)
        maps = maps[-1:] if features == "single" else maps
        rows = []
        for sample in range(4):
            for point in points[sample]:
                rows.append(torch.cat([read_by_hand(m[sample], point, PATCHES[dim]) for m in maps]))
        features_of_points = torch.stack(rows)
        hidden = features_of_points @ method.head.hidden.weight.T
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
        hidden = (hidden * method.head.scale + method.head.shift).clamp_min(0)
        sides.append((hidden @ method.head.project.weight.T + method.head.project.bias).detach())
    if version == "pix2rep":
        assert loss == pytest.approx(nt_xent_by_loops(*sides, 0.53), rel=1e-4)
    else:
        few = [side[:, :6] for side in sides]  # the loops are slow: the first dimensions only
        assert loss == pytest.approx(barlow_twins(*sides, 0.0051).item(), rel=1e-3)
        assert barlow_twins(*few, 0.0051).item() == pytest.approx(barlow_by_loops(*few, 0.0051), rel=1e-4)


def read_by_hand(feature_map: torch.Tensor, point: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    grid = feature_map.shape[1:]
    place = [min(max((float(p) + 0.5) * g / n - 0.5, 0), g - 1) for p, g, n in zip(point, grid, shape, strict=True)]
    total = torch.zeros(feature_map.shape[0])
    for cell in torch.cartesian_prod(*[torch.arange(g) for g in grid]).tolist():
        weight = math.prod(max(0.0, 1 - abs(p - c)) for p, c in zip(place, cell, strict=True))
        if weight > 0:
            total = total + weight * feature_map[(slice(None), *cell)]
    return total


@dims
@versions
def test_gradient_reaches_all_but_the_segmentation_layers(version, dim):
    network, method = make_stage(version, dim)
    sum(method.losses(method.make_views(make_batch(dim), generators()), 0.0).losses.values()).backward()
    reached = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for name, parameter in network.named_parameters():
        if ".seg_layers." in name:
            assert not parameter.requires_grad
            assert parameter.grad is None
        elif not name.endswith("conv.bias"):  # a bias before an instance norm is subtracted again
            assert name in reached, name
    given = {id(p) for group in method.parameter_groups() for p in group.parameters}
    wanted = [p for name, p in network.named_parameters() if ".seg_layers." not in name]
    assert given == {id(p) for p in [*wanted, *method.head.parameters()]}


@versions
def test_both_branches_are_trained(version):
    """Property 7: the gradient of f is not 0 with either branch cut off, and the two parts add up to the whole."""
    parts = []
    for cut in ("before", "warped", None):
        network, method = make_stage(version, 2)
        views = method.make_views(make_batch(2), generators())
        before, warped = embed_points(network, method.head, views, "pyramid")
        before = before.detach() if cut == "before" else before
        warped = warped.detach() if cut == "warped" else warped
        loss = nt_xent(before, warped, 0.53) if version == "pix2rep" else barlow_twins(before, warped, 0.0051)
        loss.backward()
        parts.append(network.encoder.stages[0][0].convs[0].conv.weight.grad.clone())
        if cut is None:
            network.zero_grad()
            sum(method.losses(views, 0.0).losses.values()).backward()
            own = network.encoder.stages[0][0].convs[0].conv.weight.grad
    assert all(part.abs().max() > 1e-6 for part in parts)
    torch.testing.assert_close(parts[0] + parts[1], parts[2], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(own, parts[2], atol=1e-6, rtol=1e-4)


def smooth_batch(batch: int) -> torch.Tensor:
    """Return 2D patches of smooth noise: every place looks different, and a rotated or zoomed copy is recognisable."""
    noise = torch.randn(batch, CHANNELS, 4, 6, generator=torch.Generator().manual_seed(3))
    return nn.functional.interpolate(noise, PATCHES[2], mode="bicubic")


def overfit(version: str, steps: int, *overrides: str) -> tuple[list[float], object]:
    _, method = make_stage(version, 2, *overrides)
    views = method.make_views(smooth_batch(4), generators())
    optimizer = torch.optim.AdamW([p for group in method.parameter_groups() for p in group.parameters], lr=5e-3)
    losses = []
    for _ in range(steps):
        output = method.losses(views, 0.0)
        loss = sum(output.losses.values())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, output


@pytest.mark.nightly
def test_v1_overfits_one_batch_an_order_of_magnitude_below_chance():
    """At temperature 0.1; at the method's 0.53 no embedding can do so (below)."""
    losses, output = overfit("pix2rep", 150, "temperature=0.1")
    chance = math.log(2 * 64 - 1)
    assert losses[0] == pytest.approx(chance, rel=0.35)
    assert losses[-1] < 0.1 * chance
    assert output.monitors["head_retrieval"] > 0.95


def test_floor_of_v1_at_its_own_temperature():
    """Pairs that are equal and spread evenly cost log(1 + (2N - 2) exp(-1/t)) and a bit less: 5.7 of 7.6 for N = 1000."""
    losses, _ = overfit("pix2rep", 150)
    floor = math.log(1 + (2 * 64 - 2) * math.exp(-1 / 0.53))
    assert losses[-1] == pytest.approx(floor, abs=0.15)


@pytest.mark.nightly
def test_v2_overfits_one_batch():
    losses, output = overfit("pix2rep_v2", 150, "embedding_dimensions=16")
    assert losses[0] > 2
    assert losses[-1] < 0.1 * losses[0]
    assert output.monitors["head_retrieval"] > 0.8


# what leaves, and memory


@versions
def test_what_leaves(version):
    network, method = make_stage(version, 3)
    exported = method.exported()
    for name in network.state_dict():
        assert name.startswith(exported.pretrained) == (".seg_layers." not in name), name


def test_no_tensor_of_projected_full_resolution_is_made():
    """What a step keeps for its backward pass grows with the points by what points need, not with the voxels."""

    def kept_bytes(points: int) -> int:
        _, method = make_stage("pix2rep", 3, f"points_per_image={points}", "embedding_dimensions=64")
        views = method.make_views(make_batch(3), generators())
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            method.losses(views, 0.0)
        projected = 8 * 64 * math.prod(PATCHES[3]) * 4
        assert max(sizes.values()) < projected / 4
        return sum(sizes.values())

    grown = (kept_bytes(32) - kept_bytes(8)) / (2 * 4 * (32 - 8))
    # per point: 24 features of all maps at their 8 corners, the head's layers, the embedding, similarities with 256 others
    assert 0 < grown < 4 * 4 * (24 * (8 + 1) + 4 * 256 + 64 + 256)


def test_a_sphere_stays_a_sphere_in_both_views():
    """Property 8: points on a sphere in mm lie on a sphere in mm after the map, whatever the spacing."""
    spacing = torch.tensor((6.0, 1.0, 1.5))
    phi = draw_affine(
        generators(), AffineRange((0.3, 0.3), (180.0, 0.0, 0.0), (0, 1, 2)), PATCHES[3], tuple(spacing.tolist())
    )
    direction = torch.nn.functional.normalize(torch.randn(4, 50, 3, generator=torch.Generator().manual_seed(0)), dim=2)
    centre = torch.tensor(PATCHES[3]) / 2
    points = map_points(centre + 5 * direction / spacing, phi, "to_input")
    middle = map_points(centre.expand(4, 1, 3), phi, "to_input")
    radius = ((points - middle) * spacing).norm(dim=2)
    torch.testing.assert_close(radius, torch.full_like(radius, 5 * 0.3 ** (1 / 3)), rtol=1e-4, atol=1e-4)


@dims
def test_one_process_two_channels_half_precision(dim):
    """Under bfloat16 the loss and the head's statistics are float32, and near those of float32."""
    _, method = make_stage("pix2rep", dim)
    views = method.make_views(make_batch(dim), generators())
    exact = method.losses(views, 0.0).losses["contrast"]
    with torch.autocast("cpu", torch.bfloat16):
        half = method.losses(views, 0.0).losses["contrast"]
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=0.02)


def test_a_large_common_mean_costs_the_head_no_digits_in_mixed_precision():
    """Features with a large common mean: in half precision nothing would be left of what tells points apart."""
    generator = torch.Generator().manual_seed(0)
    features = 100 + 0.1 * torch.randn(200, 6, generator=generator)
    head = PointProjection(6, 8, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(features)
    exact = copy.deepcopy(head).double()
    hidden = exact.hidden(features.double())
    hidden = (hidden - hidden.mean(dim=0)) / (hidden.var(dim=0, unbiased=False) + 1e-5).sqrt()
    expected = exact.project(torch.relu(hidden * exact.scale + exact.shift))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.02)


def test_views_do_not_depend_on_the_network():
    network, method = make_stage("pix2rep", 2)
    before = copy.deepcopy(network.state_dict())
    method.make_views(make_batch(2), generators())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_small_zooms_are_drawn_as_often_as_in_the_code():
    """The code's sides are uniform from 0.33 to 0.95, so 44 % of them are below 0.6."""
    ranges = AffineRange((0.33**2, 0.95**2), uniform_in="side")
    drawn = draw_affine(sample_generators(0, "zoom", 0, range(4000)), ranges, (64, 64), (1.0, 1.0))
    sides = torch.linalg.det(drawn.linear).abs().sqrt()
    assert (sides >= 0.33 - 1e-6).all()
    assert (sides <= 0.95 + 1e-6).all()
    assert float((sides < 0.6).double().mean()) == pytest.approx((0.6 - 0.33) / (0.95 - 0.33), abs=0.03)
