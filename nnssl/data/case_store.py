"""Preprocessed cases on disk: compressed, chunked arrays. Reading a patch decompresses only the blocks it overlaps.

A case consists of four files: ``<case>.b2nd`` (voxels: channel, z, y, x), ``learnable/<case>.b2nd`` (mask of the voxels that a
method may learn from: z, y, x), ``<case>_foreground.npy`` (coordinates inside the body) and ``<case>.json``
(``CaseProperties``). The JSON file is written last and deleted first, so a case without it is incomplete. Partitions into
supervoxels, which some methods need, lie in the folder ``supervoxels``. ``nnssl.data.packed_arrays`` says how arrays are packed.
"""

import io
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int

from nnssl import schema
from nnssl.data.packed_arrays import open_array, pack, read_part
from nnssl.errors import UserError
from nnssl.files import write_atomically
from nnssl.schema import STRICT

SCHEMA_VERSION = 2
LEARNABLE = "learnable"
"""Folder in that of the cases with the masks of the voxels that a method may learn from."""
SUPERVOXELS = "supervoxels"
"""Folder in that of the cases with their supervoxels (``nnssl.data.supervoxels``), which only some methods need."""
MAX_OPEN_CASES = 64


@dataclass(frozen=True)
class SourceFile:
    """State of an image file when its case was preprocessed."""

    __pydantic_config__: ClassVar = STRICT

    path: str
    size_bytes: int
    mtime_ns: int
    digest: str = ""
    """Digest of the bytes; empty in cases of earlier versions, of which size and time are compared."""


@dataclass(frozen=True)
class CaseProperties:
    """Properties of a preprocessed case. The existence of their file marks the case as complete."""

    __pydantic_config__: ClassVar = STRICT
    __schema_version__: ClassVar = SCHEMA_VERSION

    schema_version: int
    shape: tuple[int, int, int]
    """Shape (z, y, x) of the preprocessed volume in voxels."""
    channels: int
    spacing_mm: tuple[float, float, float]
    """Spacing (z, y, x) of the preprocessed volume in mm."""
    sources: tuple[SourceFile, ...]
    """Image files in channel order."""
    digest: str
    """Digest of everything that determines the voxels; if it differs, the case is outdated."""
    foreground_share: float
    """Fraction of the volume inside the body, between 0 and 1."""
    learnable_share: float
    """Fraction of the volume that a method may learn from, between 0 and 1."""
    exclude_mask: SourceFile | None
    """The user's mask of what is excluded; None if there was none."""
    orientation: str = ""
    """Directions in which z, y and x of the volume increase, such as ``SPL``; empty if unknown, as in older cases."""


def write_case(
    folder: Path,
    name: str,
    volume: Float32[np.ndarray, "channel z y x"],
    foreground_vox: Int[np.ndarray, "point 3"],
    properties: CaseProperties,
    patch_size: Sequence[int],
    learnable: Bool[np.ndarray, "z y x"] | None = None,
) -> None:
    """Write one preprocessed case, replacing an existing case of the same name.

    Args:
        folder: Existing folder.
        name: Name of the case.
        volume: Normalised intensities. They are stored as float16, which keeps 11 significant bits.
        foreground_vox: Coordinates (z, y, x) of voxels inside the body; may be empty.
        properties: Properties of the case; they must match the volume.
        patch_size: Typical patch to read in voxels, (z, y, x), or (y, x) for single slices.
        learnable: Mask of the voxels that a method may learn from; None for all.

    Raises:
        ValueError: If values are not finite or exceed the range of float16 (65504), if coordinates lie outside the
            volume, or if the properties do not match it.
        UserError: If a file cannot be written.
    """
    shape = tuple(volume.shape[1:])
    if (properties.channels, properties.shape) != (len(volume), shape):
        raise ValueError(
            f"properties of case {name} must match its volume {volume.shape}, got {properties.channels} channel(s) of "
            f"shape {properties.shape}"
        )
    if foreground_vox.size and (foreground_vox.min() < 0 or np.any(foreground_vox.max(axis=0) >= shape)):
        raise ValueError(f"foreground coordinates of case {name} lie outside its volume {shape}")
    if learnable is None:
        learnable = np.ones(shape, dtype=bool)
    if learnable.shape != shape:
        raise ValueError(f"mask of case {name} must have the shape of its volume {shape}, got {learnable.shape}")
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(volume, dtype=np.float16)
    if not np.isfinite(half).all():
        worst = float(np.abs(volume).max())
        raise ValueError(f"case {name} has values that float16 cannot represent (largest {worst:g}, limit 65504)")
    packed, packed_mask = pack(half, patch_size), pack(np.ascontiguousarray(learnable).view(np.uint8), patch_size)
    coordinates = foreground_vox.reshape(-1, 3).astype(np.int16 if max(shape) <= np.iinfo(np.int16).max else np.int32)
    unpacked = io.BytesIO()
    np.save(unpacked, coordinates)
    remove_case(folder, name)
    (folder / LEARNABLE).mkdir(exist_ok=True)
    write_atomically(folder / f"{name}.b2nd", lambda file: file.write(packed))
    write_atomically(folder / LEARNABLE / f"{name}.b2nd", lambda file: file.write(packed_mask))
    write_atomically(folder / f"{name}_foreground.npy", lambda file: file.write(unpacked.getbuffer()))
    schema.write(folder / f"{name}.json", properties)


