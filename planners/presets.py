"""Memory targets: what a user's machine allows, and which of nnU-Net's planners knows such a machine."""

from dataclasses import dataclass
from typing import Literal

import torch

from nnssl.errors import UserError
from nnssl.log import logger
from nnssl.plan import TransformerSize


@dataclass(frozen=True)
class Preset:
    """A memory target and what follows from it.

    Attributes:
        memory_gb: memory that one training step may take.
        encoder: plain U-Net, or the residual encoder in the size that nnU-Net recommends for this memory.
        base_features: channels of the first stage.
        max_features: largest number of channels in 2D and in 3D.
        transformer: largest transformer of a hybrid network.
        primus: largest Primus.
        largest_batch: no pretext batch grows beyond this.
        epochs_share: share of a method's published epochs.
    """

    memory_gb: float
    encoder: Literal["plain", "residual L", "residual XL"]
    base_features: int
    max_features: tuple[int, int]
    transformer: TransformerSize
    primus: TransformerSize
    largest_batch: int
    epochs_share: float


VIT_SIZES = (
    TransformerSize(width=192, depth=4, heads=3, decoder_depth=2),
    TransformerSize(width=384, depth=8, heads=6, decoder_depth=3),
    TransformerSize(width=384, depth=12, heads=6, decoder_depth=4),
    TransformerSize(width=768, depth=12, heads=12, decoder_depth=4),
)
"""From a tiny transformer to RepRec's ViT-Base with 12 blocks and a decoder of 4 (Dosovitskiy et al. 2021, table 1)."""

PRIMUS_SIZES = (
    TransformerSize(width=192, depth=4, heads=4, decoder_depth=2),
    TransformerSize(width=396, depth=12, heads=6, decoder_depth=2),
    TransformerSize(width=792, depth=12, heads=12, decoder_depth=4),
    TransformerSize(width=864, depth=16, heads=12, decoder_depth=4),
)
"""From a tiny one to Primus S, B and M (Wald et al. 2025, table 1); nnU-Net's own trainers build the last three."""

PRESETS = {
    "cpu": Preset(0.5, "plain", 16, (128, 128), VIT_SIZES[0], PRIMUS_SIZES[0], 16, 0.1),
    "8gb": Preset(8.0, "plain", 32, (512, 320), VIT_SIZES[2], PRIMUS_SIZES[1], 256, 1.0),
    "24gb": Preset(24.0, "residual L", 32, (512, 320), VIT_SIZES[3], PRIMUS_SIZES[2], 256, 1.0),
    "40gb": Preset(40.0, "residual XL", 32, (512, 320), VIT_SIZES[3], PRIMUS_SIZES[3], 256, 1.0),
    "80gb": Preset(80.0, "residual XL", 32, (512, 320), VIT_SIZES[3], PRIMUS_SIZES[3], 256, 1.0),
}


def find_preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        UserError: there is no such preset; names those there are.
    """
    if name not in PRESETS:
        raise UserError(f"--preset {name}: the presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def choose_preset(name: str | None) -> str:
    """Return the name of the preset asked for, or of the one for this machine's GPU, said aloud.

    Raises:
        UserError: there is no such preset.
    """
    if name is not None:
        find_preset(name)
        return name
    memory_gb = torch.cuda.get_device_properties(0).total_memory / 1024**3 if torch.cuda.is_available() else None
    chosen, sentence = preset_for_gpu(memory_gb)
    logger.info(sentence)
    return chosen


def preset_for_gpu(memory_gb: float | None) -> tuple[str, str]:
    """Return the preset for a GPU with this much memory, and the sentence that says so; None without a GPU."""
    if memory_gb is None:
        return "8gb", "no GPU found: planning for a GPU with 8 GB; --preset chooses another target (cpu, 24gb, ...)"
    fitting = [name for name, preset in PRESETS.items() if name != "cpu" and preset.memory_gb <= memory_gb * 1.05]
    chosen = fitting[-1] if fitting else "8gb"
    return chosen, f"GPU with {memory_gb:.0f} GB found: planning for {chosen}; --preset chooses another target"
