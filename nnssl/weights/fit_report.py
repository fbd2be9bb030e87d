"""What became of every tensor when weights were made to fit a network, and whether enough of them arrived."""

import re
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from nnssl.errors import ArgumentError
from nnssl.log import logger
from nnssl.schema import STRICT
from nnssl.tables import align

Status = Literal["transferred", "adapted", "random", "dropped", "segmentation"]

ENCODER_PARTS = ("encoder.", "eva.", "down_projection.", "transformer.")
"""Prefixes of the parts that methods hand over."""

COUNTED = ("encoder.", "eva.", "down_projection.")
"""Those of which a share is asked for. The transformer of a hybrid network may be missing: unless it comes whole it begins by
changing nothing."""

LEAST_SHARE = 0.5
"""Of the parameters of the target's encoder that have to come from the checkpoint."""


@dataclass(frozen=True)
class Fitted:
    """What became of one tensor.

    Attributes:
        name: of the target's tensor, or of the source's that was dropped.
        status: ``transferred`` as it was, ``adapted`` to another shape, ``random`` (a seeded initialisation), ``dropped``
            (the source's, with no place in the target), ``segmentation`` (nnU-Net starts these anew).
        values: how many it holds.
        reason: how it was adapted, or why it was not taken.
    """

    __pydantic_config__: ClassVar = STRICT

    name: str
    status: Status
    values: int
    reason: str


@dataclass(frozen=True)
class FitReport:
    """What became of all tensors."""

    __pydantic_config__: ClassVar = STRICT

    tensors: tuple[Fitted, ...]
    first: str
    """Name of the layer that sees the images."""

    def count(self, *statuses: Status, encoder: bool = False) -> int:
        """Return the values of tensors with one of these statuses, of all or of the target's encoder."""
        return sum(
            each.values
            for each in self.tensors
            if each.status in statuses and (not encoder or each.name.startswith(COUNTED))
        )

    def share(self, encoder: bool = False) -> float:
        """Return the share of the target's parameters that come from the checkpoint, segmentation layers aside."""
        taken = self.count("transferred", "adapted", encoder=encoder)
        return taken / max(taken + self.count("random", encoder=encoder), 1)

    def sees_as_before(self) -> bool:
        """Whether the layer that sees the images comes from the checkpoint: on another one, what follows is worth nothing."""
        taken = [each.name for each in self.tensors if each.status in ("transferred", "adapted")]
        return f"{self.first}.weight" in taken

    def table(self) -> list[str]:
        """Return lines for the user: what became of each part of the network, and why."""
        rows: dict[tuple[str, Status, str], list[Fitted]] = {}
        for each in self.tensors:
            rows.setdefault((_part(each.name), each.status, each.reason), []).append(each)
        texts = [("part", "", "tensors", "parameters", "")]
        for (part, status, reason), entries in rows.items():
            texts.append((part, status, str(len(entries)), f"{sum(each.values for each in entries):,}", reason))
        total = self.count("transferred", "adapted", "random")
        counts = ", ".join(
            f"{status} {self.count(status) / max(total, 1):.1%}" for status in ("transferred", "adapted", "random")
        )
        return [
            *align(texts, left=(0, 1, 4)),
            f"of {total:,} parameters: {counts}; of the encoder's, {self.share(encoder=True):.1%} come from the checkpoint",
        ]

    def plain(self) -> dict[str, Any]:
        """Return the report as JSON takes it."""
        return {
            "share": round(self.share(), 6),
            "share_of_encoder": round(self.share(encoder=True), 6),
            "tensors": [asdict(each) for each in self.tensors],
        }


def refuse_below(report: FitReport, least_share: float, what: str, advice: str = "") -> None:
    """Print a report's table, and refuse weights of which too little arrives.

    Args:
        report: of the fit.
        least_share: of the target's encoder that has to come from the checkpoint; 0 lets everything through.
        what: the checkpoint.
        advice: more that a user can do about it.

    Raises:
        ArgumentError: less than ``least_share`` comes from the checkpoint, or its first layer does not.
    """
    for line in report.table():
        logger.info(line)
    share = report.share(encoder=True)
    hint = f"the table says why. Take plans whose network is like the pretrained one, or plan with --like{advice}"
    if share < least_share:
        raise ArgumentError(
            f"{what}: only {share:.1%} of the encoder's parameters come from the checkpoint, less than {least_share:.0%}; {hint}",
            "least_share",
        )
    if least_share > 0 and not report.sees_as_before():
        raise ArgumentError(
            f"{what}: the layer that sees the images ({report.first}) stays random, so what follows has no use; {hint}",
            "least_share",
        )


def _part(name: str) -> str:
    """Return the part of the network that a tensor is shown under in a table."""
    match = re.match(r"((?:encoder|decoder)\.[a-z_]+(?:\.\d+)?|[a-z_]+)", name)
    return match[1] if match else name
