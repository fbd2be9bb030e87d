"""What makes a short fine-tuning cheap: no worker processes, fewer figures, no mirroring on request, only the needed cases,
one search for thread pools."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch
from matplotlib import rcParams
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading import data_loader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from threadpoolctl import ThreadpoolController, threadpool_info, threadpool_limits

from nnssl.data import jobs
from nnssl.files import read_json
from nnssl.paths import resolve_folders
from planners.finetune_planner import adopt_plan
from tests.trainers.finetuning.runs import CASES, CPU, DATASET, TEST_CASES, folders_set, trainer_of
from tests.trainers.tiny_plan import tiny_plan
from trainers.finetuning import finetune_trainer, keyed_batches
from trainers.finetuning.case_contents import labelled_files
from trainers.finetuning.finetune_trainer import FIGURE_DPI
from trainers.finetuning.keyed_batches import KeyedBatches
from trainers.finetuning.labelled_cases import find_labelled_cases
from trainers.finetuning.labelled_data import make_fingerprint, prepare_data

MIRRORED = (0, 1, 2)


def validated(run, folder, **changes) -> Path:
    """Predict and evaluate the held-out cases with random weights, without training."""
    trainer = trainer_of(run, folder, **changes)
    with folders_set(run.folder):
        trainer.initialize()
        trainer.inference_allowed_mirroring_axes = MIRRORED
        trainer.perform_actual_validation()
        assert trainer.inference_allowed_mirroring_axes == MIRRORED  # a checkpoint still allows stock nnU-Net to mirror
    return folder / "fold_0" / "validation"


def comparable(summary: Path) -> str:
    content = read_json(summary, "summary")
    for case in content["metric_per_case"]:
        case.pop("prediction_file")
    return json.dumps(content)


def test_without_workers_files_and_metrics_are_those_of_nnunets_pool(run, tmp_path, monkeypatch):
    here = validated(run, tmp_path / "here")
    monkeypatch.setattr(finetune_trainer, "without_workers", lambda *modules: nullcontext())
    pool = validated(run, tmp_path / "pool")
    names = sorted(path.name for path in pool.glob("*.nii.gz"))
    assert len(names) == 3
    for name in names:
        one, other = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / name))) for folder in (here, pool))
        assert np.array_equal(one, other)
    assert comparable(here / "summary.json") == comparable(pool / "summary.json")


def test_no_process_is_started_on_a_cpu(run, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refuse)
    assert validated(run, tmp_path / "model").joinpath("summary.json").exists()


def test_no_process_is_started_to_list_files_move_a_plan_and_make_a_fingerprint(run, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refuse)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    folders = resolve_folders()
    assert tuple(labelled_files(DATASET, folders)) == find_labelled_cases(DATASET, folders) == CASES
    adopt_plan(tiny_plan(), DATASET, folders)
    assert make_fingerprint(DATASET, folders, processes=1).exists()


def test_mirroring_off_is_one_pass_per_tile(run, tmp_path):
    """The segmentation is that of nnU-Net's predictor without mirroring."""
    folder = validated(run, tmp_path / "model", mirroring=False)
    trainer = trainer_of(run, tmp_path / "other")
    trainer.initialize()
    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(use_mirroring=False, device=CPU, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        "nnUNetTrainer",
        None,
    )
    data, *_ = trainer.dataset_class(trainer.preprocessed_dataset_folder, [CASES[3]]).load_case(CASES[3])
    expected = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.asarray(data[:]))).argmax(0)
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{CASES[3]}.nii.gz")))
    assert np.array_equal(found, expected.numpy())


def test_the_figure_is_drawn_at_the_end(run, tmp_path, monkeypatch):
    trainer = trainer_of(run, tmp_path / "model", epochs=3)
    drawn: list[tuple[int, float]] = []
    monkeypatch.setattr(
        type(trainer.logger),
        "plot_progress_png",
        lambda self, folder: drawn.append((trainer.current_epoch, rcParams["savefig.dpi"])),
    )
    trainer.run_training()
    assert drawn == [(2, FIGURE_DPI)]


def test_only_the_cases_of_a_run_are_preprocessed_and_the_rest_later(run):
    """Three to train on and two held out of six; the sixth was added later. An interrupted case is made again, no other."""
    assert set(run.preprocessed) == {*run.results[0].train_cases, *TEST_CASES} < set(CASES)
    with folders_set(run.folder):
        folders = resolve_folders()
        data = folders.preprocessed / DATASET / "nnsslPlans_3d_fullres"
        times = {path: path.stat().st_mtime_ns for path in data.iterdir() if not path.name.startswith(CASES[0])}
        before = nnUNetDatasetBlosc2(str(data), [CASES[0]]).load_case(CASES[0])[0][:]
        (data / f"{CASES[0]}.pkl").unlink()  # nnU-Net writes it last
        (data / f"{CASES[0]}.b2nd").write_bytes(b"half")
        prepare_data(DATASET, adopt_plan(tiny_plan(), DATASET, folders), "3d_fullres", CASES, folders, 1)
        assert np.array_equal(nnUNetDatasetBlosc2(str(data), [CASES[0]]).load_case(CASES[0])[0][:], before)
        assert {path: path.stat().st_mtime_ns for path in times} == times


def test_processes_are_started_only_where_they_save_time(monkeypatch):
    started: list[int] = []
    monkeypatch.setattr(
        jobs, "run_jobs", lambda work, rest, processes, dask: started.append(processes) or map(work, rest)
    )
    now = iter([0.0, 0.5, 0.0, 30.0])
    monkeypatch.setattr(jobs.time, "monotonic", lambda: next(now))
    assert list(jobs.run_list(math.sqrt, [1, 4, 9], 8)) == [1, 2, 3]  # half a second for the first: all here
    assert list(jobs.run_list(math.sqrt, [1, 4, 9], 8)) == [1, 2, 3]  # half a minute: the other two in two processes
    assert started == [1, 2]
    assert list(jobs.run_list(math.sqrt, [], 8)) == []


def test_libraries_are_searched_once_and_limited_to_one_thread_while_a_sample_is_drawn(monkeypatch):
    searches: list[int] = []
    during: list[int] = []

    class Controller(ThreadpoolController):
        def __init__(self) -> None:
            searches.append(1)
            super().__init__()

    class Draws:
        get_do_oversample = staticmethod(lambda row: False)

        def generate_train_batch(self):
            with data_loader.threadpool_limits(limits=1, user_api=None):
                during.extend(library["num_threads"] for library in threadpool_info())
            return {"data": torch.zeros(1), "target": torch.zeros(1), "keys": ["case"]}

    monkeypatch.setattr(keyed_batches, "ThreadpoolController", Controller)
    keyed_batches._thread_pools.cache_clear()
    batches = KeyedBatches(Draws(), 0, "test", range(2))
    with threadpool_limits(limits=2):
        batches[0], batches[1]
        assert {library["num_threads"] for library in threadpool_info()} == {2}
    assert searches == [1]
    assert set(during) == {1}
    assert data_loader.threadpool_limits is threadpool_limits
    keyed_batches._thread_pools.cache_clear()
