"""Checkpoints: nnU-Net's keys and one more, ``nnssl``; tensors and plain Python only, written atomically, loaded safely.

``network_weights`` is the complete state of the plan's network under nnU-Net's own names, so the file itself is what
``nnUNetv2_train -pretrained_weights`` takes. What only pretraining needs (heads, teacher, queue) stands under ``nnssl``.
"""

import pickle
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from nnssl.errors import UserError
from nnssl.files import write_atomically
from nnssl.schema import STRICT, check_version, parse

SCHEMA_VERSION = 2
LATEST, FINAL = "checkpoint_latest.pth", "checkpoint_final.pth"
"""Names of nnU-Net: what an unfinished run goes on from, and what a finished one leaves."""


@dataclass(frozen=True)
class Provenance:
    """Where the weights of a checkpoint come from; stands under ``nnssl.provenance`` as plain Python."""

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
    """Prefixes of the parameters in ``network_weights`` that were pretrained; all others are a seeded initialisation."""
    init: str | None
    """Checkpoint that the stage started from, None for random weights."""
    cases: tuple[str, ...] | None = None
    """Names of the cases that the stage was shown; None for weights that were made elsewhere."""
    origin: dict[str, Any] | None = None
    """Of an exported file, whose plan is another's: ``spacing_mm``, ``patch_vox`` and ``channel_names`` of the pretraining, and
    its ``plans_name`` and ``configuration``; None where ``plans`` says it."""

    def pretrains(self, part: str) -> bool:
        """Whether a part of the network, such as ``decoder.stages.``, was pretrained, or some of it."""
        return any(part.startswith(prefix) or prefix.startswith(part) for prefix in self.pretrained)


def to_plain(value: Any, copied: dict[Any, torch.Tensor] | None = None) -> Any:
    """Return a value with arrays and numpy scalars replaced by plain Python and tensors moved to the CPU.

    Names that share one tensor (nnU-Net registers an encoder twice) still share it afterwards.

    Args:
        value: tensors, arrays, numbers, strings, None and containers of these.
        copied: tensors moved so far, by what they are; None to begin.

    Raises:
        TypeError: something else is inside, which ``torch.load(weights_only=True)`` would refuse.
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
    raise TypeError(f"a checkpoint holds tensors and plain Python only, not {type(value).__name__}")


def write_checkpoint(path: Path, content: dict[str, Any], provenance: Provenance, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file.
        content: nnU-Net's keys (``network_weights``, ``optimizer_state``, ...).
        provenance: where the weights come from.
        state: what a pretraining run needs to go on beside nnU-Net's keys; empty for weights that only leave.

    Raises:
        UserError: the file cannot be written.
        TypeError: something is neither a tensor nor plain Python.
    """
    section = {"schema_version": SCHEMA_VERSION, "provenance": asdict(provenance), "state": state}
    plain = to_plain({**content, "nnssl": section})
    write_atomically(path, lambda file: torch.save(plain, file))


def load_tensors(path: Path) -> dict[str, Any]:
    """Load any checkpoint file without executing anything in it.

    Args:
        path: a file written by ``torch.save``.

    Returns:
        Its content, tensors on the CPU.

    Raises:
        UserError: the file is missing, cut short, no checkpoint, or holds code instead of tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such checkpoint") from error
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"{path}: is no checkpoint, or an old one that could run code when loaded; it was not loaded"
            ) from error
        raise UserError(
            f"{path}: holds Python objects that could run code when loaded, so it was not loaded; "
            "use a checkpoint that contains tensors and plain values only"
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: is not a readable checkpoint ({reason}); write or copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Provenance]:
    """Load a checkpoint of nnssl safely.

    Returns:
        The whole content and its provenance.

    Raises:
        UserError: as ``load_tensors``; or the file is not a checkpoint of this nnssl.
    """
    content = load_tensors(path)
    return content, parse_provenance(path, content)


def parse_provenance(path: Path, content: dict[str, Any]) -> Provenance:
    """Return where the weights of a loaded checkpoint come from.

    Raises:
        UserError: it is not a checkpoint of this nnssl.
    """
    section = content.get("nnssl")
    if not isinstance(section, dict) or "network_weights" not in content:
        raise UserError(f"{path}: is no checkpoint of nnssl pretraining; take checkpoint_final.pth of nnssl_pretrain")
    check_version(section, SCHEMA_VERSION, str(path), "pretrain again, or use the version of nnssl that wrote it")
    return parse(Provenance, section["provenance"], f"{path}: provenance")
