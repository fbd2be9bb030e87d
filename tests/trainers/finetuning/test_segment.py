import os

import pytest

from nnssl.errors import UserError
from nnssl.paths import Folders, use_folders
from trainers.finetuning.segment import segment


def test_a_folder_without_a_finished_fold_is_refused(tmp_path):
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "plans.json").touch()
    with pytest.raises(UserError, match="not a model folder with a finished fold"):
        segment(tmp_path, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nnunet_sees_the_folders_of_the_caller_for_a_while(nnunet_folders, tmp_path):
    before = {name: os.environ[f"nnUNet_{name}"] for name in ("raw", "preprocessed", "results")}
    given = Folders(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    with use_folders(given) as used:
        assert used == given
        assert {name: os.environ[f"nnUNet_{name}"] for name in before} == {
            "raw": str(tmp_path / "a"),
            "preprocessed": str(tmp_path / "b"),
            "results": str(tmp_path / "c"),
        }
    assert {name: os.environ[f"nnUNet_{name}"] for name in before} == before
