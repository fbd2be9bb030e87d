"""Pairs of places of different scans, as a file that the loader draws patches from."""

import io
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, Float, Int

from nnssl.errors import UserError
from nnssl.files import write_atomically

COLUMNS = ("query", "key", "query_vox", "key_vox", "matched")


@dataclass(frozen=True)
class PairTable:
    """Pairs of places.

    Attributes:
        cases: names of the scans.
        query: index of the scan of each pair's first place.
        key: index of the scan of its second.
        query_vox: zyx of the first place, voxels of the preprocessed case.
        key_vox: zyx of the second.
        matched: False where the place comes from the body's box for want of a reliable match.
    """

    cases: tuple[str, ...]
    query: Int[np.ndarray, " pair"]
    key: Int[np.ndarray, " pair"]
    query_vox: Float[np.ndarray, "pair 3"]
    key_vox: Float[np.ndarray, "pair 3"]
    matched: Bool[np.ndarray, " pair"]

    def of_case(self, case: int) -> Int[np.ndarray, " pair"]:
        """Return the pairs whose first place is in a scan."""
        return np.nonzero(self.query == case)[0]


def write_pairs(path: Path, table: PairTable) -> None:
    """Write a table, atomically, without anything that could run code when it is read."""
    packed = io.BytesIO()
    columns = {name: getattr(table, name) for name in COLUMNS}
    np.savez_compressed(packed, cases=np.array(table.cases), **columns)
    write_atomically(path, lambda file: file.write(packed.getbuffer()))


def read_pairs(path: Path) -> PairTable:
    """Read a table.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            columns = {name: content[name] for name in COLUMNS}
            return PairTable(tuple(content["cases"].tolist()), **columns)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, and it is made again") from error