def remove_case(folder: Path, name: str) -> None:
    """Delete the files of a case, starting with the one that marks it as complete."""
    for ending in (".json", ".b2nd", "_foreground.npy"):
        (folder / f"{name}{ending}").unlink(missing_ok=True)
    (folder / LEARNABLE / f"{name}.b2nd").unlink(missing_ok=True)
    for path in (folder / SUPERVOXELS).glob("*"):
        (path / f"{name}.b2nd").unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of killed processes. No process may be writing to the folder at the same time."""
    for path in (*folder.glob(".*.tmp"), *(folder / LEARNABLE).glob(".*.tmp")):
        path.unlink(missing_ok=True)


def complete_cases(folder: Path) -> list[str]:
    """Return the sorted names of the complete cases in a folder, or an empty list if the folder does not exist."""
    if not folder.is_dir():
        return []
    # hidden names are temporary files
    return sorted(
        entry.name[:-5] for entry in os.scandir(folder) if entry.name.endswith(".json") and entry.name[0] != "."
    )


def read_properties(folder: Path, name: str) -> CaseProperties:
    """Return the properties of a complete case.

    Raises:
        UserError: If the case is incomplete or was written by another version.
    """
    return schema.read(CaseProperties, folder / f"{name}.json", "preprocessed case")


class StoredCase:
    """A preprocessed case, whose files are opened on first access.

    Attributes:
        name: Name of the case.
        folder: Folder of its files.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name

    @cached_property
    def _array(self) -> Any:
        path = self.folder / f"{self.name}.b2nd"
        try:
            return open_array(path)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} cannot be opened ({error}); run nnssl_plan_and_preprocess again") from error

    @cached_property
    def _learnable(self) -> Any:
        path = self.folder / LEARNABLE / f"{self.name}.b2nd"
        try:
            return open_array(path)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} cannot be opened ({error}); run nnssl_plan_and_preprocess again") from error

    @cached_property
    def _supervoxels(self) -> dict[Path, Any]:
        return {}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (z, y, x) in voxels."""
        return self._array.shape[1:]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self._array.shape[0]

    @cached_property
    def properties(self) -> CaseProperties:
        """Properties of the case, read from its file."""
        return read_properties(self.folder, self.name)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Spacing (z, y, x) in mm."""
        return self.properties.spacing_mm

    @property
    def orientation(self) -> str:
        """Directions in which z, y and x increase, such as ``SPL``; empty if unknown."""
        return self.properties.orientation

    @cached_property
    def foreground_vox(self) -> Int[np.ndarray, "point 3"]:
        """Coordinates (z, y, x) of a few thousand voxels inside the body, in random order; empty if none were found."""
        path = self.folder / f"{self.name}_foreground.npy"
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); run nnssl_plan_and_preprocess again") from error

    @property
    def body_vox(self) -> Int[np.ndarray, "point 3"]:
        """``foreground_vox``, or the centre of the volume if that is empty, so there is always at least one point."""
        return self.foreground_vox if len(self.foreground_vox) else np.array([self.shape]) // 2

    def read_box(self, lower_vox: Sequence[int], size_vox: Sequence[int]) -> Float32[np.ndarray, "channel z y x"]:
        """Read a box of voxels.

        Args:
            lower_vox: First voxel (z, y, x) of the box; may be negative.
            size_vox: Size (z, y, x) in voxels, at least 1 per axis; the box may extend beyond the volume.

        Returns:
            Intensities (channel, z, y, x), zero outside the volume.

        Raises:
            UserError: If the file is damaged or missing.
        """
        box = np.zeros((self.channels, *size_vox), dtype=np.float32)
        parts = self._overlap(lower_vox, size_vox)
        if parts is None:
            return box
        inside, place = parts
        path = self.folder / f"{self.name}.b2nd"
        voxels = read_part(self._array, inside, path, "delete it and preprocess again")
        # torch converts float16 about twenty times as fast as numpy, but its threads hang in a forked process;
        # workers of a DataLoader have only one thread
        if torch.get_num_threads() == 1:
            torch.from_numpy(box)[place].copy_(torch.from_numpy(voxels))
        else:
            box[place] = voxels
        return box

    def read_learnable(self, lower_vox: Sequence[int], size_vox: Sequence[int]) -> Bool[np.ndarray, "z y x"]:
        """Read which voxels of a box a method may learn from; false outside the volume.

        Args:
            lower_vox: As in ``read_box``.
            size_vox: As in ``read_box``.

        Raises:
            UserError: If the file is damaged or missing.
        """
        box = np.zeros(tuple(size_vox), dtype=bool)
        parts = self._overlap(lower_vox, size_vox)
        if parts is not None:
            inside, place = parts
            path = self.folder / LEARNABLE / f"{self.name}.b2nd"
            box[place[1:]] = read_part(self._learnable, inside[1:], path, "delete it and preprocess again")
        return box

    def read_supervoxels(
        self, folder: Path, lower_vox: Sequence[int], size_vox: Sequence[int]
    ) -> Int[np.ndarray, "z y x"]:
        """Read the supervoxels of a box; 0 outside the volume.

        Args:
            folder: Folder of the partition, as from ``nnssl.data.supervoxels.folder_of``.
            lower_vox: As in ``read_box``.
            size_vox: As in ``read_box``.

        Raises:
            UserError: If the file is damaged, missing, or belongs to other voxels.
        """
        path = folder / f"{self.name}.b2nd"
        advice = "delete it and start nnssl_pretrain again"
        if path not in self._supervoxels:
            try:
                array = open_array(path)
                digest = array.schunk.vlmeta["digest"]
            except (OSError, RuntimeError, KeyError) as error:
                raise UserError(f"{path} cannot be opened ({error}); {advice}") from error
            if digest != self.properties.digest:
                raise UserError(f"{path}: was computed from other voxels than those of case {self.name}; {advice}")
            self._supervoxels[path] = array
        box = np.zeros(tuple(size_vox), dtype=np.int32)
        parts = self._overlap(lower_vox, size_vox)
        if parts is not None:
            inside, place = parts
            box[place[1:]] = read_part(self._supervoxels[path], inside[1:], path, advice)
        return box

    def _overlap(
        self, lower_vox: Sequence[int], size_vox: Sequence[int]
    ) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """Return the part of a stored array that a box covers, and its place in the box; None if they do not overlap."""
        inside, place = [slice(None)], [slice(None)]
        for lower, size, extent in zip(lower_vox, size_vox, self.shape, strict=True):
            start, stop = max(lower, 0), min(lower + size, extent)
            if start >= stop:
                return None
            inside.append(slice(start, stop))
            place.append(slice(start - lower, stop - lower))
        return tuple(inside), tuple(place)


