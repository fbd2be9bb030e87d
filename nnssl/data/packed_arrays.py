"""Compressed, chunked arrays on disk, of which parts are read.

Voxels of cases are stored as float16 and compressed by LZ4 at level 5 after a byte shuffle, in blocks of 4 x 64 x 64 voxels.
These choices were measured on one core with abdominal CT (BTCV) resampled to 192 x 308 x 308 voxels. The shuffle saves
10 % of the disk space and costs 0.8 ms for a patch of 64 x 128 x 128 voxels. ZSTD saves another 25 %, but reading takes
1.6 times as long. Blocks from 16 x 16 x 16 to 4 x 64 x 64 voxels read such a patch equally fast; flat blocks read a
slice of 256 x 256 three times as fast as cubes, so 2D and 3D configurations can share a folder.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from nnssl.errors import UserError

BLOCK_VOX = (4, 64, 64)
SLICES_PER_CHUNK = 16
"""Chunk thickness for 2D patches. Blocks are the unit of reading; one chunk per slice would only make writing slower."""

COMPRESSION = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}

# blosc2 cannot map files into memory on Windows
MAPPING: dict[str, str] = {} if os.name == "nt" else {"mmap_mode": "r"}


def pack(array: np.ndarray, patch_size: Sequence[int]) -> bytes:
    """Compress an array (z, y, x) or (channel, z, y, x), of which patches of a typical size will be read."""
    block, chunk = layout(array.shape[-3:], patch_size)
    channel = (1,) * (array.ndim - 3)
    packed = blosc2.asarray(array, chunks=(*channel, *chunk), blocks=(*channel, *block), cparams=COMPRESSION)
    return bytes(packed.to_cframe())


def layout(shape: Sequence[int], patch_size: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a block, the unit that is read and decompressed, and of a chunk, the unit that is written.

    Args:
        shape: Shape (z, y, x) of the volume in voxels.
        patch_size: Patch size in voxels, (z, y, x), or (y, x) for single slices.

    Returns:
        Block and chunk, both (z, y, x) in voxels. A chunk consists of whole blocks unless the volume ends first.
    """
    flat = len(patch_size) == 2
    patch = (SLICES_PER_CHUNK, *patch_size) if flat else tuple(patch_size)
    widest = (1, *BLOCK_VOX[1:]) if flat else BLOCK_VOX
    block = tuple(min(wide, extent) for wide, extent in zip(widest, shape, strict=True))
    chunk = tuple(
        min(extent, -(-wanted // unit) * unit) for extent, wanted, unit in zip(shape, patch, block, strict=True)
    )
    return block, chunk


def open_array(path: Path) -> Any:
    """Open a stored array to read parts of it.

    Raises:
        OSError: If the file cannot be opened.
        RuntimeError: If it is no such array.
    """
    return blosc2.open(str(path), mode="r", dparams={"nthreads": 1}, **MAPPING)


def read_part(array: Any, part: tuple[slice, ...], path: Path, advice: str) -> Any:
    """Read a part of an open array.

    Raises:
        UserError: If the file is damaged; the message ends with the advice.
    """
    try:
        return array[part]
    except RuntimeError as error:
        raise UserError(f"{path} is damaged ({error}); {advice}") from error
