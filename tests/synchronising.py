"""Counts where a step would have to wait for a GPU: values that leave it, and sizes that depend on values.

Copies by ``to`` are not counted, because on the CPU one cannot see where they lead.

On a GPU, such an operation holds up the launch of all that follow. On the CPU it costs nothing, so no test of the results notices
it. Tensors that descend from given ones (volumes, weights) count as lying on the device; random draws that are made on the CPU do
not.
"""

import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "bincount",
    "repeat_interleave",
    "_linalg_check_errors",
)
"""Operations that return a value to the CPU, or whose result has a size that depends on values; ``x[mask]`` calls ``nonzero``."""
OWN = ("nnssl", "trainers")


class WaitsFor(TorchDispatchMode):
    """Records every operation of a ``with`` block that would wait for the device.

    Args:
        tensors: Tensors that lie on the device.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.on_device: Any = WeakIdKeyDictionary()
        self.waits: Counter[str] = Counter()
        for tensor in tensors:
            self.on_device[tensor] = True

    def __enter__(self) -> "WaitsFor":
        """Count ``cpu``, ``numpy`` and ``tolist`` too, which are no operations on the CPU."""
        self._methods = {name: getattr(torch.Tensor, name) for name in ("cpu", "numpy", "tolist")}
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, self._counting(name, method))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, method)

    def _counting(self, name: str, method: Any) -> Any:
        def call(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            if tensor in self.on_device:
                self.waits[f"{name} at {_own_place()}"] += 1
            return method(tensor, *args, **options)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        touched = any(leaf in self.on_device for leaf in given)
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            leaf.dtype in (torch.bool, torch.uint8) and leaf in self.on_device for leaf in given[1:]
        )
        if touched and (name in WAITING or masked):
            self.waits[f"{name} at {_own_place()}"] += 1
        result = func(*args, **(kwargs or {}))
        if touched:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.on_device[leaf] = True
        return result


def _own_place() -> str:
    """Return file and line of the project's code that calls."""
    root = Path(__file__).parents[1]
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(root) and path.relative_to(root).parts[0] in OWN:
            return f"{path.relative_to(root)}:{frame.lineno}"
    return "elsewhere"
