"""Networks with known features in every voxel, and cases on disk for them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nnssl.data.case_store import CaseProperties, CaseStore, write_case
from nnssl.networks.dense import DenseKind
from nnssl.pictures.dense_network import DenseNetwork

SPACING_MM = (3.0, 1.0, 1.5)
CPU = torch.device("cpu")


class Encoder(nn.Module):
    """Encoder that returns the image, and the image at half the resolution along its last two axes."""

    def forward(self, volumes):
        stride = (1,) * (volumes.ndim - 4) + (2, 2)
        pool = nn.functional.avg_pool2d if volumes.ndim == 4 else nn.functional.avg_pool3d
        return [volumes, pool(volumes, stride) ** 2]


class DropCoarse(nn.Module):
    """Stage that keeps only the skip connection and its square, so that features depend on nothing but the voxel."""

    def forward(self, joined):
        fine = joined[:, joined.shape[1] // 2 :]
        return torch.cat([100 + 7 * fine, fine**2], dim=1)


class Decoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.transpconvs = nn.ModuleList([nn.Upsample(scale_factor=(1,) * (dim - 2) + (2, 2))])
        self.stages = nn.ModuleList([DropCoarse()])


class Pointwise(nn.Module):
    """Network with the features ``(100 + 7 v, v^2)`` of the voxel's channels v; ``pyramid`` adds a coarse map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder(dim)


def make_network(dim: int, tile: Sequence[int], kind: DenseKind = "single") -> DenseNetwork:
    z, y, x = tile
    return DenseNetwork(Pointwise(dim), kind, (z, y, x), dim == 2, CPU)


def single_features(volume: np.ndarray) -> np.ndarray:
    """Return the expected features (z, y, x, channel)."""
    return np.moveaxis(np.concatenate([100 + 7 * volume, volume**2]), 0, -1).astype(np.float64)


def write_cases(folder: Path, volumes: dict[str, np.ndarray], foreground: np.ndarray) -> CaseStore:
    folder.mkdir()
    for name, volume in volumes.items():
        properties = CaseProperties(2, volume.shape[1:], len(volume), SPACING_MM, (), "digest", 0.5, 1.0, None)
        write_case(folder, name, volume, foreground, properties, (8, 8, 8))
    return CaseStore(folder)


def random_volume(seed: int, shape: Sequence[int], channels: int = 3) -> np.ndarray:
    """Return noise that float16 represents exactly."""
    noise = np.random.default_rng(seed).standard_normal((channels, *shape))
    return noise.astype(np.float16).astype(np.float32)
