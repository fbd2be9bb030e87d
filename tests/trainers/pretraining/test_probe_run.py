"""The online probe in the training loop: it does not change the training, resumes, keeps the best weights, shows a trend."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnssl.checkpoint import read_checkpoint
from nnssl.errors import UserError
from nnssl.log import lines_to
from nnssl.networks.backbone import build_network
from nnssl.plan import read_plan
from nnssl.weights.export import export
from nnssl.weights.export_settings import ExportSettings
from tests.trainers.phantom_study import LABELLED, SOURCE
from trainers.benchmark.leaks import seen_by_checkpoint
from trainers.pretraining.pretrain import pretrain
from trainers.pretraining.pretrain_trainer import PretrainTrainer
from trainers.pretraining.probe_run import BEST, ProbeRun, prepare_probe, trend
from trainers.pretraining.settings import PretrainSettings
from trainers.pretraining.stage_job import StageJob, run_stage
from trainers.pretraining.stage_run import RunOptions, stage_folder

CPU = torch.device("cpu")
SHORT = ("epochs=3", "iterations_per_epoch=2")


def run(folders, *, method="pix2rep", configuration="3d_fullres", probe=4, said=None, **more):
    with lines_to((said if said is not None else []).append):
        return pretrain(
            method,
            SOURCE,
            PretrainSettings(
                configuration=configuration, overrides=SHORT, workers=0, probe=probe, probe_cases=2, **more
            ),
            folders,
        )


def weights_of(path):
    content, _ = read_checkpoint(path)
    return content["network_weights"] | content["nnssl"]["state"]["method"]


def test_a_probed_run_ends_in_the_same_weights_and_leaves_its_best(folders, tmp_path):
    plain = weights_of(run(folders, probe=None))
    said: list[str] = []
    other = replace(folders, results=tmp_path / "probed")
    other.results.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(other.results))
        final = run(other, said=said)
    probed = weights_of(final)
    assert all(torch.equal(probed[name], value) for name, value in plain.items())
    assert any(line.startswith(f"Probe on {LABELLED}: trained on") for line in said)

    state = json.loads((final.parent / "probe.json").read_text())
    assert [entry["epochs"] for entry in state["history"]] == [0, 1, 2, 3]
    assert not set(state["train"]) & set(state["test"])
    assert (len(state["train"]), len(state["test"])) == (2, 2)
    assert all(0 <= entry["mean"] <= 1 for entry in state["history"])
    assert set(state["history"][0]["dice"]) == {"liver", "spleen", "stomach", "aorta"}
    assert state == json.loads(json.dumps(read_checkpoint(final)[0]["nnssl"]["state"]["probe"]))
    rows = list(csv.DictReader((final.parent / "metrics.csv").open()))
    assert [float(row["probe_dice"]) for row in rows] == [entry["mean"] for entry in state["history"][1:]]
    log = next(final.parent.glob("training_log_*.txt")).read_text()
    assert "Probe before training: Dice" in log
    assert "Probe: Dice" in log
    assert "over the last 4 probes" in log

    content, provenance = read_checkpoint(final.parent / BEST)
    best = max(state["history"][1:], key=lambda entry: entry["mean"])
    assert provenance.step == 2 * best["epochs"]
    plan = read_plan(folders.preprocessed / SOURCE / "nnsslPlans.json")
    architecture = plan.nnunet["configurations"]["3d_fullres"]["architecture"]
    network = build_network(architecture, 1, 5, seed=9)
    load_pretrained_weights(network, str(final.parent / BEST))
    # The best weights were chosen by these cases, which therefore count as seen; the final weights were not chosen.
    best_saw, final_saw = (seen_by_checkpoint(final.parent / name, folders, None) for name in (BEST, final.name))
    assert set(best_saw[0].patients) == {*state["train"], *state["test"]}
    assert len(final_saw) == 1
    settings = ExportSettings(out=tmp_path / "exported.pth")
    for source, saw in ((final.parent / BEST, best_saw), (final, final_saw)):
        assert seen_by_checkpoint(export(source, settings, folders).path, folders, None) == saw
    loaded = network.state_dict()
    for name, value in content["network_weights"].items():
        assert torch.equal(loaded[name], value) or ".seg_layers." in name


class Stopped(BaseException):
    """Stands for a signal."""


@pytest.mark.nightly
def test_a_stopped_run_goes_on_with_the_same_probes(folders, tmp_path, monkeypatch):
    final = run(folders)
    whole = json.loads((final.parent / "probe.json").read_text())
    other = replace(folders, results=tmp_path / "stopped")
    other.results.mkdir()
    monkeypatch.setenv("nnUNet_results", str(other.results))
    on_epoch_end = PretrainTrainer.on_epoch_end

    def stop_after_one(self):
        on_epoch_end(self)
        if self.current_epoch == 0:
            self.save_checkpoint(str(final.parent.name and (self.output_folder + "/checkpoint_latest.pth")))
            raise Stopped

    monkeypatch.setattr(PretrainTrainer, "on_epoch_end", stop_after_one)
    with pytest.raises(Stopped):
        run(other)
    monkeypatch.setattr(PretrainTrainer, "on_epoch_end", on_epoch_end)
    resumed = run(other)
    assert json.loads((resumed.parent / "probe.json").read_text()) == whole


@pytest.mark.figures
def test_a_probe_may_come_later_or_go(folders, monkeypatch):
    """Epochs without a probe have an empty column, and the run still counts as the same run."""
    plan_path = folders.preprocessed / SOURCE / "nnsslPlans.json"
    plan = read_plan(plan_path)
    probe = prepare_probe(LABELLED, plan, "3d_fullres", folders, 2, None, 1)
    on_epoch_end = PretrainTrainer.on_epoch_end
    stops = iter((0, 1))
    stop_at = next(stops)

    def stop(self):
        on_epoch_end(self)
        if self.current_epoch == stop_at:
            self.save_checkpoint(self.output_folder + "/checkpoint_latest.pth")
            raise Stopped

    monkeypatch.setattr(PretrainTrainer, "on_epoch_end", stop)
    for options in (None, probe):
        with pytest.raises(Stopped):
            run_stage(
                StageJob(plan_path, "Pix2RepTrainer", "3d_fullres", RunOptions(SHORT, workers=0, probe=options), CPU)
            )
        stop_at = next(stops, 99)
    run_stage(StageJob(plan_path, "Pix2RepTrainer", "3d_fullres", RunOptions(SHORT, workers=0), CPU))
    folder = folders.results / SOURCE / "Pix2RepTrainer__nnsslPlans__3d_fullres" / "fold_all"
    column = [row["probe_dice"] for row in csv.DictReader((folder / "metrics.csv").open())]
    assert [bool(value) for value in column] == [False, True, False]
    history = read_checkpoint(folder / "checkpoint_final.pth")[0]["nnssl"]["state"]["probe"]["history"]
    assert [entry["epochs"] for entry in history] == [2]


def test_both_stages_of_a_hybrid_in_2d(folders):
    """RepRec's decoder is not pretrained, so the probe uses the encoder only."""
    final = run(folders, method="reprec", configuration="2d_hybrid")
    plan = read_plan(folders.preprocessed / SOURCE / "nnsslPlans.json")
    from nnssl.methods import find_method

    for stage in find_method("reprec").stages:
        folder = stage_folder(folders.results, plan, stage, "2d_hybrid")
        history = json.loads((folder / "probe.json").read_text())["history"]
        assert [entry["epochs"] for entry in history] == [0, 1, 2, 3]
        content = read_checkpoint(folder / BEST)[0]
        gates = [
            float(value) for name, value in content["network_weights"].items() if name.endswith("transformer.gate")
        ]
        assert gates == [1.0 if stage.name == "reprec.generative" else 0.0]
    assert final.exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.1, 0.2], "too early for a trend"),
        ([0.9, 0.1, 0.2, 0.3, 0.4, 0.5], "still rising, +40.0 points over the last 5 probes"),
        ([0.5, 0.501, 0.5, 0.499], "flat, -0.1 points over the last 4 probes"),
        ([0.5, 0.4, 0.3], "falling, -20.0 points over the last 3 probes"),
    ],
)
def test_trend_in_words(values, said):
    assert trend(values) == said


