"""Pairs of corresponding points in different scans, stored in a file from which the loader draws patches."""

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
    """Pairs of points in different scans.

    Attributes:
        cases: Names of the scans.
        query: Index of the scan of each pair's first point.
        key: Index of the scan of each pair's second point.
        query_vox: Coordinates (z, y, x) of the first point in voxels of the preprocessed case.
        key_vox: Coordinates (z, y, x) of the second point in voxels of the preprocessed case.
        matched: False if there was no reliable match, so that the point comes from the body's box.
    """

    cases: tuple[str, ...]
    query: Int[np.ndarray, " pair"]
    key: Int[np.ndarray, " pair"]
    query_vox: Float[np.ndarray, "pair 3"]
    key_vox: Float[np.ndarray, "pair 3"]
    matched: Bool[np.ndarray, " pair"]

    def of_case(self, case: int) -> Int[np.ndarray, " pair"]:
        """Return the indices of the pairs whose first point lies in a scan."""
        return np.nonzero(self.query == case)[0]


def write_pairs(path: Path, table: PairTable) -> None:
    """Write a table atomically, in a format that cannot run code when it is read."""
    packed = io.BytesIO()
    columns = {name: getattr(table, name) for name in COLUMNS}
    np.savez_compressed(packed, cases=np.array(table.cases), **columns)
    write_atomically(path, lambda file: file.write(packed.getbuffer()))


def read_pairs(path: Path) -> PairTable:
    """Read a table.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            columns = {name: content[name] for name in COLUMNS}
            return PairTable(tuple(content["cases"].tolist()), **columns)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, and it is written again") from error
