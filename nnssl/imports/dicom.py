"""Grouping of DICOM files in a folder into series that form a volume; all other files are rejected with a reason.

A series consists of all files with one Series Instance UID, wherever they lie. Its slices are ordered by their positions
along the normal of the slices, as in GDCM. The slices must form a regular, right-angled grid, so that SimpleITK's geometry
of the series is correct for every voxel.
"""

import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnssl.data.case_error import CaseError
from nnssl.data.dicom_series import SCHEMA_VERSION, DicomSeries, Slice
from nnssl.errors import ArgumentError
from nnssl.imports.case_names import clean_name, subject_labels
from nnssl.imports.dicom_slices import PARALLEL, SliceHeader, is_dicom, read_slice
from nnssl.imports.sources import Candidate, Choices, Found, choose_modalities, walk_files

MIN_SLICES = 5
"""Default of the smallest number of slices in a series."""

CHANNEL_OF_MODALITY = {"CT": "CT", "MR": "MRI", "PT": "PET"}

TOLERANCE_MM = 0.02
"""Smallest tolerance for slice distances, since positions are often stored with two decimals."""
TOLERANCE = 0.02
"""Tolerance for slice distances, as a fraction of the usual distance."""
LARGEST_TILT_DEG = 0.5
"""Largest angle between the normal of the slices and the line through their first voxels; a larger one is a gantry tilt."""


def find_series(source: Path, choices: Choices) -> Found:
    """Find the DICOM series in a folder; each one that forms a volume is a case with one channel.

    Cases are named ``sub-PATIENT[_ses-DATE]_DESCRIPTION_series-NUMBER``. Without a patient identifier, the folder directly
    below the source identifies the patient.

    Raises:
        ArgumentError: If there are several modalities and none was chosen, or if several were chosen as channels.
    """
    if len(choices.modalities) > 1 and not choices.mixed:
        raise ArgumentError(
            "modalities must be a single one for DICOM, whose series have different grids and cannot be channels, "
            f"got {' '.join(choices.modalities)}; choose one or set mixed",
            "modalities",
            "mixed",
        )
    found = Found()
    volumes = {}
    for uid, slices in _collect_slices(source, found).items():
        try:
            volumes[uid] = order_slices(_drop_copies(slices, found), choices.min_slices or MIN_SLICES)
        except CaseError as error:
            found.refuse(error.file, f"contains series {_title(slices[0])}, which {error.reason}")
    counts = Counter(slices[0].modality for slices in volumes.values())
    wanted = choose_modalities(counts, choices, source) if volumes else ()
    taken = {}
    for uid, slices in volumes.items():
        first = slices[0]
        if first.modality not in wanted:
            found.refuse(
                first.file.parent, f"contains series {_title(first)}, whose modality {first.modality} was not chosen"
            )
        elif choices.pattern is not None and not fnmatch.fnmatchcase(first.description, choices.pattern):
            found.refuse(
                first.file.parent,
                f"contains series {_title(first)}, which does not match the pattern {choices.pattern}",
            )
        else:
            taken[uid] = slices
    left = {slices[0].modality for slices in taken.values()}
    found.channel_names = (CHANNEL_OF_MODALITY[min(left)],) if len(left) == 1 else ("mixed",)
    found.candidates = _name_series(taken, source)
    return found


def _collect_slices(source: Path, found: Found) -> dict[str, list[SliceHeader]]:
    """Return the readable slices below a folder by series, and record all other files."""
    series: dict[str, list[SliceHeader]] = defaultdict(list)
    for file in walk_files(source):
        if found.refuse_name(file):
            continue
        if file.name == "DICOMDIR" or not is_dicom(file):
            found.passed_over[file.suffix or file.name] += 1
            continue
        try:
            header = read_slice(file)
        except CaseError as error:
            found.refuse(error.file, error.reason)
        else:
            series[header.series_uid].append(header)
    return series


def _drop_copies(slices: Sequence[SliceHeader], found: Found) -> list[SliceHeader]:
    """Return the slices without copies, which are rejected."""
    first_with: dict[str, SliceHeader] = {}
    for header in slices:
        # without an identifier, which some anonymisers remove, copies cannot be recognised
        same = first_with.setdefault(header.instance_uid or str(header.file), header)
        if same is not header:
            found.refuse(header.file, f"is the same slice (SOP instance) as {same.file}")
    return list(first_with.values())


