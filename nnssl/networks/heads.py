"""Heads that pretext methods add to a network: projections and token decoders. They are never exported."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnssl.distributed import mean_over_ranks, standardise_over_ranks
from nnssl.networks.recent_statistics import RecentStatistics
from nnssl.networks.tokens import initialise_linear, map_to_tokens, transformer_blocks

HeadNormalisation = Literal["batch", "none"]


def pooled_positions(
    layer: nn.Module, feature_map: Float[Tensor, "batch channel *grid"]
) -> Float[Tensor, "batch hidden"]:
    """Return the mean over all positions after a layer and a ReLU at every position.

    The layer comes before the mean, because instance normalisation in nnU-Net's networks gives every channel of every image the
    same mean. The plain mean of a map therefore says almost nothing about the image, but how channels occur together does.
    """
    return nn.functional.relu(layer(map_to_tokens(feature_map))).mean(dim=1)


class PooledProjection(nn.Module):
    """A perceptron at every position, the mean over positions, and a projection onto the unit sphere.

    Source: He et al., MoCo, CVPR 2020 (pooling, 128 dimensions, unit norm); the hidden layer is MoCo v2's (Chen et al. 2020),
    the normalisation over the batch is that of SimCLR and MoCo v3.
    Deviations: MoCo pools first; here the hidden layer comes before the mean (``pooled_positions``). The normalisation stands
    directly before the last layer and covers earlier vectors if the batch is small (``RecentStatistics``).

    Args:
        channels: Number of channels of the feature map.
        hidden: Width of the hidden layer.
        dimensions: Number of dimensions of the embedding.
        batch_size: Number of samples that are projected at once, over all processes.
        normalisation: ``batch`` to standardise the hidden vector over the batch, ``none`` to leave it as it is.
    """

    def __init__(
        self, channels: int, hidden: int, dimensions: int, batch_size: int, normalisation: HeadNormalisation
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, hidden)
        self.standardise = RecentStatistics(hidden, batch_size) if normalisation == "batch" else nn.Identity()
        self.project = nn.Linear(hidden, dimensions)

    def forward(self, feature_map: Float[Tensor, "batch channel *grid"]) -> Float[Tensor, "batch dimension"]:
        """Return one embedding of unit norm per sample, in float32."""
        return self.embed(self.pool(feature_map))

    def pool(self, feature_map: Float[Tensor, "batch channel *grid"]) -> Float[Tensor, "batch hidden"]:
        """Return the mean over positions after the perceptron; a sample does not depend on the others."""
        # In half precision, the small differences between images would be lost.
        with torch.autocast(feature_map.device.type, enabled=False):
            return pooled_positions(self.hidden, feature_map.float())

    def embed(self, pooled: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch dimension"]:
        """Return the embeddings of pooled vectors of the whole batch."""
        with torch.autocast(pooled.device.type, enabled=False):
            return nn.functional.normalize(self.project(self.standardise(pooled.float())), dim=1)


class PooledAssignment(nn.Module):
    """A perceptron at every position, the mean over positions, and a projection that is standardised over the batch.

    Source: "Pixel-global self-supervised learning with uncertainty-aware context stabilizer" (2022): pooled features of the
    encoder are projected, and a softmax follows; dimensions and depth are not stated.
    Deviations: the hidden layer comes before the mean (``pooled_positions``). The last layer is standardised as by
    ``standardised_rows``, over the batch and, if it is small, over the vectors before it (``RecentStatistics``).

    Args:
        channels: Number of channels of the feature map.
        hidden: Width of the hidden layer.
        dimensions: Number of outputs.
        batch_size: Number of samples of a batch, over all processes.
        length: Root mean square length of a row of logits.
    """

    def __init__(self, channels: int, hidden: int, dimensions: int, batch_size: int, length: float = 1.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, hidden)
        self.project = nn.Linear(hidden, dimensions)
        self.standardise = RecentStatistics(dimensions, batch_size)
        self.length = length

    def forward(self, feature_map: Float[Tensor, "batch channel *grid"]) -> Float[Tensor, "batch dimension"]:
        """Return one row of logits per sample, in float32 throughout."""
        return self.assign(self.pool(feature_map))

    def pool(self, feature_map: Float[Tensor, "batch channel *grid"]) -> Float[Tensor, "batch hidden"]:
        """Return the mean over positions after the perceptron; a sample does not depend on the others."""
        with torch.autocast(feature_map.device.type, enabled=False):
            return pooled_positions(self.hidden, feature_map.float())

    def assign(self, pooled: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch dimension"]:
        """Return the rows of logits, standardised over the whole batch and recent vectors."""
        with torch.autocast(pooled.device.type, enabled=False):
            logits = self.project(pooled)
            own = logits - logits.mean(dim=1, keepdim=True)
            return self.standardise(own) * (self.length / math.sqrt(logits.shape[1]))


class PointAssignment(nn.Module):
    """A perceptron with dropout for the features of points, standardised over all points of the batch.

    Source: as for ``PooledAssignment``; dropout makes the passes of Monte-Carlo dropout differ.
    Deviations: the paper does not say where dropout is applied. Here it acts on the features and on the hidden layer, so that
    the network before the head runs once for all passes.

    Args:
        channels: Number of features of a point.
        hidden: Width of the hidden layer.
        dimensions: Number of outputs.
        dropout: Probability that a value is dropped, in steps of 1/256.
    """

    def __init__(self, channels: int, hidden: int, dimensions: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, hidden)
        self.project = nn.Linear(hidden, dimensions)
        self.dropout = dropout

    def forward(
        self, features: Float[Tensor, "batch points channel"], seeds: Sequence[int] | None = None
    ) -> Float[Tensor, "batch points dimension"]:
        """Return a row of logits for every point, in float32 throughout.

        Args:
            features: Features of the points of each sample.
            seeds: Random seed of each sample's dropout; None for no dropout.
        """
        with torch.autocast(features.device.type, enabled=False):
            hidden = nn.functional.relu(self.hidden(self._drop(features.float(), seeds, 0)))
            logits = self.project(self._drop(hidden, seeds, 1))
            return standardised_rows(logits.flatten(0, 1)).unflatten(0, logits.shape[:2])

    def _drop(self, values: Tensor, seeds: Sequence[int] | None, layer: int) -> Tensor:
        if seeds is None or not self.dropout:
            return values
        dropped = round(self.dropout * 256)
        kept = torch.stack([_random_bytes(values[0], seed + layer) for seed in seeds]) >= dropped
        return values * (256 / (256 - dropped)) * kept


def standardised_rows(logits: Float[Tensor, "row dimension"]) -> Float[Tensor, "row dimension"]:
    """Return logits standardised against collapse: no output can win for all rows, and not all outputs can be equal.

    The mean over the outputs of a row, which does not affect a softmax, is subtracted. Then every output is standardised over
    the rows of all processes and divided by the root of the width, so that rows have a length of about 1. With standardisation
    alone, a head could put all variance into the mean over the outputs and answer every row with a uniform softmax.

    Source: batch normalisation against collapse, as in the Pixel-global paper; none for the rest.
    """
    own = logits - logits.mean(dim=1, keepdim=True)
    # Pooled features of different images differ by some thousandths, so the epsilon must be much smaller.
    return standardise_over_ranks(own, epsilon=1e-10) / math.sqrt(logits.shape[1])


class PointProjection(nn.Module):
    """``g``: a perceptron with one hidden layer and batch normalisation, for the features of points.

    Source: Seince et al., Pix2Rep, MIDL 2024, and the authors' code (hidden width 256, batch normalisation, ReLU).
    Deviations: statistics are always those of the batch, over all processes; running statistics are not needed, because the
    head is discarded.

    Args:
        channels: Number of features of a point.
        hidden: Width of the hidden layer.
        dimensions: Number of dimensions of the embedding.
    """

    def __init__(self, channels: int, hidden: int, dimensions: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, hidden, bias=False)
        self.scale = nn.Parameter(torch.ones(hidden))
        self.shift = nn.Parameter(torch.zeros(hidden))
        self.project = nn.Linear(hidden, dimensions)

    def forward(self, features: Float[Tensor, "points channel"]) -> Float[Tensor, "points dimension"]:
        """Return the embeddings of points, of any scale, in float32.

        The mean of a feature over the points, which the normalisation removes anyway, is subtracted in float32, because in half
        precision the differences from it would be lost.
        """
        features = features.float()
        centred = features - mean_over_ranks(features.mean(dim=0))
        hidden = standardise_over_ranks(self.hidden(centred), scale=self.scale, shift=self.shift)
        return self.project(nn.functional.relu(hidden)).float()


class TokenDecoder(nn.Module):
    """``D_t``: receives the encoded visible tokens and a learned token at every masked position, and predicts all tokens.

    Source: He et al., MAE, CVPR 2022, section 3; Yan et al., RepRec, WACV 2023, section 4.2.

    Args:
        width: Width of the encoded tokens and of the decoder's tokens.
        depth: Number of blocks.
        heads: Number of attention heads.
        channels: Number of values that are predicted for each token.
    """

    def __init__(self, width: int, depth: int, heads: int, channels: int) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = transformer_blocks(width, depth, heads)
        self.predict = nn.Linear(width, channels)
        initialise_linear(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        encoded: Float[Tensor, "batch visible width"],
        visible: Int[Tensor, "batch visible"],
        positions: Float[Tensor, "tokens width"],
    ) -> Float[Tensor, "batch tokens channel"]:
        """Return the prediction for every token; see ``decode`` for the arguments."""
        return self.predict(self.decode(encoded, visible, positions))

    def decode(
        self,
        encoded: Float[Tensor, "batch visible width"],
        visible: Int[Tensor, "batch visible"],
        positions: Float[Tensor, "tokens width"],
    ) -> Float[Tensor, "batch tokens width"]:
        """Return every token as the blocks output it, before the prediction.

        Args:
            encoded: Visible tokens, as the encoder returns them.
            visible: Index of each visible token.
            positions: Position embeddings of all tokens.
        """
        known = self.embed(encoded)
        tokens = self.mask_token.to(known.dtype).expand(len(known), len(positions), -1)
        tokens = tokens.scatter(1, visible[..., None].expand(-1, -1, self.width), known)
        return self.blocks(tokens + positions)


def _random_bytes(like: Tensor, seed: int) -> Tensor:
    """Return uniform bytes of a tensor's shape, eight from each drawn integer, because drawing dominates the cost of dropout."""
    generator = torch.Generator(like.device).manual_seed(seed)
    drawn = torch.randint(-(2**63), 2**63 - 1, (-(-like.numel() // 8),), generator=generator, device=like.device)
    return drawn.view(torch.uint8)[: like.numel()].view(like.shape)