def test_when_a_probe_is_due(folders):
    plan = read_plan(folders.preprocessed / SOURCE / "nnsslPlans.json")
    probe = prepare_probe(LABELLED, plan, "3d_fullres", folders, 2, None, 1)
    patch = plan.configuration("3d_fullres").patch_size
    runs = [
        ProbeRun(each, patch, epochs, True, CPU) for each, epochs in ((probe, 100), (replace(probe, every=30), 100))
    ]
    assert [e for e in range(101) if runs[0].is_due(e)] == list(range(0, 101, 5))
    assert [e for e in range(101) if runs[1].is_due(e)] == [0, 30, 60, 90, 100]
    assert len(runs[0].train) == len(runs[0].test) == 8
    assert all(tile.volume.shape == (1, *patch) and tile.labels.shape == tuple(patch) for tile in runs[0].train)
    assert all((tile.labels > 0).any() for tile in runs[0].test)
    assert not math.isnan(runs[0].train[0].volume.sum())


def test_a_patient_is_on_one_side_only(folders, monkeypatch):
    names = ("p1_frame1", "p1_frame2", "p2_frame1", "p2_frame2", "p3_frame1")
    monkeypatch.setattr("trainers.pretraining.probe_run.find_labelled_cases", lambda *arguments: names)
    monkeypatch.setattr("trainers.pretraining.probe_run.prepare_data", lambda *arguments: {})
    plan = read_plan(folders.preprocessed / SOURCE / "nnsslPlans.json")
    probe = prepare_probe(LABELLED, plan, "3d_fullres", folders, 1, None, 1)
    assert len({name.split("_")[0] for name in (*probe.train, *probe.test)}) == 2
    with pytest.raises(UserError, match="probe_cases must be at most 1, got 2: .* has 3 labelled patients"):
        prepare_probe(LABELLED, plan, "3d_fullres", folders, 2, None, 1)


def test_wrong_probes_end_before_training(folders, tmp_path):
    plan = read_plan(folders.preprocessed / SOURCE / "nnsslPlans.json")

    def prepare(cases=2, **changes):
        return prepare_probe(LABELLED, plan, "3d_fullres", replace(folders, **changes), cases, None, 1)

    with pytest.raises(UserError, match="probe_cases must be at most 4, got 5: .* has 8 labelled patients"):
        prepare(cases=5)
    raw = tmp_path / "raw"
    folder = raw / LABELLED
    folder.mkdir(parents=True)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).symlink_to(folders.raw / LABELLED / name)
    content = json.loads((folders.raw / LABELLED / "dataset.json").read_text())
    content |= {"labels": {"background": 0, "organs": [1, 2, 3, 4], "aorta": 4}, "regions_class_order": [1, 4]}
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"without regions, got .*, whose region organs"):
        prepare(raw=raw)
    with pytest.raises(UserError, match="not found"):
        run(folders, probe=999)
