"""What a user can get wrong, through the commands: exit code 2 and one line that names the thing and what to do."""

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from nnssl.cli import finetune, info, plan_and_preprocess, pretrain
from nnssl.data.phantoms import write_phantom_dataset
from nnssl.methods import METHODS

SHAPE, SPACING_MM = (16, 24, 20), (2.5, 1.5, 1.7)
NAME = "Dataset501_Phantoms"


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    """Eleven phantoms in nnU-Net's raw format, made once."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom_dataset(folder, NAME, 11, seed=0, shape=SHAPE, spacing_mm=SPACING_MM, labelled=False)
    return folder / NAME


@pytest.fixture
def raw(phantoms, nnunet_folders) -> Path:
    """A fresh copy of the phantoms below ``nnUNet_raw``."""
    shutil.copytree(phantoms, nnunet_folders / "raw" / NAME)
    return nnunet_folders / "raw" / NAME


def image_of(raw: Path, number: int = 0) -> Path:
    return raw / "imagesTr" / f"phantom_{number:04d}_0000.nii.gz"


def fails(capsys, command, *argv: str) -> str:
    """Run a command that must end in exit code 2 and one line; return the line."""
    capsys.readouterr()
    assert command.main(list(argv)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{command.NAME}: error: ")
    return lines[0]


def plan(*argv: str) -> int:
    return plan_and_preprocess.main(["-d", "501", "--preset", "cpu", "--processes", "1", *argv])


def fails_to_plan(capsys, *argv: str) -> str:
    return fails(capsys, plan_and_preprocess, "-d", "501", "--preset", "cpu", "--processes", "1", *argv)


def rewrite(path: Path, array: np.ndarray) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(mm) for mm in SPACING_MM[::-1]][: array.ndim])
    sitk.WriteImage(image, str(path))


def array_of(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float32)


# data sets and images


def test_no_such_data_set(raw, capsys):
    line = fails(capsys, plan_and_preprocess, "-d", "777")
    assert "777" in line
    assert NAME in line


def test_empty_folder_and_no_images(raw, capsys):
    for image in (raw / "imagesTr").iterdir():
        image.unlink()
    assert "imagesTr" in fails_to_plan(capsys)
    (raw / "imagesTr").rmdir()
    assert "imagesTr" in fails_to_plan(capsys)


def test_two_file_endings_without_dataset_json(raw, capsys):
    (raw / "dataset.json").unlink()
    shutil.copy(image_of(raw), raw / "imagesTr" / "other_0000.nrrd")
    line = fails_to_plan(capsys)
    assert ".nrrd" in line
    assert ".nii.gz" in line


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def poison(path: Path) -> None:
    volume = array_of(path)
    volume[3, 4, 5] = np.nan
    rewrite(path, volume)


def flatten(path: Path) -> None:
    rewrite(path, np.full(SHAPE, 7, np.float32))


def slice_out(path: Path) -> None:
    rewrite(path, array_of(path)[4])


def second_channel(path: Path) -> None:
    shutil.copy(path, path.with_name(path.name.replace("_0000", "_0001")))


FAULTS = {
    "truncated": (truncate, "phantom_0003"),
    "NaN": (poison, "NaN"),
    "constant": (flatten, "constant"),
    "2D among 3D": (slice_out, "phantom_0003"),
    "channel count": (second_channel, "channel"),
}


def test_masks_without_preprocessing_would_have_no_effect(raw, tmp_path, capsys):
    assert plan("--no-preprocessing", "--exclude-mask", str(tmp_path)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "--exclude-mask must not be given without preprocessing, which applies it; leave one of them out" in message


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_one_bad_case_is_set_aside_and_named_again_at_the_end(raw, capsys, fault):
    spoil, word = FAULTS[fault]
    spoil(image_of(raw, 3))
    assert plan("--no-preprocessing") == 0
    out = capsys.readouterr().out
    last = out.split("cases are not used:")[1]
    assert "phantom_0003" in last
    assert word in last
    assert str(raw / "imagesTr") in last


def test_more_than_a_tenth_is_an_error(raw, capsys):
    for number in (1, 5):
        truncate(image_of(raw, number))
    line = fails_to_plan(capsys)
    assert "2 of 11" in line
    assert "phantom_0001" in line
    assert not (raw.parents[1] / "preprocessed" / NAME / "nnsslPlans.json").exists()


def test_no_half_read_gzip_passes(raw, capsys):
    """A file that ends in the middle of its voxels but is valid gzip."""
    path = image_of(raw, 2)
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[: len(content) // 2]))
    assert plan("--no-preprocessing") == 0
    assert "phantom_0002" in capsys.readouterr().out.split("cases are not used:")[1]


def test_folder_that_cannot_be_written(raw, capsys, monkeypatch, tmp_path):
    blocked = tmp_path / "a_file"
    blocked.touch()
    monkeypatch.setenv("nnUNet_preprocessed", str(blocked / "below"))
    line = fails_to_plan(capsys)
    assert str(blocked) in line
    assert "the folder is not writable" in line


def test_verbose_adds_the_traceback(raw, capsys):
    assert plan_and_preprocess.main(["-d", "777", "--verbose"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.strip().splitlines()[-1].startswith("nnssl_plan_and_preprocess: error: ")


# pretraining


@pytest.fixture
def planned(raw) -> Path:
    """A planned data set without preprocessed cases; returns its folder in ``nnUNet_preprocessed``."""
    assert plan("--no-preprocessing") == 0
    return raw.parents[1] / "preprocessed" / NAME


def test_pretraining_refuses(planned, capsys):
    def refuses(*argv: str) -> str:
        return fails(capsys, pretrain, "--device", "cpu", *argv)

    assert f"Unknown method 'nosuch'. Available methods: {', '.join(sorted(METHODS))}" in refuses("-m", "nosuch")
    line = refuses("-m", "reprec", "--set", "temprature=1")
    assert "Unknown setting 'temprature'" in line
    assert "temperature" in line
    assert "epochs must be of type int, got many" in refuses("-m", "reprec", "--set", "epochs=many")
    line = refuses("-m", "reprec", "--epochs", "1", "2", "3")
    assert "--epochs must be one number or one for each of the 2 stages of reprec, got 3 numbers" in line
    assert "needs a convolutional U-Net with a transformer" in refuses("-m", "reprec", "-c", "3d_fullres")
    assert "no configuration 'nope'" in refuses("-m", "reprec", "-c", "nope")
    assert "nnssl_plan_and_preprocess -d" in refuses("-m", "reprec", "-p", "otherPlans", "-d", "501")
    assert "nnssl_plan_and_preprocess" in refuses("-m", "reprec")


def test_no_cuda(planned, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    line = fails(capsys, pretrain, "-m", "reprec", "--device", "cuda")
    assert "--device must be available to PyTorch on this machine, got cuda" in line


def test_edited_plan_and_plan_without_hybrid(planned, capsys):
    path = planned / "nnsslPlans.json"
    content = json.loads(path.read_text())
    content["pretext"]["configurations"]["2d"]["colour"] = 1
    path.write_text(json.dumps(content))
    line = fails(capsys, pretrain, "-m", "reprec", "--device", "cpu")
    assert "nnsslPlans.json" in line
    assert "2d.colour" in line
    del content["pretext"]["configurations"]["2d"]["colour"]
    for name in ("2d_hybrid", "3d_fullres_hybrid"):
        content["pretext"]["configurations"].pop(name, None)
    path.write_text(json.dumps(content))
    assert "has only" in fails(capsys, pretrain, "-m", "reprec", "--device", "cpu")


# checkpoints


class Malicious:
    def __reduce__(self):
        return (os.mkdir, (os.environ["NNSSL_TEST_TRAP"],))


def test_malicious_checkpoint_does_not_run(planned, capsys, monkeypatch, tmp_path):
    trap = tmp_path / "trap"
    monkeypatch.setenv("NNSSL_TEST_TRAP", str(trap))
    path = tmp_path / "evil.pth"
    torch.save({"network_weights": Malicious()}, path)
    for command, argv in (
        (info, [str(path)]),
        (pretrain, ["-m", "reprec", "--device", "cpu", "--init", str(path)]),
        (finetune, ["-d", "501", "-w", str(path), "--device", "cpu"]),
    ):
        assert "could run code" in fails(capsys, command, *argv)
        assert not trap.exists()


def test_truncated_missing_and_foreign_checkpoints(planned, capsys, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"network_weights": {"a": torch.zeros(1000)}}, path)
    assert "has weights of a training but no plans" in fails(capsys, info, str(path))
    path.write_bytes(path.read_bytes()[:800])
    assert "weights.pth" in fails(capsys, info, str(path))
    assert "there is no such checkpoint" in fails(capsys, info, str(tmp_path / "none.pth"))
    path.write_text("{}")
    assert "is not a checkpoint" in fails(capsys, pretrain, "-m", "reprec", "--device", "cpu", "--init", str(path))
