"""Settings of an export."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nnssl.weights.fit_report import LEAST_SHARE
from nnssl.weights.kernels import ChannelPolicy

Format = Literal["nnunet", "hub", "encoder"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class ExportSettings:
    """Settings of ``export``.

    Attributes:
        for_plans: Plans file, or data set whose plans to use; None for the plan that the weights were pretrained with.
        plans_name: Which plans of that data set.
        configuration: Configuration of the plans; None for the one that the weights were pretrained with, if the plans have it.
        channels: Names of the target's channels, or their number as a single text; None for those of its ``dataset.json``.
        policy: How to fit the stem to other input channels (``fit_input_channels``); None to choose automatically.
        trainer: A trainer of nnU-Net that has a network of its own, such as ``nnUNet_Primus_S_Trainer``.
        form: ``nnunet`` writes one file for ``-pretrained_weights``, ``hub`` a folder to upload, ``encoder`` only the encoder.
        out: File or folder to write; None for one in the working folder.
        least_share: Share of the target encoder's parameters that must come from the checkpoint, 0 to 1.
        licence: Licence of the weights, for ``hub`` and ``encoder``.
        results: Fine-tuning results for the hub's model card.
        seed: Random seed for the parameters that stay random.
    """

    for_plans: str | None = None
    plans_name: str | None = None
    configuration: str | None = None
    channels: Sequence[str] | None = None
    policy: ChannelPolicy | None = None
    trainer: str | None = None
    form: Format = "nnunet"
    out: Path | None = None
    least_share: float = LEAST_SHARE
    licence: str = "unknown"
    results: Sequence[Mapping[str, Any]] = ()
    seed: int = 0