def order_slices(slices: Sequence[SliceHeader], min_slices: int) -> list[SliceHeader]:
    """Return the slices of a series in the order of their positions.

    Args:
        slices: Slices of one series in any order.
        min_slices: Smallest number of slices of a volume.

    Returns:
        The slices, ordered along the normal (the cross product of row and column directions).

    Raises:
        CaseError: If the slices do not form a regular, right-angled grid, are too few, or are a localizer.
    """
    first = slices[0]
    where = str(first.file.parent)
    if any("LOCALIZER" in header.image_type.upper() for header in slices):
        raise CaseError(where, "is a localizer")
    if any(np.abs(header.directions - first.directions).max() > PARALLEL for header in slices):
        raise CaseError(where, "has slices with different orientations, as in a localizer")
    if len({header.modality for header in slices}) > 1 or first.modality not in CHANNEL_OF_MODALITY:
        raise CaseError(where, f"has the modality {first.modality or 'unknown'}; only CT, MR and PT are supported")
    if len({header.shape for header in slices}) > 1:
        raise CaseError(where, "has slices of different sizes")
    if any(not np.allclose(header.spacing_mm, first.spacing_mm, rtol=1e-4) for header in slices):
        raise CaseError(where, "has slices with different pixel spacings")
    if len(slices) < max(2, min_slices):
        raise CaseError(where, f"has {len(slices)} slice(s), fewer than the minimum of {max(2, min_slices)}")
    normal = np.cross(first.directions[:3], first.directions[3:])
    ordered = sorted(slices, key=lambda header: float(header.position_mm @ normal))
    _check_distances(ordered, normal, where)
    return ordered


def _check_distances(ordered: Sequence[SliceHeader], normal: np.ndarray, where: str) -> None:
    """Raise a CaseError if slices share a position, have unequal distances, or are shifted relative to each other."""
    positions = np.stack([header.position_mm for header in ordered])
    distances = np.diff(positions @ normal)
    if len(distances) and distances.min() < 1e-3:
        place = int(distances.argmin())
        raise CaseError(
            where,
            f"has several slices at one position ({ordered[place].file.name}, {ordered[place + 1].file.name}), such as time "
            "points, echoes or diffusion weights; convert each of them to a NIfTI file",
        )
    step = float(np.median(distances))
    allowed = max(TOLERANCE_MM, TOLERANCE * step)
    wide = int(np.abs(distances - step).argmax())
    if abs(distances[wide] - step) > allowed:
        missing = round(distances[wide] / step) - 1
        lack = f"{missing} slice(s) missing" if missing > 0 else "unequal distances"
        raise CaseError(
            where,
            f"has {lack}: {distances[wide]:.2f} mm between {ordered[wide].file.name} and {ordered[wide + 1].file.name}, "
            f"usually {step:.2f} mm",
        )
    whole = positions[-1] - positions[0]
    tilt_deg = float(np.degrees(np.arccos(np.clip(whole @ normal / np.linalg.norm(whole), -1, 1))))
    if tilt_deg > LARGEST_TILT_DEG:
        raise CaseError(
            where, f"has slices that are shifted relative to each other (gantry tilt of {tilt_deg:.1f} degrees)"
        )
    # small differences in distance accumulate, and SimpleITK spaces slices evenly between the first and the last
    line = positions[0] + np.linspace(0, 1, len(positions))[:, None] * whole
    aside = np.linalg.norm(positions - line, axis=1)
    if aside.max() > max(allowed, 0.1 * min(ordered[0].spacing_mm)):
        off = ordered[int(aside.argmax())].file.name
        raise CaseError(where, f"has a slice {aside.max():.2f} mm off the grid of the others ({off})")


def _title(header: SliceHeader) -> str:
    return f"{header.series_number or '?'} {header.description or 'without description'!r}"


def _name_series(volumes: dict[str, list[SliceHeader]], source: Path) -> list[Candidate]:
    """Name series by patient, description and number, with the date if a patient has several studies."""
    patients = {uid: _patient_of(slices[0], source) for uid, slices in volumes.items()}
    labels = subject_labels(patients.values())
    studies: dict[str, set[str]] = defaultdict(set)
    for uid, slices in volumes.items():
        studies[patients[uid]].add(slices[0].study_uid)
    candidates = []
    for uid, slices in volumes.items():
        first = slices[0]
        session = f"_ses-{first.study_date or 'unknown'}" if len(studies[patients[uid]]) > 1 else ""
        words = "-".join(re.findall(r"[A-Za-z0-9.]+", clean_name(first.description))) or first.modality
        number = re.sub(r"\D", "", first.series_number) or "0"
        name = f"sub-{labels[patients[uid]]}{session}_{words}_series-{number}"
        folder = Path(*_common_parts([header.file.parent for header in slices]))
        entries = tuple(Slice(header.file.relative_to(folder).as_posix(), header.size_bytes) for header in slices)
        series = DicomSeries(SCHEMA_VERSION, uid, first.modality, first.description, str(folder), entries)
        candidates.append(Candidate(name, (folder,), series))
    return candidates


def _patient_of(header: SliceHeader, source: Path) -> str:
    """Return what identifies the patient: the identifier, otherwise the folder below the source, otherwise the study."""
    folders = header.file.relative_to(source).parent.parts
    return header.patient or (folders[0] if folders else header.study_uid)


def _common_parts(folders: Sequence[Path]) -> tuple[str, ...]:
    common = list(folders[0].parts)
    for folder in folders:
        same = [mine == other for mine, other in zip(common, folder.parts, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    return tuple(common)
