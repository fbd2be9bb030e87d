"""Presets: memory targets, and the network sizes, batch sizes and training lengths that belong to them."""

from dataclasses import dataclass
from typing import Literal

import torch

from nnssl.errors import ArgumentError
from nnssl.log import logger
from nnssl.plan import TransformerSize


@dataclass(frozen=True)
class Preset:
    """Memory target and the choices that depend on it.

    Attributes:
        memory_gb: Memory in GB that one training step may take.
        encoder: Plain U-Net, or the residual encoder in the size that nnU-Net recommends for this memory.
        base_features: Number of channels in the first stage.
        max_features: Largest number of channels in 2D and in 3D.
        transformer: Size of the largest transformer of a hybrid network.
        primus: Size of the largest Primus.
        step_multiply_adds: Multiply-adds that a pretext step may compute; None for no limit.
        length: Length of the pretext stages, a key of ``LENGTHS``.
    """

    memory_gb: float
    encoder: Literal["plain", "residual L", "residual XL"]
    base_features: int
    max_features: tuple[int, int]
    transformer: TransformerSize
    primus: TransformerSize
    step_multiply_adds: float | None
    length: str

    @property
    def on_gpu(self) -> bool:
        """Whether steps run on a GPU, in mixed precision."""
        return self.step_multiply_adds is None

    @property
    def pretext_memory_gb(self) -> float:
        """Memory in GB that a pretext step may take: that of the GPU less a reserve; on a CPU, time is what limits a step."""
        return (
            round(self.memory_gb * (1 - FRAGMENTS) - CONTEXT_GB, 3)
            if self.on_gpu
            else max(self.memory_gb, CPU_MEMORY_GB)
        )


CONTEXT_GB, FRAGMENTS = 0.5, 0.05
"""Memory in GB of a GPU's context, and share of its memory for fragments."""
CPU_MEMORY_GB = 2.0
"""Memory of a pretext step on a CPU; any machine that can train has it."""
LENGTHS = {"short": 0.1, "medium": 1 / 3, "full": 1.0}
"""Share of a method's published epochs, by the name of the length."""

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
"""From a tiny Primus to Primus S, B and M (Wald et al. 2025, table 1); nnU-Net's own trainers build the last three."""

CPU_STEP = 4e10
"""Multiply-adds of a step of about two seconds on two CPU cores, at 10 to 13 billion per second and core (3D, float32)."""

PRESETS = {
    "cpu": Preset(0.5, "plain", 16, (128, 128), VIT_SIZES[0], PRIMUS_SIZES[0], CPU_STEP, "short"),
    "8gb": Preset(8.0, "plain", 32, (512, 320), VIT_SIZES[2], PRIMUS_SIZES[1], None, "full"),
    "24gb": Preset(24.0, "residual L", 32, (512, 320), VIT_SIZES[3], PRIMUS_SIZES[2], None, "full"),
    "40gb": Preset(40.0, "residual XL", 32, (512, 320), VIT_SIZES[3], PRIMUS_SIZES[3], None, "full"),
    "80gb": Preset(80.0, "residual XL", 32, (512, 320), VIT_SIZES[3], PRIMUS_SIZES[3], None, "full"),
}


def find_preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        ArgumentError: If there is no such preset.
    """
    if name not in PRESETS:
        raise ArgumentError(f"preset must be one of {', '.join(PRESETS)}, got {name}", "preset")
    return PRESETS[name]


def choose_preset(name: str | None) -> str:
    """Return the requested preset, or detect and print the one for this machine's GPU.

    Args:
        name: Name of a preset; None to detect it.

    Raises:
        ArgumentError: If there is no such preset.
    """
    if name is not None:
        find_preset(name)
        return name
    memory_gb = torch.cuda.get_device_properties(0).total_memory / 1024**3 if torch.cuda.is_available() else None
    chosen, sentence = preset_for_gpu(memory_gb)
    logger.info(sentence)
    return chosen


def preset_for_gpu(memory_gb: float | None) -> tuple[str, str]:
    """Return the preset for a GPU and a sentence that explains the choice.

    Args:
        memory_gb: Memory of the GPU in GB; None without a GPU.
    """
    if memory_gb is None:
        return "8gb", "no GPU detected: planning for preset 8gb, a GPU with 8 GB; other presets are cpu, 24gb, ..."
    fitting = [name for name, preset in PRESETS.items() if name != "cpu" and preset.memory_gb <= memory_gb * 1.05]
    chosen = fitting[-1] if fitting else "8gb"
    return chosen, f"GPU with {memory_gb:.0f} GB detected: planning for preset {chosen}"