class CaseStore:
    """The complete cases of a folder.

    The store can be pickled and used after a fork. At most ``MAX_OPEN_CASES`` cases are open in a process at a time.

    Attributes:
        folder: Folder of the cases.
        names: Sorted names of the cases that were complete when the store was created.

    Args:
        folder: Folder of the cases.
        max_open: Largest number of cases kept open.

    Raises:
        UserError: If the folder has no complete case.
    """

    def __init__(self, folder: Path, max_open: int = MAX_OPEN_CASES) -> None:
        self.folder = Path(folder)
        self.names = complete_cases(self.folder)
        self._max_open = max_open
        self._open: OrderedDict[str, StoredCase] = OrderedDict()
        if not self.names:
            raise UserError(f"{self.folder} contains no preprocessed case; run nnssl_plan_and_preprocess first")

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def restricted_to(self, names: Sequence[str]) -> "CaseStore":
        """Return a store of the same folder with only these cases, in sorted order."""
        other = CaseStore(self.folder, self._max_open)
        other.names = sorted(names)
        return other

    def case(self, name: str) -> StoredCase:
        """Return a case by name.

        Raises:
            UserError: If the store has no such case.
        """
        if name not in self._open:
            if not (self.folder / f"{name}.json").exists():
                raise UserError(f"{self.folder} has no complete case {name!r}; run nnssl_plan_and_preprocess again")
            self._open[name] = StoredCase(self.folder, name)
        self._open.move_to_end(name)
        if len(self._open) > self._max_open:
            self._open.popitem(last=False)
        return self._open[name]
