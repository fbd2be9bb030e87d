"""Checkpoints: nnU-Net's keys and the key ``nnssl``, with tensors and plain Python only.

``network_weights`` is the complete state of the plan's network under nnU-Net's own names, so ``nnUNetv2_train
-pretrained_weights`` accepts the file as it is. The key ``nnssl`` holds what only pretraining needs (heads, teacher, queue).
Files are written atomically, and nothing in them is executed when they are loaded.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from nnssl.errors import UserError
from nnssl.files import write_atomically
from nnssl.schema import STRICT, check_version, parse

SCHEMA_VERSION = 2
LATEST, FINAL = "checkpoint_latest.pth", "checkpoint_final.pth"
"""nnU-Net's names of the checkpoint that an unfinished run resumes from, and of the one that a finished run writes."""

ACCEPTED = (
    "accepted are checkpoints of nnssl_pretrain, files of nnssl_export, checkpoints of nnUNetv2_train, and checkpoints with an "
    "nnssl_adaptation_plan such as OpenMind's, each as a path, https://... or hf://OWNER/REPO/FILE"
)
"""Formats of weights, for the end of every message that refuses a file."""

NUMBER_KINDS = "?bBhHiIlLqQefd"
"""NumPy's types of the numbers that nnU-Net's logger leaves in a checkpoint."""


@dataclass(frozen=True)
class Provenance:
    """Where the weights of a checkpoint come from, stored in plain Python under ``nnssl.provenance``."""

    __pydantic_config__: ClassVar = STRICT

    nnssl_version: str
    method: str
    stage: str
    dataset_name: str
    plans_name: str
    configuration: str
    plans: dict[str, Any]
    """The whole plans file."""
    dataset_json: dict[str, Any]
    settings: dict[str, Any]
    """The resolved settings of the stage."""
    seed: int
    step: int
    """Optimizer steps taken in this stage."""
    total_steps: int
    finished: bool
    pretrained: tuple[str, ...]
    """Prefixes of the parameters in ``network_weights`` that were pretrained; all others have a seeded initialisation."""
    init: str | None
    """Checkpoint that the stage started from; None for random weights."""
    cases: tuple[str, ...] | None = None
    """Names of the cases that the stage was shown; None for weights that were made elsewhere."""
    case_contents: dict[str, str] | None = None
    """Digests of the images and masks that these cases were preprocessed from; None in files of earlier versions."""
    origin: dict[str, Any] | None = None
    """``spacing_mm``, ``patch_vox``, ``channel_names``, ``plans_name`` and ``configuration`` of the pretraining, for an exported
    file, whose ``plans`` are those of its target; None for other files."""

    def pretrains(self, part: str) -> bool:
        """Return whether a part of the network, such as ``decoder.stages.``, was pretrained, at least partly."""
        return any(part.startswith(prefix) or prefix.startswith(part) for prefix in self.pretrained)

    @property
    def pretrained_parts(self) -> tuple[str, ...]:
        """The prefixes for a reader: ``encoder.stages.0 to 3`` instead of four prefixes."""
        numbers: dict[str, list[int]] = {}
        for prefix in self.pretrained:
            match = re.fullmatch(r"(.*\.)(\d+)\.", prefix)
            numbers.setdefault(match[1] if match else prefix, []).extend([int(match[2])] if match else [])
        return tuple(f"{name}{in_ranges(own)}" for name, own in numbers.items())


