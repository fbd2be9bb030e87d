"""A study whose images or labels are replaced: its cells count as unfinished, and weights on replaced images are refused."""

import shutil
from dataclasses import replace

import pytest
import SimpleITK as sitk  # noqa: N813

from nnssl.data.contents import write_contents
from nnssl.environment import variables
from nnssl.errors import UserError
from nnssl.log import lines_to
from nnssl.study.table import SCRATCH
from tests.trainers.benchmark.test_run import make_study
from tests.trainers.benchmark.test_study import prepare
from tests.trainers.phantom_study import LABELLED, SOURCE
from trainers.benchmark.cells import StudyCells
from trainers.benchmark.run import Part, prepare_source, pretrain_arms
from trainers.finetuning.case_contents import FILE_NAME
from trainers.finetuning.result import FILE_NAME as RESULT


@pytest.fixture
def own(folders, tmp_path):
    """nnU-Net's folders with copies of the phantoms, which may be changed."""
    changed = replace(folders, raw=tmp_path / "raw", preprocessed=tmp_path / "preprocessed")
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(folders, name), getattr(changed, name))
    for path in (changed.preprocessed / SOURCE).rglob("phantom_*.json"):  # the copies of the images have other paths
        path.write_text(path.read_text().replace(str(folders.raw), str(changed.raw)))
    with variables(nnUNet_raw=str(changed.raw), nnUNet_preprocessed=str(changed.preprocessed)):
        yield changed


def add_one(path) -> None:
    sitk.WriteImage(sitk.ReadImage(str(path)) + 1, str(path))


def test_cells_are_finished_as_long_as_their_cases_are_the_same(own):
    study = prepare(own, labels=(1,), epochs=(1,))
    cells = StudyCells(study)
    cell = next(each for each in study.cells if each.arm == SCRATCH)
    (cells.folder(cell) / "fold_0").mkdir(parents=True)
    for path in (cells.metrics_path(cell), cells.folder(cell) / RESULT):
        path.write_text("made up")
    split = study.split(1, cell.seed)
    write_contents(cells.folder(cell) / "fold_0" / FILE_NAME, {case: study.contents[case] for case in split.cases})

    def state() -> tuple[bool, bool]:
        now = StudyCells(prepare(own, labels=(1,), epochs=(1,)))
        return now.is_trained(cell), now.is_finished(cell)

    assert state() == (True, True)
    others = set(study.labelled) - set(split.cases)
    add_one(own.raw / LABELLED / "labelsTr" / f"{sorted(others)[0]}.nii.gz")
    assert state() == (True, True)
    add_one(own.raw / LABELLED / "labelsTr" / f"{split.test[0]}.nii.gz")
    assert state() == (True, False)
    add_one(own.raw / LABELLED / "imagesTr" / f"{split.train[0]}_0000.nii.gz")
    assert state() == (False, False)


def test_weights_of_replaced_images_are_not_compared_as_if_they_were_new(own):
    study = make_study(own)
    final = study.pretrainings["pix2rep"].final
    before = final.read_bytes()
    assert prepare_source(study) == []
    pretrain_arms(study, Part())
    add_one(own.raw / SOURCE / "imagesTr" / "phantom_0001_0000.nii.gz")
    said: list[str] = []
    with lines_to(said.append):
        assert prepare_source(study) == ["phantom_0001"]
    assert any("1 cases have changed since they were preprocessed (phantom_0001)" in line for line in said)
    with pytest.raises(
        UserError, match=r"weights of pix2rep were trained on images .* replaced since \(phantom_0001\)"
    ):
        pretrain_arms(study, Part())
    assert final.read_bytes() == before
