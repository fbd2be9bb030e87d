"""Names of cases: unique, valid as file names and for nnU-Net, starting with the patient (see ``nnssl.data.patients``)."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence


def clean_name(text: str) -> str:
    """Return a text reduced to letters, digits, ``_``, ``-`` and ``.``; accents are removed, other characters become ``-``."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", plain).strip("_.-")


def name_by_path(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Name files by the last parts of their paths, using the smallest number of parts that makes all names unique.

    Args:
        paths: For each file, the folders below the source and the name without ending; empty parts are ignored.

    Returns:
        Cleaned names in the same order. Names can still be equal if the whole cleaned paths are.
    """
    cleaned = [[part for part in map(clean_name, path) if part] or ["case"] for path in paths]
    for depth in range(1, max(map(len, cleaned), default=1) + 1):
        names = ["_".join(parts[-depth:]) for parts in cleaned]
        if len({name.casefold() for name in names}) == len(names):
            break
    return names if paths else []


def number_equal_names(names: Iterable[str]) -> list[str]:
    """Return the names in the same order; the second occurrence of a name becomes ``NAME_scan-2``, which keeps the patient."""
    used: set[str] = set()
    numbered = []
    for name in names:
        free, number = name, 1
        while free.casefold() in used:  # some file systems ignore case
            number += 1
            free = f"{name}_scan-{number}"
        used.add(free.casefold())
        numbered.append(free)
    return numbered


def subject_labels(identifiers: Iterable[str]) -> dict[str, str]:
    """Return a label of letters and digits for each patient, as in BIDS: case names start with ``sub-LABEL``.

    If identifiers differ only in other characters, a digest is appended to each label.
    """
    labels: dict[str, dict[str, str]] = {}
    for identifier in sorted(set(identifiers)):
        label = re.sub(r"[^A-Za-z0-9]", "", clean_name(identifier)) or "unnamed"
        labels.setdefault(label.casefold(), {})[identifier] = label
    result = {}
    for same in labels.values():
        for identifier, label in same.items():
            digest = hashlib.blake2b(identifier.encode(), digest_size=3).hexdigest() if len(same) > 1 else ""
            result[identifier] = label + digest
    return result


def common_stem(stems: Sequence[str]) -> str:
    """Return the common prefix of the names of a case's files in whole words, or the first name if there is none."""
    words = [re.findall(r"[^_.\s-]+[_.\s-]*", stem) for stem in stems]
    common = ""
    for same in zip(*words, strict=False):
        if len({word.rstrip("_.- ") for word in same}) > 1:
            break
        common += same[0]
    return common.rstrip("_.- ") or stems[0]
