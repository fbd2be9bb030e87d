"""Pretrained weights made to fit a network, tensor by tensor, with a record of what became of each.

Tensors belong together by their names. Stages of an encoder are counted from full resolution and those of a decoder towards
it, so that in networks of different depth a decoder's stage meets the one of its own resolution. What does not fit and has
no faithful way to be made to stays as it was initialised.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nnssl.errors import UserError
from nnssl.export.kernels import ChannelPolicy, fit_input_channels, fit_kernel
from nnssl.export.source import SourceWeights, names_by_tensor
from nnssl.export.target import TargetNetwork
from nnssl.networks.primus import resample_positions
from nnssl.schema import STRICT

Status = Literal["transferred", "adapted", "random", "dropped", "segmentation"]

SEGMENTATION = ".seg_layers."
"""What nnU-Net's loader passes over and starts anew."""

ENCODER = ("encoder.", "eva.", "down_projection.", "transformer.")
"""Prefixes of the parts that methods hand over."""

COUNTED = ("encoder.", "eva.", "down_projection.")
"""Those of which a share is asked for: a transformer at the bottleneck begins by changing nothing, and may be missing."""

POSITIONS = "eva.pos_embed"


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
        widths = [max(len(text[column]) for text in texts) for column in range(4)]
        lines = [
            "  ".join(
                [
                    *(text[column].ljust(widths[column]) for column in (0, 1)),
                    *(text[column].rjust(widths[column]) for column in (2, 3)),
                    text[4],
                ]
            ).rstrip()
            for text in texts
        ]
        total = self.count("transferred", "adapted", "random")
        counts = ", ".join(
            f"{status} {self.count(status) / max(total, 1):.1%}" for status in ("transferred", "adapted", "random")
        )
        return [
            *lines,
            f"of {total:,} parameters: {counts}; of the encoder's, {self.share(encoder=True):.1%} come from the checkpoint",
        ]

    def plain(self) -> dict[str, Any]:
        """Return the report as JSON takes it."""
        return {
            "share": round(self.share(), 6),
            "share_of_encoder": round(self.share(encoder=True), 6),
            "tensors": [asdict(each) for each in self.tensors],
        }


@torch.no_grad()
def fit_weights(source: SourceWeights, target: TargetNetwork, policy: ChannelPolicy | None = None) -> FitReport:
    """Fill a network with pretrained weights.

    Args:
        source: the weights.
        target: its ``network`` is changed in place.
        policy: for other channels than the source's (``fit_input_channels``); None for ``named`` where both sides name the
            same channels in another order, and else ``mean``.

    Returns:
        What became of every tensor of both.

    Raises:
        UserError: the channels cannot be matched by name.
    """
    network = target.network
    stages = _decoder_stages(source.architecture["arch_kwargs"]), _decoder_stages(target.architecture["arch_kwargs"])
    layers = dict(_named_layers(network))
    first = _first_layer(network)
    fitted = []
    taken: set[str] = set()
    for names in names_by_tensor(network.state_dict(keep_vars=True)):
        value = network.state_dict(keep_vars=True)[names[0]]
        if any(SEGMENTATION in f".{name}" for name in names):
            fitted.append(Fitted(names[0], "segmentation", value.numel(), "nnU-Net starts it anew"))
            continue
        found = next((name for name in (_source_name(each, *stages) for each in names) if name in source.tensors), None)
        if found is None:
            fitted.append(_without_source(network, names, value, source))
            continue
        old = source.tensors[found]
        layer = layers.get(names[0].rpartition(".")[0])
        new, how = _fit_tensor(old, value, names, layer, layer is first, source, target, policy)
        if new is None:
            fitted.append(Fitted(names[0], "random", value.numel(), how))
            continue
        taken.add(found)
        value.copy_(new)
        fitted.append(Fitted(names[0], "adapted" if how else "transferred", value.numel(), how))
    for names in names_by_tensor(source.tensors):
        if taken.isdisjoint(names):
            reason = "has no place in the target"
            fitted.append(Fitted(names[0], "dropped", source.tensors[names[0]].numel(), reason))
    return FitReport(tuple(fitted), next(name for name, layer in layers.items() if layer is first))


def _fit_tensor(
    old: Tensor,
    value: Tensor,
    names: tuple[str, ...],
    layer: nn.Module | None,
    is_first: bool,
    source: SourceWeights,
    target: TargetNetwork,
    policy: ChannelPolicy | None,
) -> tuple[Tensor | None, str]:
    """Return the tensor for the target, None if there is none, and what was done to it or why not."""
    if POSITIONS in names:
        return _fit_positions(old, value, source, target)
    how = []
    if is_first and names[0].endswith(".weight"):
        old, what = _fit_channels(old, source, target, policy)
        how += [what] if what else []
    transposed = isinstance(layer, (nn.ConvTranspose2d, nn.ConvTranspose3d))
    convolution = transposed or isinstance(layer, (nn.Conv2d, nn.Conv3d))
    if convolution and old.ndim >= 4 and old.shape[2:] != value.shape[2:] and old.shape[:2] == value.shape[:2]:
        kernel = [*value.shape[2:]]
        if not transposed and _cuts_into_tokens(layer):
            return None, f"tokens of {list(old.shape[2:])} voxels in the source, {kernel} here: no faithful way"
        new = fit_kernel(old, kernel, transposed)
        if new is None:
            return None, f"kernel {list(old.shape[2:])} in the source, {kernel} here: no faithful way"
        how.append(f"kernel {_by(old.shape[2:])} to {_by(kernel)}")
        old = new
    if old.shape != value.shape:
        return None, f"{_by(old.shape)} in the source, {_by(value.shape)} here"
    return old.to(value.dtype), ", ".join(how)


