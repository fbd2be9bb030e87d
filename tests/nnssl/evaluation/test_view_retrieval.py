"""Views show the same tissue at their points, the measure tells good features from none, and the network stays as it was."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from nnssl.data.case_store import CaseProperties, CaseStore, write_case
from nnssl.evaluation.view_retrieval import (
    POINTS,
    Retrieval,
    as_exported,
    draw_view_pairs,
    measure_retrieval,
    stage_maps,
)
from nnssl.networks.backbone import build_network
from nnssl.networks.dense import ENCODER, ENCODER_AND_DECODER
from nnssl.views.points import interpolate_at
from tests.nnssl.methods.tiny_configuration import make_configuration
from tests.nnssl.networks.test_hybrid import architecture
from tests.nnssl.networks.test_primus import architecture as primus

CPU = torch.device("cpu")
SHAPE, SPACING_MM = (10, 30, 26), (2.5, 1.0, 1.5)
PATCHES = {2: (16, 20), 3: (4, 12, 20)}


def make_store(folder, volumes):
    everywhere = np.argwhere(np.ones(SHAPE, bool))[::5].astype(np.int16)
    for number, volume in enumerate(volumes):
        properties = CaseProperties(2, SHAPE, len(volume), SPACING_MM, (), "digest", 1.0, 1.0, None)
        write_case(folder, f"case_{number}", volume, everywhere, properties, (4, 12, 20))
    return CaseStore(folder)


def ramps():
    """A case whose three channels are the coordinates of a voxel, so that a value says where it comes from."""
    return np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in SHAPE), indexing="ij"))


def noise(seed, channels=1):
    """Smooth noise, different everywhere."""
    volume = np.random.default_rng(seed).standard_normal((channels, *SHAPE)).astype(np.float32)
    return volume + np.roll(volume, 1, axis=2) + np.roll(volume, 1, axis=3)


@pytest.mark.parametrize("dim", [2, 3])
def test_points_of_both_views_show_the_same_voxel(tmp_path, dim):
    store = make_store(tmp_path, [ramps()])
    data = replace(make_configuration(dim), intensity_views=(), flip_axes=(-1,))
    pairs = draw_view_pairs(store, store.names, PATCHES[dim], data, 12)
    values = [
        interpolate_at(view, points, PATCHES[dim])[pairs.valid]
        for view, points in ((pairs.first, pairs.points_first), (pairs.second, pairs.points_second))
    ]
    assert pairs.valid.float().mean() > 0.9
    assert not torch.equal(pairs.first, pairs.second)
    assert torch.allclose(*values, atol=1e-2)
    places = pairs.points_first[0]
    assert len({tuple(place) for place in places[pairs.valid[0]].tolist()}) == int(pairs.valid[0].sum())


def test_draw_depends_on_names_only_and_flips_are_the_plans(tmp_path):
    store = make_store(tmp_path, [noise(0), noise(1), noise(2)])
    data = replace(make_configuration(3), intensity_views=("noise", "inversion"), flip_axes=())
    pairs, again = (draw_view_pairs(store, ["case_2", "case_0"], PATCHES[3], data, 6) for _ in range(2))
    for name in ("first", "second", "points_first", "points_second", "valid"):
        assert torch.equal(getattr(pairs, name), getattr(again, name))
    fewer = draw_view_pairs(store, ["case_2", "case_0"], PATCHES[3], data, 3)
    assert torch.equal(fewer.first, pairs.first[:3])


class Voxels(nn.Module):
    """A network of one stage whose map is the image, times a factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([factor]))
        self.decoder = nn.Module()
        self.decoder.stages = nn.ModuleList()
        self.dropout = nn.Dropout(0.5)

    def encoder(self, volumes):
        return [self.dropout(volumes) * self.factor]


def test_voxels_find_their_place_and_constants_do_not(tmp_path):
    """Only ramps: the values of a voxel are its position, so points are found, and crops have different means."""
    store = make_store(tmp_path, [ramps()])
    pairs = draw_view_pairs(
        store, store.names, PATCHES[3], replace(make_configuration(3), intensity_views=(), flip_axes=()), 16
    )
    found = measure_retrieval(Voxels(1.0), pairs, ENCODER, {}, CPU)
    assert set(found) == {"encoder_0"}
    assert found["encoder_0"].points > 0.9
    assert found["encoder_0"].pooled > 0.3
    chance = pairs.chance
    assert chance.pooled == 1 / 16
    assert chance.points == pytest.approx(1 / (16 * POINTS), rel=0.2)
    nothing = measure_retrieval(Voxels(0.0), pairs, ENCODER, {}, CPU)["encoder_0"]
    assert nothing == Retrieval(pytest.approx(chance.pooled), pytest.approx(chance.points))


def test_partners_of_other_patches_are_not_found(tmp_path):
    store = make_store(tmp_path, [ramps()])
    pairs = draw_view_pairs(
        store, store.names, PATCHES[3], replace(make_configuration(3), intensity_views=(), flip_axes=()), 16
    )
    shifted = type(pairs)(
        pairs.first, pairs.second.roll(1, 0), pairs.points_first, pairs.points_second.roll(1, 0), pairs.valid
    )
    found = measure_retrieval(Voxels(1.0), shifted, ENCODER, {}, CPU)["encoder_0"]
    assert found.pooled < 0.2
    assert found.points < 0.1


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_stages_are_those_that_are_pretrained(dim, residual):
    network = build_network(architecture(dim, residual, True), 1, 3, seed=0)
    volumes = torch.randn(2, 1, *PATCHES[dim])
    everything = stage_maps(network, volumes, (*ENCODER_AND_DECODER, "transformer.embed.", "transformer.blocks."))
    assert set(everything) == {"encoder_0", "encoder_1", "encoder_2", "transformer", "decoder_1", "decoder_0"}
    assert set(stage_maps(network, volumes, ENCODER)) == {"encoder_0", "encoder_1", "encoder_2"}
    assert set(stage_maps(network, volumes, ("encoder.stages.0.", "decoder.stages.0."))) == {"encoder_0", "decoder_1"}
    assert everything["decoder_0"].shape[2:] == volumes.shape[2:]
    assert everything["decoder_1"].shape[2:] == everything["encoder_1"].shape[2:]
    logits = network(volumes)
    last = network.decoder.seg_layers[-1](everything["decoder_0"])
    assert torch.allclose(logits[0] if isinstance(logits, list) else logits, last, atol=1e-5)


def test_primus_has_one_stage():
    network = build_network(primus(), 1, 2, seed=0)
    shape = primus()["arch_kwargs"]["input_shape"]
    maps = stage_maps(network.eval(), torch.randn(2, 1, *shape), ("eva.", "down_projection."))
    assert list(maps) == ["encoder_0"]
    assert maps["encoder_0"].shape[2:] == network.grid


def test_network_stays_as_it_was_and_is_measured_as_exported(tmp_path):
    store = make_store(tmp_path, [noise(0), noise(1)])
    pairs = draw_view_pairs(store, store.names, PATCHES[3], make_configuration(3), 8)
    network = build_network(architecture(3, False, True), 1, 3, seed=0)
    network.encoder.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    state = torch.get_rng_state()
    prefixes = (*ENCODER, "transformer.")
    closed = measure_retrieval(network, pairs, prefixes, {}, CPU)
    opened = measure_retrieval(network, pairs, prefixes, {"transformer.gate": 1.0}, CPU)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert closed["transformer"] == closed["encoder_1"]
    assert opened["transformer"] != closed["transformer"]
    with as_exported(network, {"transformer.gate": 1.0}):
        assert float(network.transformer.gate) == 1.0
