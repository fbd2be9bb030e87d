"""Names of cases: unique, safe as file names and for nnU-Net, the patient first (see ``nnssl.data.patients``)."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence


def clean_name(text: str) -> str:
    """Return a text with letters, digits, ``_``, ``-`` and ``.`` only; accents are dropped, the rest becomes ``-``."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", plain).strip("_.-")


def name_by_path(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Name files by the last parts of their paths, by as many for all as it takes to tell them apart.

    Args:
        paths: for each file the folders below the source and the name without ending; empty parts are passed over.

    Returns:
        Cleaned names in the same order; two can still be equal where whole paths are.
    """
    cleaned = [[part for part in map(clean_name, path) if part] or ["case"] for path in paths]
    for depth in range(1, max(map(len, cleaned), default=1) + 1):
        names = ["_".join(parts[-depth:]) for parts in cleaned]
        if len({name.casefold() for name in names}) == len(names):
            break
    return names if paths else []


def number_equal_names(names: Iterable[str]) -> list[str]:
    """Return the names in the same order, the second of a name as ``NAME_scan-2``, which is read as the same patient."""
    used: set[str] = set()
    numbered = []
    for name in names:
        free, number = name, 1
        while free.casefold() in used:  # some file systems do not tell a from A
            number += 1
            free = f"{name}_scan-{number}"
        used.add(free.casefold())
        numbered.append(free)
    return numbered


def subject_labels(identifiers: Iterable[str]) -> dict[str, str]:
    """Return a label of letters and digits for each patient, as BIDS has them: ``sub-LABEL`` begins a case's name.

    Patients whose identifiers differ in other characters only get a digest behind the label.
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
    """Return what the names of a case's files begin with in common, in whole words; the first name if nothing."""
    words = [re.findall(r"[^_.\s-]+[_.\s-]*", stem) for stem in stems]
    common = ""
    for same in zip(*words, strict=False):
        if len({word.rstrip("_.- ") for word in same}) > 1:
            break
        common += same[0]
    return common.rstrip("_.- ") or stems[0]
