"""Regions on tiny networks, in 2D and in anisotropic 3D with two channels: which points belong together, and what leaves."""

import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.errors import UserError
from nnssl.methods.regions import Regions, edges_of_patch
from nnssl.methods.settings import resolve_stage
from nnssl.networks.backbone import build_network
from nnssl.views.points import brighter_part
from tests.nnssl.methods.tiny_configuration import make_configuration, planned
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

CHANNELS = 2
SMALL = ("edges_mm=3,6", "reference_points=80", "query_points=40", "regions_per_image=6", "hidden_dimensions=16",
         "embedding_dimensions=8")  # fmt: skip
dims = pytest.mark.parametrize("dim", [2, 3])


def make_stage(dim: int, *overrides: str, residual: bool = False):
    configuration = make_configuration(dim)
    settings, _ = resolve_stage(Regions, planned(configuration), "regions.prototypes", (*SMALL, *overrides))
    network = build_network(architecture(dim, residual, False), CHANNELS, 3, seed=0)
    torch.manual_seed(0)
    return network, Regions(network, settings, configuration)


def make_batch(dim: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, *PATCHES[dim], generator=torch.Generator().manual_seed(3))


def make_supervoxels(dim: int, batch: int = 4) -> torch.Tensor:
    """Columns of 4 voxels along x, or halves of y in every second patch, with numbers of their own in each patch."""
    axes = torch.meshgrid(*(torch.arange(n) for n in PATCHES[dim]), indexing="ij")
    parts = (axes[-1] // 4 + 1, axes[-2] // 6 + 1)
    return torch.stack([parts[sample % 2] + 100 * sample for sample in range(batch)]).int()


def generators(samples: list[int], step: int = 0):
    return sample_generators(0, "regions.prototypes", step, samples)


def views_of(method, dim: int, step: int = 0):
    views = method.make_views(make_batch(dim), generators([0, 1, 2, 3], step))
    return method.partitioned(views, make_supervoxels(dim))


@dims
def test_points_of_both_views_have_the_region_of_their_voxel(dim):
    _, method = make_stage(dim)
    views, parts = views_of(method, dim), make_supervoxels(dim)
    for sample in range(4):
        chosen = parts[sample]

        def number(point, chosen=chosen):
            index = tuple(min(max(int(round(float(at))), 0), n - 1) for at, n in zip(point, chosen.shape, strict=True))
            return int(chosen[index])

        region_of = {}
        for point, region in zip(views.in_reference[sample], views.regions.reference[sample].tolist(), strict=True):
            assert region_of.setdefault(number(point), region) == region
        assert len({each for each in region_of.values() if each >= 0}) == int(views.regions.used[sample].sum())
        for point, region in zip(views.query_in_patch[sample], views.regions.query[sample].tolist(), strict=True):
            assert region == region_of.get(number(point), -1)
    assert (views.regions.query >= 0).float().mean() > 0.5
    assert views.regions.query.shape == (4, 40)
    assert views.regions.reference.shape == (4, 80)


@dims
def test_views_depend_on_their_own_sample_alone(dim):
    _, method = make_stage(dim)
    together = views_of(method, dim)
    alone = method.make_views(make_batch(dim)[2:3], generators([2]))
    alone = method.partitioned(alone, make_supervoxels(dim)[2:3])
    for name in ("reference", "query", "in_reference", "in_query", "query_in_patch", "salt"):
        torch.testing.assert_close(getattr(alone, name), getattr(together, name)[2:3])
    for one, other in zip(alone.regions, together.regions, strict=True):
        assert torch.equal(one, other[2:3])


@dims
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_encoder_decoder_and_head_learn_and_nothing_else(dim, residual):
    network, method = make_stage(dim, residual=residual)
    with torch.no_grad():  # residual blocks start as identities, which stop gradients
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    optimizer = torch.optim.SGD([p for group in method.parameter_groups() for p in group.parameters], 0.1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    output = method.losses(views_of(method, dim), 0.0)
    torch.stack(list(output.losses.values())).sum().backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    optimizer.step()
    prefixes = method.exported().pretrained
    for name, value in network.state_dict().items():
        if name.startswith(prefixes):
            assert not torch.equal(value, before[name]) or name.endswith("bias"), name
        else:
            assert ".seg_layers." in name
            assert torch.equal(value, before[name]), name


@dims
def test_some_steps_find_the_regions(dim):
    _, method = make_stage(dim, "intensity_views=", "flip_probability=0", "edges_mm=3")
    places = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in PATCHES[dim]), indexing="ij")
    ramps = torch.stack([places[-1], places[-2]])
    volumes = torch.stack([ramps, ramps.flip(0)])  # tissue that says where it is
    optimizer = torch.optim.Adam([p for group in method.parameter_groups() for p in group.parameters], 1e-2)
    right = []
    for step in range(80):
        views = method.make_views(volumes, generators([0, 1], step))
        output = method.losses(method.partitioned(views, make_supervoxels(dim, 3)[::2]), 0.0)
        optimizer.zero_grad()
        torch.stack(list(output.losses.values())).sum().backward()
        optimizer.step()
        right.append(output.monitors["head_accuracy"].item())
    assert sum(right[-5:]) > 1.5 * sum(right[:5])


def test_edges_suit_the_patch():
    assert edges_of_patch((128, 128, 128), (1.0, 1.0, 1.0), None) == (16.0, 32.0)
    assert edges_of_patch((96, 96), (4.0, 4.0), None) == (24.0, 48.0)  # at most 48 mm
    assert edges_of_patch((20, 28, 20), (2.0, 2.0, 2.0), None) == (6.0, 10.0)  # at least three voxels
    assert edges_of_patch((4, 128, 128), (10.0, 1.5, 1.5), 0) == (24.0, 48.0)  # thick slices do not count


def test_points_are_kept_where_a_region_is_used():
    """Few regions of many are used; points elsewhere would be computed for nothing."""
    _, method = make_stage(2, "regions_per_image=2", "reference_points=20", "query_points=10", "crop_fraction=1,1")
    views = method.make_views(make_batch(2), generators([0, 1, 2, 3]))
    axes = torch.meshgrid(*(torch.arange(n) for n in PATCHES[2]), indexing="ij")
    parts = (axes[0] // 3 * 10 + axes[1] // 4 + 1).int().expand(4, -1, -1)  # 20 regions of 12 voxels
    found = method.partitioned(views, parts)
    assert found.in_reference.shape == (4, 20, 2)
    assert (found.regions.reference >= 0).float().mean() > 0.5  # a tenth if they were not chosen
    assert (found.regions.query >= 0).float().mean() > 0.5


def test_candidates_keep_their_share_of_the_body():
    _, method = make_stage(2, "reference_points=8", "foreground_share=0.25")
    views = method.make_views(make_batch(2), generators([0, 1, 2, 3]))
    bright = brighter_part(make_batch(2))
    for sample in range(4):
        rows = [bool(bright[sample, int(y), int(x)]) for y, x in views.in_reference[sample].tolist()]
        first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        assert abs(sum(first) - sum(second)) <= 0.35 * len(first)


def test_settings_without_an_edge_are_refused():
    with pytest.raises(UserError, match="edges_mm must be"):
        make_stage(2, "edges_mm=")