def _fit_channels(
    old: Tensor, source: SourceWeights, target: TargetNetwork, policy: ChannelPolicy | None
) -> tuple[Tensor, str]:
    names, wanted = source.channel_names, target.channel_names
    if policy is None:
        same = names is not None and wanted is not None and sorted(names) == sorted(wanted) and names != wanted
        policy = "named" if same and len(set(names or ())) == len(names or ()) else "mean"
        if not same and old.shape[1] == target.num_channels:
            return old, ""
    try:
        fitted = fit_input_channels(old, target.num_channels, policy, names, wanted)
    except ValueError as error:
        raise UserError(
            f"--input-policy named: {error} (source: {_names(names)}; target: {_names(wanted)}); name them with --channels "
            "as the source does, or take mean or repeat"
        ) from error
    if torch.equal(fitted, old):
        return old, ""
    return fitted, f"{old.shape[1]} to {target.num_channels} channels by {policy}"


def _fit_positions(
    old: Tensor, value: Tensor, source: SourceWeights, target: TargetNetwork
) -> tuple[Tensor | None, str]:
    if old.shape[-1] != value.shape[-1]:
        return None, f"tokens of width {old.shape[-1]} in the source, {value.shape[-1]} here"
    token = getattr(target.network, "down_projection").proj.kernel_size  # noqa: B009  not every network has it
    grid = tuple(n // size for n, size in zip(target.patch_vox, token, strict=True))
    old_token = source.architecture["arch_kwargs"]["patch_embed_size"]
    old_grid = tuple(n // size for n, size in zip(source.patch_vox, old_token, strict=True))
    resampled = resample_positions(old, old_grid, grid)
    return resampled, "" if resampled is old else f"positions of {_by(old_grid)} tokens resampled to {_by(grid)}"


def _without_source(network: nn.Module, names: tuple[str, ...], value: Tensor, source: SourceWeights) -> Fitted:
    """Say what becomes of a tensor that the source lacks: one more residual block begins as one that changes nothing."""
    size = value.numel()
    if any(_begins_block(name, source.tensors) for name in names):
        if any(re.search(r"(\.conv2\.norm\.(weight|bias)|\.gamma_[12])$", name) for name in names):
            value.zero_()
            return Fitted(names[0], "random", size, "one more residual block, which begins by changing nothing")
        return Fitted(names[0], "random", size, "one more residual block")
    return Fitted(names[0], "random", size, "the source has none")


def _begins_block(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is of a residual block in a stage of which the source has fewer blocks, but has some."""
    match = re.match(r"(.*\bblocks\.)(\d+)\.", name)
    return bool(match) and any(each.startswith(f"{match[1]}0.") for each in tensors) if match else False


def _cuts_into_tokens(layer: Any) -> bool:
    return max(layer.stride) > 1 and tuple(layer.stride) == tuple(layer.kernel_size)


def _named_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return network.named_modules(remove_duplicate=False)


def _first_layer(network: nn.Module) -> nn.Module:
    """Return the convolution that sees the images."""
    return next(each for each in network.modules() if isinstance(each, (nn.Conv2d, nn.Conv3d)))


def _decoder_stages(arch_kwargs: Mapping[str, Any]) -> int:
    """Return the number of stages of a U-Net's decoder, of which a checkpoint may hold some only; 0 of a transformer."""
    return int(arch_kwargs["n_stages"]) - 1 if "n_stages" in arch_kwargs else 0


def _source_name(name: str, source_stages: int, target_stages: int) -> str:
    """Return the name that a tensor has in the source, whose decoder may have another number of stages."""
    match = re.match(r"(decoder\.(?:stages|transpconvs)\.)(\d+)(\..*)", name)
    if match is None or not source_stages or not target_stages:
        return name
    return f"{match[1]}{int(match[2]) + source_stages - target_stages}{match[3]}"


def _part(name: str) -> str:
    """Return the part of the network that a tensor is shown under in a table."""
    match = re.match(r"((?:encoder|decoder)\.[a-z_]+(?:\.\d+)?|[a-z_]+)", name)
    return match[1] if match else name


def _by(sizes: Any) -> str:
    return " x ".join(map(str, sizes)) or "one value"


def _names(names: tuple[str, ...] | None) -> str:
    return ", ".join(names) if names else "not named"


def refuse_below(report: FitReport, least_share: float, what: str, say: Callable[[str], None]) -> None:
    """Print a report's table, and refuse weights of which too little arrives.

    Raises:
        UserError: less than ``least_share`` of the target's encoder comes from the checkpoint, or, unless that is 0, its
            first layer does not.
    """
    for line in report.table():
        say(line)
    share = report.share(encoder=True)
    advice = (
        "the table says why. Take a configuration or plans whose network is like the pretrained one, plan with --like, or lower "
        "--least-share"
    )
    if share < least_share:
        raise UserError(
            f"{what}: only {share:.1%} of the encoder's parameters come from the checkpoint, less than {least_share:.0%}; "
            f"{advice}"
        )
    if least_share > 0 and not report.sees_as_before():
        raise UserError(
            f"{what}: the layer that sees the images ({report.first}) stays random, so what follows has no use; {advice} to 0"
        )