def in_ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text, with runs of them as ``0 to 3``; an empty text for none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " and ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def to_plain(value: Any, copied: dict[Any, torch.Tensor] | None = None) -> Any:
    """Return a value with arrays and NumPy scalars replaced by plain Python, and tensors moved to the CPU.

    Names that share a tensor (nnU-Net registers an encoder twice) still share it afterwards.

    Args:
        value: Tensors, arrays, numbers, strings, None and containers of these.
        copied: Tensors moved so far, by memory address and layout; None in the first call.

    Raises:
        TypeError: If the value holds an object of another type, which ``torch.load(weights_only=True)`` would reject.
    """
    copied = {} if copied is None else copied
    if isinstance(value, torch.Tensor):
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() == 0:
            return value.detach().cpu()
        if key not in copied:
            copied[key] = value.detach().cpu()
        return copied[key]
    if value is None or type(value) in (str, int, float, bool, torch.device, torch.Size):
        return value
    if isinstance(value, dict):
        return {to_plain(key): to_plain(entry, copied) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [to_plain(entry, copied) for entry in value]
        return tuple(entries) if isinstance(value, tuple) else entries
    if hasattr(value, "tolist"):
        return to_plain(value.tolist())
    raise TypeError(f"a checkpoint must hold only tensors and plain Python values, got {type(value).__name__}")


def write_checkpoint(path: Path, content: dict[str, Any], provenance: Provenance, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: File to write.
        content: nnU-Net's keys (``network_weights``, ``optimizer_state``, ...).
        provenance: Where the weights come from.
        state: State beside nnU-Net's keys that a pretraining run needs to resume. For exported weights only the online
            probe that chose them, if any.

    Raises:
        UserError: If the file cannot be written.
        TypeError: If a value is neither a tensor nor plain Python.
    """
    section = {"schema_version": SCHEMA_VERSION, "provenance": asdict(provenance), "state": state}
    plain = to_plain({**content, "nnssl": section})
    write_atomically(path, lambda file: torch.save(plain, file))


CONVERSION = "c = torch.load(FILE, weights_only=False); torch.save({k: c[k] for k in ('network_weights', 'init_args')}, NEW_FILE)"
"""Python that leaves tensors and plans only, for a file that nnU-Net's training wrote."""


def _scalar(dtype: np.dtype, data: bytes | None = None) -> Any:
    """Return the number in a pickled NumPy scalar as a plain Python number."""
    if not isinstance(dtype, np.dtype) or dtype.char not in NUMBER_KINDS or not isinstance(data, bytes):
        raise pickle.UnpicklingError(f"GLOBAL numpy.{dtype} scalar is not a number")
    return np.frombuffer(data, dtype, 1)[0].item()


def _named(module: str) -> Any:
    """Return the function for scalars under a name that pickled files call it by."""

    def scalar(dtype: np.dtype, data: bytes | None = None) -> Any:
        return _scalar(dtype, data)

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar


SAFE = (
    _named("numpy.core.multiarray"),  # NumPy 1
    _named("numpy._core.multiarray"),  # NumPy 2
    np.dtype,
    *{type(np.dtype(kind)) for kind in NUMBER_KINDS},
)
"""What a file may name besides tensors and plain values: NumPy's numbers. They arrive as Python's."""


@contextmanager
def _numbers_are_safe() -> Iterator[None]:
    """Let torch's safe loader read NumPy's numbers."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(list(SAFE))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def load_tensors(path: Path) -> dict[str, Any]:
    """Load any checkpoint file without executing anything in it.

    Args:
        path: File written by ``torch.save``.

    Returns:
        The content of the file, with tensors on the CPU.

    Raises:
        UserError: If the file is missing, truncated, not a checkpoint, or holds code instead of tensors.
    """
    try:
        with _numbers_are_safe():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such checkpoint; check the path; {ACCEPTED}") from error
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)", str(error))
        if not zipfile.is_zipfile(path) and named is None:
            raise UserError(
                f"{path}: is not a checkpoint, or has an old format that could run code, so it was not loaded; {ACCEPTED}"
            ) from error
        what = named[1] if named else "Python objects"
        raise UserError(
            f"{path}: holds {what}, which could run code, so it was not loaded; if you trust the file, convert it by "
            f"{CONVERSION}; {ACCEPTED}"
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({reason}); write or copy the file again; {ACCEPTED}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold the dictionary of a checkpoint, got {type(content).__name__}; {ACCEPTED}")
    return content


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Provenance]:
    """Load a checkpoint of nnssl safely.

    Returns:
        The whole content and its provenance.

    Raises:
        UserError: If the file cannot be loaded (see ``load_tensors``) or is not a checkpoint of this version of nnssl.
    """
    content = load_tensors(path)
    return content, parse_provenance(path, content)


def parse_provenance(path: Path, content: dict[str, Any]) -> Provenance:
    """Return where the weights of a loaded checkpoint come from.

    Raises:
        UserError: If the content is not a checkpoint of this version of nnssl.
    """
    section = content.get("nnssl")
    if not isinstance(section, dict) or "network_weights" not in content:
        raise UserError(f"{path}: is not a checkpoint of nnssl; take checkpoint_final.pth of nnssl_pretrain")
    check_version(section, SCHEMA_VERSION, str(path), "pretrain again, or use the version of nnssl that wrote it")
    return parse(Provenance, section.get("provenance"), f"{path}: provenance")
