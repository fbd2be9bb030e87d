"""What Alice puts on tokens: a projection, a predictor, and the attention by which views of other places are compared.

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
    Deviations: Xavier's initial weights; with DINO's small ones tokens of a narrow network come out all but equal.

    Args:
        width: of a token.
        hidden: width of the hidden layers.
        bottleneck: width of what is brought to unit norm.
        dimensions: of the output.
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
    """A perceptron on the student's side, without which equal answers for everything would be the way out.

    Source: BYOL, NeurIPS 2020, on whose loss Alice builds; the paper names no predictor.
    Deviations: layer normalisation in place of batch normalisation.

    Args:
        dimensions: of input and output.
        hidden: width of the hidden layer.
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
    """CASA: visible tokens ask what they want to know, and other tokens answer.

    ``q = LN(V) W_q``, ``k, v = LN(H) W_k, W_v``, ``ATT = softmax(q k' / sqrt(C))``, ``S = zeta(ATT v)``.

    Source: Alice, section 3.3.
    Deviations: no residual from the query, which the code has: with it a value of 0 would make both sides alike. No dropout.

    Args:
        width: of the asking tokens.
        answer_width: of the answering tokens.
        dimensions: of queries, keys, values and output, over all heads.
        heads: of the attention.
        hidden: width of the hidden layer of ``zeta``.
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
        """Return how much each asking token listens to each answering one; rows sum to 1."""
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
        """Return query, key and value, (batch, heads, token, part)."""
        asks, answers = self.norm_query(asking.float()), self.norm_answer(answering.float())
        return self._split(self.query(asks)), self._split(self.key(answers)), self._split(self.value(answers))

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)
