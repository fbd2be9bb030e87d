"""Channel gates that tell a shared decoder which transformed version of its input to produce (PCRL)."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnssl.networks.heads import pooled_positions

AttentionKind = Literal["outer", "gate"]
GATE_WIDTH = 256
"""Hidden width of the gate, as in PCRL's code."""


class TransformationAttention(nn.Module):
    """Transformation-conditioned attention: the code of a transformation gates the channels of a feature map.

    Source: Zhou et al., PCRL, ICCV 2021, section 3.2: ``f_p`` is computed from the code, ``f_l`` is the mean of the map; then
    follow their outer product ``M``, ``ReLU(W flat(M))``, a sigmoid, and a convolution of the gated map.
    Deviations:
        * ``W`` has C^3 parameters in the paper, 134 million for 512 channels. Here ``f_p`` and ``f_l`` are projected to
          ``rank`` numbers each before their product.
        * ``f_l`` is the mean of a perceptron at every position, not of the map (``heads.pooled_positions``). Both factors are
          normalised (layer norm), because most gates would otherwise stay at 0.5, where the ReLU has no gradient.
        * ``gate`` is the attention of the authors' code: two linear layers on the code and a sigmoid, without the product, the
          mean of the map and the convolution.

    Args:
        channels: Number of channels of the feature map.
        bits: Number of bits of the code.
        kind: Kind of attention, ``outer`` or ``gate``.
        rank: Length of the product's two factors; not used by ``gate``.
        kernel_size: Kernel size of the convolution, one odd number per axis.
    """

    def __init__(self, channels: int, bits: int, kind: AttentionKind, rank: int, kernel_size: tuple[int, ...]) -> None:
        super().__init__()
        self.kind = kind
        if kind == "gate":
            self.of_code = nn.Sequential(nn.Linear(bits, GATE_WIDTH), nn.ReLU(), nn.Linear(GATE_WIDTH, channels))
            return
        self.of_code = nn.Sequential(nn.Linear(bits, channels), nn.ReLU(), nn.Linear(channels, rank))
        self.of_map = nn.Linear(channels, rank)
        self.norms = nn.ModuleList([nn.LayerNorm(rank), nn.LayerNorm(rank)])
        self.weigh = nn.Linear(rank * rank, channels)
        convolution: Any = {2: nn.Conv2d, 3: nn.Conv3d}[len(kernel_size)]
        self.mix = convolution(channels, channels, kernel_size, padding=tuple(n // 2 for n in kernel_size))

    def gates(
        self, feature_map: Float[Tensor, "batch channel *grid"], code: Float[Tensor, "batch bits"]
    ) -> Float[Tensor, "batch channel"]:
        """Return the factor of every channel: 0.5 to 1 for ``outer``, which has a ReLU before the sigmoid, otherwise 0 to 1.

        It is computed in float32, because pooled maps of different images differ only slightly.
        """
        with torch.autocast(feature_map.device.type, enabled=False):
            if self.kind == "gate":
                return torch.sigmoid(self.of_code(code))
            pooled = pooled_positions(self.of_map, feature_map.float())
            of_code, of_map = self.norms[0](self.of_code(code)), self.norms[1](pooled)
            product = of_code[:, :, None] * of_map[:, None, :]  # (batch, rank, rank)
            return torch.sigmoid(nn.functional.relu(self.weigh(product.flatten(1))))

    def forward(
        self, feature_map: Float[Tensor, "batch channel *grid"], code: Float[Tensor, "batch bits"]
    ) -> Float[Tensor, "batch channel *grid"]:
        """Return the gated map, followed by a convolution for ``outer``."""
        gates = self.gates(feature_map, code)
        gated = feature_map * gates.view(*gates.shape, *(1,) * (feature_map.ndim - 2))
        return gated if self.kind == "gate" else self.mix(gated)
