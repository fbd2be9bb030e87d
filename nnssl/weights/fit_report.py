"""Report on how every tensor was transferred when weights were fitted to a network, and whether enough of them were."""

import re
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from nnssl.errors import ArgumentError
from nnssl.log import logger
from nnssl.schema import STRICT
from nnssl.tables import align

Status = Literal["transferred", "adapted", "random", "dropped", "segmentation"]

ENCODER_PARTS = ("encoder.", "eva.", "down_projection.", "transformer.")
"""Prefixes of the parts of the network that methods pass on to fine-tuning."""

COUNTED = ("encoder.", "eva.", "down_projection.")
"""Prefixes of the parts that count for the least share. The transformer of a hybrid network may be missing: unless all of it
is transferred, it has no effect at the start of training."""

LEAST_SHARE = 0.5
"""Default share of the target encoder's parameters that must come from the checkpoint."""

KEPT = "trained with the same labels; nnssl_finetune keeps them, nnU-Net initialises them"
"""Reason of segmentation layers that were transferred."""


@dataclass(frozen=True)
class Fitted:
    """Record of how one tensor was transferred.

    Attributes:
        name: Name of the target's tensor, or of the source's tensor if it was dropped.
        status: ``transferred`` (unchanged), ``adapted`` (to another shape), ``random`` (a seeded initialisation), ``dropped``
            (a tensor of the source with no counterpart in the target), or ``segmentation`` (which nnU-Net initialises).
        values: Number of values in the tensor.
        reason: How the tensor was adapted, or why it was not transferred.
    """

    __pydantic_config__: ClassVar = STRICT

    name: str
    status: Status
    values: int
    reason: str


@dataclass(frozen=True)
class FitReport:
    """Record of how all tensors were transferred."""

    __pydantic_config__: ClassVar = STRICT

    tensors: tuple[Fitted, ...]
    first: str
    """Name of the layer that receives the images."""

    def count(self, *statuses: Status, encoder: bool = False) -> int:
        """Return the number of values in tensors with one of the statuses, in the whole network or in its encoder."""
        return sum(
            each.values
            for each in self.tensors
            if each.status in statuses and (not encoder or each.name.startswith(COUNTED))
        )

    def share(self, encoder: bool = False) -> float:
        """Return the share of the target's parameters that come from the checkpoint, without the segmentation layers."""
        taken = self.count("transferred", "adapted", encoder=encoder)
        return taken / max(taken + self.count("random", encoder=encoder), 1)

    def sees_as_before(self) -> bool:
        """Return whether the layer that receives the images comes from the checkpoint. The later layers need its features."""
        taken = [each.name for each in self.tensors if each.status in ("transferred", "adapted")]
        return f"{self.first}.weight" in taken

    def table(self) -> list[str]:
        """Return a table for the user: how each part of the network was transferred, and why."""
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
            f"of {total:,} parameters: {counts}; {self.share(encoder=True):.1%} of the encoder come from the checkpoint",
        ]

    def plain(self) -> dict[str, Any]:
        """Return the report as JSON-compatible values."""
        return {
            "share": round(self.share(), 6),
            "share_of_encoder": round(self.share(encoder=True), 6),
            "tensors": [asdict(each) for each in self.tensors],
        }


def refuse_below(report: FitReport, least_share: float, what: str, advice: str = "") -> None:
    """Log the table of a report and reject weights of which too few fit.

    Args:
        report: Report of the fit.
        least_share: Share of the target's encoder that must come from the checkpoint; 0 accepts everything.
        what: Name of the checkpoint for the error message.
        advice: Further advice for the user, appended to the error message.

    Raises:
        ArgumentError: If less than ``least_share`` comes from the checkpoint, or its first layer does not.
    """
    for line in report.table():
        logger.info(line)
    share = report.share(encoder=True)
    hint = (
        "the table gives the reasons. Use plans whose network resembles the pretrained one, or plan with "
        f"nnssl_plan_and_preprocess --like{advice}"
    )
    if share < least_share:
        raise ArgumentError(
            f"{what}: only {share:.1%} of the encoder's parameters come from the checkpoint, less than {least_share:.0%}; {hint}",
            "least_share",
        )
    if least_share > 0 and not report.sees_as_before():
        raise ArgumentError(
            f"{what}: the layer that receives the images ({report.first}) stays random, so the other weights are useless; {hint}",
            "least_share",
        )


def _part(name: str) -> str:
    """Return the part of the network under which the table lists a tensor."""
    match = re.match(r"((?:encoder|decoder)\.[a-z_]+(?:\.\d+)?|[a-z_]+)", name)
    return match[1] if match else name
