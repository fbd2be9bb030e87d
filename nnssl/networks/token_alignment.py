"""Alice's heads on tokens: a projection, a predictor, and the attention through which token features are compared (CASA).

Source: Jiang et al., Anatomical Invariance Modeling and Semantic Alignment for Self-supervised Learning in 3D Medical Image
Analysis (Alice), ICCV 2023.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nnssl.networks.tokens import initialise_linear


class TokenProjection(nn.Module):
    """``phi``, ``psi``: three linear layers, a bottleneck of unit norm, and a last layer whose weights have unit norm.

    Source: Alice, section 3.2, which takes it from DINO (Caron et al., ICCV 2021).
    Deviations: Xavier initialisation; with DINO's small weights, tokens of a narrow network come out nearly equal.

    Args:
        width: Width of a token.
        hidden: Width of the hidden layers.
        bottleneck: Width of the bottleneck, which is normalised.
        dimensions: Number of dimensions of the output.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, dimensions: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last = nn.Linear(bottleneck, dimensions, bias=False)
        initialise_linear(self)

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens dimension"]:
        """Return the projection of every token, in float32 throughout."""
        with torch.autocast(tokens.device.type, enabled=False):
            unit = F.normalize(self.layers(tokens.float()), dim=2)
            return F.linear(unit, F.normalize(self.last.weight, dim=1))


class Predictor(nn.Module):
    """A perceptron on the student's side, without which equal answers for all inputs would minimise the loss.

    Source: BYOL, NeurIPS 2020, on whose loss Alice builds; Alice's paper does not mention a predictor.
    Deviations: layer normalisation instead of batch normalisation.

    Args:
        dimensions: Number of dimensions of input and output.
        hidden: Width of the hidden layer.
    """

    def __init__(self, dimensions: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dimensions, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, dimensions)
        )

    def forward(self, rows: Float[Tensor, "*rows dimension"]) -> Float[Tensor, "*rows dimension"]:
        """Return the prediction of every row, in float32 throughout."""
        with torch.autocast(rows.device.type, enabled=False):
            return self.layers(rows.float())


class ConditionalAlignment(nn.Module):
    """CASA: an attention in which visible tokens are the queries and all tokens of a view are the keys and values.

    ``q = LN(V) W_q``, ``k, v = LN(H) W_k, W_v``, ``ATT = softmax(q k' / sqrt(C))``, ``S = zeta(ATT v)``.

    Source: Alice, section 3.3.
    Deviations: unlike the code, there is no residual from the query, because values of 0 would then make both sides equal. There
    is no dropout.

    Args:
        width: Width of the asking tokens (queries).
        answer_width: Width of the answering tokens (keys and values).
        dimensions: Number of dimensions of queries, keys, values and output, over all heads.
        heads: Number of attention heads.
        hidden: Width of the hidden layer of ``zeta``.
    """

    def __init__(self, width: int, answer_width: int, dimensions: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_answer = nn.LayerNorm(width), nn.LayerNorm(answer_width)
        self.query = nn.Linear(width, dimensions, bias=False)
        self.key = nn.Linear(answer_width, dimensions, bias=False)
        self.value = nn.Linear(answer_width, dimensions, bias=False)
        self.zeta = nn.Sequential(nn.Linear(dimensions, hidden), nn.GELU(), nn.Linear(hidden, dimensions))
        initialise_linear(self)

    def attention(
        self, asking: Float[Tensor, "batch visible width"], answering: Float[Tensor, "batch tokens answer"]
    ) -> Float[Tensor, "batch heads visible tokens"]:
        """Return the attention of each asking token to each answering one; rows sum to 1."""
        query, key, _ = self._projected(asking, answering)
        return (query @ key.transpose(2, 3) / math.sqrt(query.shape[3])).softmax(dim=3)

    def forward(
        self, asking: Float[Tensor, "batch visible width"], answering: Float[Tensor, "batch tokens answer"]
    ) -> Float[Tensor, "batch visible dimension"]:
        """Return the answer for each asking token, in float32 throughout."""
        with torch.autocast(asking.device.type, enabled=False):
            query, key, value = self._projected(asking, answering)
            heard = F.scaled_dot_product_attention(query, key, value)  # (batch, heads, visible, part)
            return self.zeta(heard.transpose(1, 2).flatten(2))

    def _projected(self, asking: Tensor, answering: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value (batch, heads, token, part)."""
        asks, answers = self.norm_query(asking.float()), self.norm_answer(answering.float())
        return self._split(self.query(asks)), self._split(self.key(answers)), self._split(self.value(answers))

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)
