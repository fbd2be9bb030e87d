"""Fitting of pretrained weights to a network, tensor by tensor, with a record of each.

Tensors are matched by their names. Encoder stages are counted from full resolution, decoder stages towards it. In networks of
different depth, decoder stages are therefore matched by resolution. A tensor that cannot be fitted faithfully keeps its
initialisation.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnssl.errors import ArgumentError
from nnssl.networks.primus_positions import POSITIONS, resample_positions
from nnssl.weights.fit_report import KEPT, FitReport, Fitted
from nnssl.weights.kernels import CHANNEL_POLICIES, ChannelPolicy, fit_input_channels, fit_kernel
from nnssl.weights.opened_checkpoint import OpenedCheckpoint
from nnssl.weights.target import TargetNetwork
from nnssl.weights.tensor_names import GATE, SEGMENTATION, names_by_tensor

TRANSFORMER = "transformer."


@torch.no_grad()
def fit_weights(source: OpenedCheckpoint, target: TargetNetwork, policy: ChannelPolicy | None = None) -> FitReport:
    """Fill a network with pretrained weights.

    Args:
        source: Checkpoint with the weights.
        target: Network to fill; its ``network`` is changed in place.
        policy: Policy for the input channels (``fit_input_channels``). None for ``named`` if both sides name their channels and
            have some in common; otherwise channels are kept if their number is equal, else ``mean`` is used.

    Returns:
        A record of every tensor of both sides.

    Raises:
        UserError: If the source has no tensors to transfer.
        ArgumentError: If the channels cannot be matched by name, or the policy is unknown.
    """
    check_policy(policy)
    network = target.network
    stages = _decoder_stages(source.architecture["arch_kwargs"]), _decoder_stages(target.architecture["arch_kwargs"])
    layers = dict(network.named_modules(remove_duplicate=False))
    first = next(each for each in network.modules() if isinstance(each, (nn.Conv2d, nn.Conv3d)))
    state = network.state_dict(keep_vars=True)
    fitted = []
    taken: set[str] = set()
    head = source.head_for(target.dataset_json) if stages[0] == stages[1] else {}
    for names in names_by_tensor(state):
        value = state[names[0]]
        if any(SEGMENTATION in f".{name}" for name in names):
            kept = head.get(names[0])
            keeps = kept is not None and kept.shape == value.shape
            if keeps:
                value.copy_(kept)
            fitted.append(Fitted(names[0], "segmentation", value.numel(), KEPT if keeps else "initialised by nnU-Net"))
            continue
        there = [name for name in (_source_name(each, *stages) for each in names) if name in source.tensors]
        if not there:
            fitted.append(_without_source(names, value, source))
            continue
        layer = layers.get(names[0].rpartition(".")[0])
        new, how = _fit_tensor(source.tensors[there[0]], value, names, layer, layer is first, source, target, policy)
        if new is None:
            fitted.append(Fitted(names[0], "random", value.numel(), how))
            continue
        taken.update(there)
        value.copy_(new)
        fitted.append(Fitted(names[0], "adapted" if how else "transferred", value.numel(), how))
    fitted = _close_gate(fitted, state, source, target)
    for names in names_by_tensor(source.tensors):
        if taken.isdisjoint(names):
            reason = "has no counterpart in the target"
            fitted.append(Fitted(names[0], "dropped", source.tensors[names[0]].numel(), reason))
    return FitReport(tuple(fitted), next(name for name, layer in layers.items() if layer is first))


def check_policy(policy: str | None) -> None:
    """Check that a policy for input channels exists, or is None.

    Raises:
        ArgumentError: If it does not.
    """
    if policy is not None and policy not in CHANNEL_POLICIES:
        raise ArgumentError(f"policy must be one of {', '.join(CHANNEL_POLICIES)}, got {policy}", "policy")


def _fit_tensor(
    old: Tensor,
    value: Tensor,
    names: tuple[str, ...],
    layer: nn.Module | None,
    is_first: bool,
    source: OpenedCheckpoint,
    target: TargetNetwork,
    policy: ChannelPolicy | None,
) -> tuple[Tensor | None, str]:
    """Return the tensor for the target, or None if it cannot be fitted, and how it was fitted or why it was not."""
    if POSITIONS in names:
        return _fit_positions(old, value, source, target)
    other = f"{_by(old.shape)} in the source, {_by(value.shape)} here"
    how = []
    if is_first and names[0].endswith(".weight"):
        old, what = _fit_channels(old, source, target, policy)
        how += [what] if what else []
    transposed = isinstance(layer, (nn.ConvTranspose2d, nn.ConvTranspose3d))
    convolution = transposed or isinstance(layer, (nn.Conv2d, nn.Conv3d))
    if convolution and old.ndim >= 4 and old.shape[2:] != value.shape[2:] and old.shape[:2] == value.shape[:2]:
        kernel = [*value.shape[2:]]
        if not transposed and _cuts_into_tokens(layer):
            sizes = f"tokens of {_by(old.shape[2:])} voxels in the source, {_by(kernel)} here"
            return None, f"{sizes}: no faithful conversion"
        new = fit_kernel(old, kernel, transposed)
        if new is None:
            return None, f"kernel {_by(old.shape[2:])} in the source, {_by(kernel)} here: no faithful conversion"
        how.append(f"kernel {_by(old.shape[2:])} to {_by(kernel)}")
        old = new
    if old.shape != value.shape:
        return None, other
    return old.to(value.dtype), ", ".join(how)


def _fit_channels(
    old: Tensor, source: OpenedCheckpoint, target: TargetNetwork, policy: ChannelPolicy | None
) -> tuple[Tensor, str]:
    """Return the first layer's weights for the target's images, with 0 for the labels that a cascade appends to them."""
    names, wanted = source.channel_names, target.channel_names
    labels = old.shape[1] - source.num_channels
    images, behind = old[:, : source.num_channels], target.num_inputs - target.num_channels
    if policy is None:
        policy = "named" if _share_names(names, wanted) else "mean"
        if policy == "mean" and source.num_channels == target.num_channels:
            policy = None
    fitted, how = images, []
    if policy is not None:
        try:
            fitted = fit_input_channels(images, target.num_channels, policy, names, wanted)
        except ValueError as error:
            raise ArgumentError(
                f"policy named: {error} (source: {_names(names)}; target: {_names(wanted)}); name the target's channels as in "
                "the source, or choose mean or repeat",
                "policy",
            ) from error
        if not torch.equal(fitted, images):
            how.append(f"{source.num_channels} to {target.num_channels} channels by {policy}")
    if behind != labels:
        how.append(f"{behind} inputs from the previous stage start at 0")
        fitted = torch.cat([fitted, fitted.new_zeros(len(fitted), behind, *fitted.shape[2:])], dim=1)
    elif labels:
        fitted = torch.cat([fitted, old[:, source.num_channels :]], dim=1)
    return fitted, ", ".join(how)


def _share_names(names: tuple[str, ...] | None, wanted: tuple[str, ...] | None) -> bool:
    """Return whether both sides name their channels uniquely and have a name in common, regardless of case."""
    if names is None or wanted is None:
        return False
    theirs, ours = ({name.casefold() for name in each} for each in (names, wanted))
    return len(theirs) == len(names) and len(ours) == len(wanted) and bool(theirs & ours)


def _fit_positions(
    old: Tensor, value: Tensor, source: OpenedCheckpoint, target: TargetNetwork
) -> tuple[Tensor | None, str]:
    if old.shape[-1] != value.shape[-1]:
        return None, f"tokens of width {old.shape[-1]} in the source, {value.shape[-1]} here"
    token = target.network.get_submodule("down_projection.proj").kernel_size
    assert isinstance(token, tuple)
    grid = tuple(n // size for n, size in zip(target.patch_vox, token, strict=True))
    old_token = source.architecture["arch_kwargs"]["patch_embed_size"]
    old_grid = tuple(n // size for n, size in zip(source.patch_vox, old_token, strict=True))
    if math.prod(old_grid) != old.shape[1]:
        expected = f"{_by(old_grid)} expected from its patch and tokens"
        return None, f"{old.shape[1]} positions in the source, {expected}: no faithful conversion"
    resampled = resample_positions(old, old_grid, grid)
    return resampled, "" if resampled is old else f"positions of {_by(old_grid)} tokens resampled to {_by(grid)}"


def _close_gate(
    fitted: list[Fitted], state: Mapping[str, Tensor], source: OpenedCheckpoint, target: TargetNetwork
) -> list[Fitted]:
    """Close the gate of a hybrid network's transformer unless all of it is transferred and it is on the same stage.

    With a closed gate the transformer has no effect at the start of training.
    """
    parts = [each for each in fitted if each.name.startswith(TRANSFORMER)]
    stages = [each.architecture["arch_kwargs"].get("token_stage") for each in (source, target)]
    # A tensor that the source did not train either does not count as missing.
    whole = all(each.status != "random" or each.name in source.seeded for each in parts)
    if not parts or (stages[0] == stages[1] and whole):
        return fitted
    state[GATE].zero_()
    reason = "the transformer is not transferred completely, so it has no effect at the start"
    return [Fitted(GATE, "random", each.values, reason) if each.name == GATE else each for each in fitted]


def _without_source(names: tuple[str, ...], value: Tensor, source: OpenedCheckpoint) -> Fitted:
    """Return the record of a tensor that the source lacks. An additional residual block starts as the identity."""
    blocks = [match for match in (re.match(r"(.*\bblocks\.)(\d+)\.", name) for name in names) if match]
    theirs = {f"{match[1]}{number}." for match in blocks for number in (0, match[2])}
    present = {start for start in theirs if any(name.startswith(start) for name in source.tensors)}
    scale = any(re.search(r"\.gamma_[12]$", name) for name in names)
    if blocks and len(present) == len(theirs) and scale:
        value.fill_(1.0)
        return Fitted(names[0], "adapted", value.numel(), "the source has no layer scale, which equals a scale of 1")
    if blocks and present and len(present) < len(theirs):
        if scale or any(re.search(r"\.conv2\.norm\.(weight|bias)$", name) for name in names):
            value.zero_()
            reason = "additional residual block, which starts as the identity"
            return Fitted(names[0], "random", value.numel(), reason)
        return Fitted(names[0], "random", value.numel(), "additional residual block")
    reason = "not pretrained in the source" if source.seeded.intersection(names) else "not in the source"
    return Fitted(names[0], "random", value.numel(), reason)


def _cuts_into_tokens(layer: Any) -> bool:
    return max(layer.stride) > 1 and tuple(layer.stride) == tuple(layer.kernel_size)


def _decoder_stages(arch_kwargs: Mapping[str, Any]) -> int:
    """Return the number of stages of a U-Net's decoder, of which a checkpoint may hold only some; 0 for a transformer."""
    return int(arch_kwargs["n_stages"]) - 1 if "n_stages" in arch_kwargs else 0


def _source_name(name: str, source_stages: int, target_stages: int) -> str:
    """Return the name of a tensor in the source, whose decoder may have another number of stages."""
    match = re.match(r"(decoder\.(?:stages|transpconvs)\.)(\d+)(\..*)", name)
    if match is None or not source_stages or not target_stages:
        return name
    return f"{match[1]}{int(match[2]) + source_stages - target_stages}{match[3]}"


def _by(sizes: Any) -> str:
    return " x ".join(map(str, sizes)) or "one value"


def _names(names: tuple[str, ...] | None) -> str:
    return ", ".join(names) if names else "not named"
