"""Images and masks that are replaced under the same names after preprocessing or pretraining."""

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnssl.checkpoint import read_checkpoint
from nnssl.cli.plan_and_preprocess import main as plan_and_preprocess
from nnssl.data.case_store import CaseStore, read_properties
from nnssl.data.phantoms import write_phantom_dataset
from nnssl.errors import ArgumentError
from nnssl.log import lines_to
from nnssl.paths import Folders, resolve_folders
from tests.holding import held_elsewhere, waits_for
from trainers.pretraining.pretrain import pretrain
from trainers.pretraining.settings import PretrainSettings

NAME = "Dataset501_Replaced"
CASES = [f"phantom_{number:04d}" for number in range(4)]


@pytest.fixture
def planned(nnunet_folders, tmp_path) -> Folders:
    """A planned and preprocessed data set, two of whose cases have masks."""
    folders = resolve_folders()
    write_phantom_dataset(folders.raw, NAME, len(CASES), 0, (16, 24, 20), (2.5, 1.5, 1.7), labelled=False)
    (tmp_path / "masks").mkdir()
    for case in CASES[:2]:
        image = sitk.ReadImage(str(image_of(folders, case)))
        mask = np.zeros(sitk.GetArrayViewFromImage(image).shape, np.uint8)
        mask[:4] = 1
        write_like(image, mask, tmp_path / "masks" / f"{case}.nii.gz")
    arguments = ["-d", "501", "--preset", "cpu", "--processes", "1", "-c", "3d_fullres"]
    assert plan_and_preprocess([*arguments, "--exclude-mask", str(tmp_path / "masks")]) == 0
    return folders


def image_of(folders: Folders, case: str) -> Path:
    return folders.raw / NAME / "imagesTr" / f"{case}_0000.nii.gz"


def write_like(image, values: np.ndarray, path: Path) -> None:
    written = sitk.GetImageFromArray(np.ascontiguousarray(values))
    written.CopyInformation(image)
    sitk.WriteImage(written, str(path))


def turn(path: Path) -> None:
    image = sitk.ReadImage(str(path))
    write_like(image, sitk.GetArrayFromImage(image)[::-1], path)


def start(folders: Folders, **changes) -> Path:
    settings = PretrainSettings(
        configuration="3d_fullres", epochs=1, iterations_per_epoch=2, overrides=("batch_size=2",), workers=0, device="cpu",
        retrieval_every=0, **changes,
    )  # fmt: skip
    return pretrain("models_genesis", 501, settings, folders)


def run(folders: Folders, **changes) -> tuple[Path, list[str]]:
    said: list[str] = []
    with lines_to(said.append):
        return start(folders, **changes), said


def test_a_pretraining_on_replaced_images_is_not_called_finished(planned, tmp_path):
    final, _ = run(planned)
    weights = final.read_bytes()
    contents = read_checkpoint(final)[1].case_contents
    assert contents is not None
    assert (sorted(contents), len(set(contents.values()))) == (CASES, 4)
    store = CaseStore(next((planned.preprocessed / NAME).glob("*cases_3d")))
    before = {case: read_properties(store.folder, case) for case in CASES}

    os.utime(image_of(planned, CASES[3]), ns=(5, 5))
    assert any("already finished" in line for line in run(planned)[1])
    turn(image_of(planned, CASES[3]))
    turn(tmp_path / "masks" / f"{CASES[1]}.nii.gz")
    said: list[str] = []
    with lines_to(said.append), pytest.raises(ArgumentError) as raised:
        run(planned)
    assert f"were replaced since ({CASES[1]}, {CASES[3]}); use restart" in str(raised.value)
    assert raised.value.arguments == ("restart",)
    assert final.read_bytes() == weights  # nobody's weights are deleted
    after = {case: read_properties(store.folder, case) for case in CASES}
    assert [after[case] == before[case] for case in CASES] == [True, False, True, False]
    assert all((after[case].exclude_mask is None) == (before[case].exclude_mask is None) for case in CASES)
    final, said = run(planned, restart=True)
    assert final.read_bytes() != weights
    assert any("already finished" in line for line in run(planned)[1])


def test_nothing_is_compared_where_only_preprocessed_data_are(planned):
    for case in CASES:
        image_of(planned, case).unlink()
    final, said = run(planned)
    assert final.exists()
    assert not any("have changed" in line for line in said)


def test_two_runs_never_work_on_one_data_set_or_one_folder_of_results(planned, tmp_path):
    arguments = ["-d", "501", "--preset", "cpu", "--processes", "1", "-c", "3d_fullres"]
    command = [*arguments, "--exclude-mask", str(tmp_path / "masks")]
    code, _ = waits_for(planned.preprocessed / NAME, lambda: plan_and_preprocess(command))
    assert code == 0
    final, _ = run(planned)
    before = final.stat().st_mtime_ns
    path, said = waits_for(final.parent, lambda: start(planned))
    assert any("already finished" in line for line in said)
    assert (path, final.stat().st_mtime_ns) == (final, before)
    with held_elsewhere(final.parent), pytest.raises(ArgumentError, match=r"process \d+ on .* works there"):
        run(planned, restart=True)
    assert final.stat().st_mtime_ns == before
    turn(image_of(planned, CASES[0]))
    with pytest.raises(ArgumentError, match=CASES[0]):
        waits_for(planned.preprocessed / NAME, lambda: start(planned))
