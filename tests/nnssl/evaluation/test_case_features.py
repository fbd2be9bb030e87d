"""Features of whole cases, compared with loops over patches, in 2D and 3D, with several channels."""

import numpy as np
import pytest
import torch

from nnssl.data.case_store import CaseProperties, CaseStore, write_case
from nnssl.evaluation.case_features import CaseReading, case_features, pooled_features
from nnssl.networks.backbone import build_network
from tests.nnssl.weights.tiny_networks import PATCH, architecture

CPU = torch.device("cpu")
SHAPE = (11, 30, 21)
"""Longer than the patch along some axes and shorter along others."""


@pytest.fixture
def case(tmp_path):
    """A case of two channels with its body in one corner."""
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(2, *SHAPE)).astype(np.float32)
    body = np.argwhere(np.ones((5, 12, 10), bool)).astype(np.int16)
    write_case(
        tmp_path, "a", volume, body, CaseProperties(2, SHAPE, 2, (2.5, 1.5, 1.7), (), "d", 0.1, 1.0, None), PATCH[3]
    )
    return CaseStore(tmp_path).case("a")


def make_network(kind, dim, seed=0):
    return build_network(architecture(kind, dim), 2, 2, seed).eval().requires_grad_(False)


def maps_by_hand(network, kind, patch, stages):
    if kind == "primus":
        return [network.encode(patch).transpose(1, 2)]
    maps = network.encoder(patch)
    if "hybrid" in kind:
        maps[2] = network.transformer(maps[2])
    return [maps[stage] for stage in stages]


@pytest.mark.parametrize(("kind", "dim"), [("plain", 2), ("residual", 3), ("hybrid", 2), ("hybrid", 3), ("primus", 3)])
def test_features_are_means_and_maxima_averaged_over_patches(case, kind, dim):
    networks = [make_network(kind, dim, seed) for seed in (0, 1)]
    if "hybrid" in kind:
        for network in networks:
            network.transformer.gate.fill_(1.0)
    stages = () if kind == "primus" else (1, 2)
    reading = CaseReading(tuple(PATCH[dim]), stages, 6, 3)
    found = case_features(networks, case, reading, CPU)
    for network, own in zip(networks, found, strict=True):
        rows = []
        for number in range(6):
            patch = torch.from_numpy(reading.read_patches(case, [number]))
            assert patch.shape == (1, 2, *PATCH[dim])
            row = []
            for each in maps_by_hand(network, kind, patch, stages):
                row += [channel.mean() for channel in each[0]], [channel.max() for channel in each[0]]
            rows.append(torch.stack([value for part in row for value in part]))
        expected = torch.stack(rows).mean(dim=0)
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (2, 72 if kind == "primus" else 2 * (6 + 8))
    assert not np.allclose(*found, atol=1e-2)


def test_patches_lie_in_the_body_and_depend_on_seed_and_number_only(case):
    reading = CaseReading((3, 6, 6), (2,), 16, 0)
    patches = reading.read_patches(case, range(16))
    np.testing.assert_array_equal(reading.read_patches(case, [7, 2]), patches[[7, 2]])
    other = CaseReading((3, 6, 6), (2,), 16, 1).read_patches(case, range(16))
    assert not np.array_equal(patches, other)
    volume = case.read_box((0, 0, 0), SHAPE)
    # the body ends at voxel 5, 12, 10; centres are at most a quarter of a patch beyond it
    near = volume[:, : 5 + 3, : 12 + 5, : 10 + 5]
    windows = np.lib.stride_tricks.sliding_window_view(near, (2, 3, 6, 6)).reshape(-1, 2, 3, 6, 6)
    for patch in patches:
        assert (np.abs(windows - patch).max(axis=(1, 2, 3, 4)) < 1e-6).any()
    assert len({patch.tobytes() for patch in patches}) > 8


def test_slices_are_read_from_the_body(case):
    patches = CaseReading((6, 8), (2,), 9, 0).read_patches(case, range(9))
    assert patches.shape == (9, 2, 6, 8)


def test_pooled_features_do_not_depend_on_the_rest_of_the_batch():
    network = make_network("plain", 2)
    patches = torch.randn(5, 2, *PATCH[2], generator=torch.Generator().manual_seed(0))
    whole = pooled_features(network, patches, (0, 2))
    alone = torch.cat([pooled_features(network, patch[None], (0, 2)) for patch in patches])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)
