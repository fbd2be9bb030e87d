"""The names of tensors in a state dict of nnU-Net's networks, which register one tensor under up to four names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

SEGMENTATION = ".seg_layers."
"""Part of the names of the segmentation layers, which nnU-Net's loader skips and initialises randomly."""

HEAD = "decoder.seg_layers."
"""Prefix of the segmentation layers, in nnU-Net's U-Nets and in the networks of ``nnssl.networks``."""

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put before names."""

GATE = "transformer.gate"
"""Weight of the transformer in a hybrid network; 0 in a random initialisation."""


def names_by_tensor(tensors: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Return the names in a state dict, grouped by tensor.

    A conversion to float16 copies a tensor once for every name; such copies are recognised by their names.
    """
    groups: dict[Any, list[str]] = {}
    for name in tensors:
        first = _first_name(name, tensors)
        value = tensors[first]
        key = first if value.numel() == 0 else (value.data_ptr(), value.shape, value.stride(), value.dtype)
        groups.setdefault(key, []).append(name)
    return [tuple(names) for names in groups.values()]


def count_values(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of values in a state dict; a tensor with several names counts once."""
    return sum(tensors[names[0]].numel() for names in names_by_tensor(tensors))


def _first_name(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the first name under which nnU-Net's U-Nets register a tensor if the state dict has it, else the name itself."""
    other = name.removeprefix("decoder.") if name.startswith("decoder.encoder.") else name
    block, middle, rest = other.partition(".all_modules.")
    if middle:
        place, _, parameter = rest.partition(".")
        other = f"{block}.{'conv' if place == '0' else 'norm'}.{parameter}"
    return other if other in tensors and other != name and tensors[other].shape == tensors[name].shape else name
