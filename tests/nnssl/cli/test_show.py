"""nnssl_show end to end on a toy data set with random weights, and mistakes of the user."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl.checkpoint import Provenance, read_checkpoint, write_checkpoint
from nnssl.cli import show
from nnssl.draws import sample_generators
from nnssl.environment import variables
from nnssl.errors import UserError
from nnssl.methods import METHODS
from nnssl.methods.settings import resolve_stage
from nnssl.methods.state import method_state
from nnssl.networks.backbone import build_network, planned_configuration, seeded
from nnssl.networks.primus_positions import architecture_of_patch
from nnssl.networks.uncertainty import normalised_entropy
from nnssl.paths import Folders, resolve_folders
from nnssl.pictures import figures as pictures
from nnssl.pictures import retrieval
from nnssl.pictures.dense_network import dense_network_of
from nnssl.pictures.matches import find_matches, matcher_of
from nnssl.pictures.reconstructions import reconstruct_case
from nnssl.pictures.teacher_uncertainty import teacher_of, tile_uncertainty
from nnssl.plan import Plan
from nnssl.weights.opened_checkpoint import open_checkpoint
from nnssl.weights.preprocessed_cases import open_cases
from nnssl.weights.restored_method import restore_method
from tests.trainers.conftest import NAME, SHAPE, plan_toy
from trainers.pretraining.stage_run import plain_settings

OTHER = "Dataset502_Other"
ALICE = ("projection_hidden=8", "projection_bottleneck=8", "projection_dimensions=8", "alignment_heads=2")
DECODER = ("encoder.", "decoder.encoder.", "decoder.transpconvs.", "decoder.stages.")


def write_weights(path: Path, plan: Plan, configuration: str, pretrained=DECODER, **settings) -> Path:
    planned = planned_configuration(plan.nnunet, configuration)
    network = build_network(planned["architecture"], 1, 2, 0)
    provenance = Provenance(
        nnssl_version="0", method="pix2rep", stage="pix2rep.dense", dataset_name=NAME, plans_name=plan.name,
        configuration=configuration, plans=plan.nnunet, dataset_json={}, settings=settings, seed=0, step=3, total_steps=4,
        finished=False, pretrained=pretrained, init=None,
    )  # fmt: skip
    write_checkpoint(path, {"network_weights": network.state_dict()}, provenance, {})
    return path


def write_method(path: Path, plan: Plan, configuration: str, name: str, *overrides: str) -> Path:
    """Write a checkpoint of a method with a teacher that is not its student."""
    planned = planned_configuration(plan.nnunet, configuration)
    stage = METHODS[name].stages[-1]
    settings, _ = resolve_stage(stage.load(), plan.configuration(configuration), stage.name, overrides)
    pretext = plan.configuration(configuration).for_stage(stage.name)
    network = build_network(architecture_of_patch(planned["architecture"], pretext.patch_size), 1, 2, 0)
    method = seeded(lambda: stage.load()(network, settings, pretext), 0, stage.name)
    with torch.no_grad():
        for _, teacher in method.momentum_pairs():
            for parameter in teacher.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
                parameter.add_(0.1 * noise)
    provenance = Provenance(
        nnssl_version="0", method=name, stage=stage.name, dataset_name=NAME, plans_name=plan.name,
        configuration=configuration, plans=plan.nnunet, dataset_json={}, settings=plain_settings(settings), seed=0,
        step=3, total_steps=4, finished=False, pretrained=DECODER, init=None,
    )  # fmt: skip
    state = {"method": method_state(network, method)}
    write_checkpoint(path, {"network_weights": network.state_dict()}, provenance, state)
    return path


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> dict[str, Path]:
    """Return a planned toy data set with weights for both dimensions, made once."""
    root = tmp_path_factory.mktemp("show")
    folders = Folders(*(root / name for name in ("raw", "preprocessed", "results")))
    for folder in dataclasses.astuple(folders):
        folder.mkdir()
    with variables(**{f"nnUNet_{folder.name}": str(folder) for folder in dataclasses.astuple(folders)}):
        plan = plan_toy(folders, cases=4)
    return {
        "root": root,
        "2d": write_weights(root / "2d.pth", plan, "2d", features="single"),
        "3d": write_weights(root / "3d.pth", plan, "3d_fullres", features="pyramid"),
        "teacher": write_method(root / "teacher.pth", plan, "2d", "pixelglobal", "uncertainty_passes=3"),
        "teacher3d": write_method(root / "teacher3d.pth", plan, "3d_fullres", "pixelglobal", "uncertainty_passes=3"),
        "pcrl": write_method(root / "pcrl.pth", plan, "2d", "pcrl"),
        "pcrl3d": write_method(root / "pcrl3d.pth", plan, "3d_fullres", "pcrl", "mixup=false"),
        "sam": write_method(root / "sam.pth", plan, "3d_fullres", "sam", "dimensions=8"),
        "primus": write_method(root / "primus.pth", plan, "3d_fullres_primus", "alice", *ALICE),
        "alice": write_method(root / "alice.pth", plan, "3d_fullres", "alice", *ALICE),
        "hybrid": write_weights(root / "hybrid.pth", plan, "2d_hybrid", ("encoder.", "transformer.embed.")),
    }


@pytest.fixture
def files(workspace, monkeypatch, tmp_path) -> dict[str, Path]:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(workspace["root"] / name))
    monkeypatch.chdir(tmp_path)
    return workspace


@pytest.fixture
def drawn(monkeypatch) -> list:
    """Return the list of figures that were written."""
    figures = []
    write = pictures.write_picture
    monkeypatch.setattr(pictures, "write_picture", lambda path, figure: (figures.append(figure), write(path, figure)))
    return figures


def run(*argv) -> None:
    assert show.main([*map(str, argv), "--device", "cpu"]) == 0


def fails(capsys, *argv) -> str:
    """Run a command that must end in exit code 2 and one line; return the line."""
    capsys.readouterr()
    assert show.main([*map(str, argv), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("nnssl_show: error: ")
    return line


def heads(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def test_similarity_in_2d(files, drawn, capsys):
    run("similarity", "-w", files["2d"], "--case", "toy_01", "--point", 9, 5, 13, "--others", "toy_03", "-o", "a.png")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    first, own, third, _ = heads(figure)
    assert (first, third) == ("toy_01: query (9, 5, 13)", "toy_03")
    assert own == "nearest (9, 5, 13), cosine 1.000"
    assert "step 3 of 4; features: single" in figure.get_suptitle()
    assert "Warning" not in capsys.readouterr().out


def test_similarity_in_3d_with_everything_chosen(files, drawn, capsys):
    """The case is the first one and the others are the two after it; the point is in the middle of the body."""
    run("similarity", "-w", files["3d"])
    printed = capsys.readouterr().out
    (figure,) = drawn
    assert len(figure.axes) == 3 * 6 + 1
    assert [head.partition(":")[0] for head in heads(figure)[::2]] == ["toy_00", "toy_01", "toy_02"]
    assert "features: pyramid" in figure.get_suptitle()
    assert "query: --case toy_00 --point 7 10 10" in printed  # every seventh voxel is stored
    assert printed.splitlines()[-2:] == [
        "picture: nnssl_similarity.png",
        f"next: nnssl_finetune -d LABELLED_ID -w {files['3d']}",
    ]
    assert Path("nnssl_similarity.png").exists()
    assert show.main(["similarity", "-w", str(files["3d"]), "--case", "toy_03", "--device", "cpu"]) == 0
    assert [head.partition(":")[0] for head in heads(drawn[1])[::2]] == ["toy_03", "toy_00", "toy_01"]


def test_two_runs_draw_the_same(files):
    for name in ("a.png", "b.png"):
        run("similarity", "-w", files["2d"], "--others", "-o", name)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_embedding(files, drawn):
    run("embedding", "-w", files["2d"], "--case", "toy_02", "--slice", 4, "--others", "-o", "a.png")
    run("embedding", "-w", files["3d"], "--case", "toy_02", "-o", "b.png")
    run("embedding", "-w", files["2d"], "--case", "toy_02", "--slice", 4, "--others", "toy_00", "toy_02", "-o", "c.png")
    alone, following, chosen = drawn
    assert [axes.get_xlabel() for axes in alone.axes] == ["z = 4"] * 2
    assert "components 1, 2, 3 of all cases as red, green, blue" in alone.get_suptitle()
    assert heads(alone) == ["toy_02"]
    assert len(following.axes) == 4 * 6
    assert heads(following) == ["toy_02", "toy_03", "toy_00", "toy_01"]
    assert heads(chosen) == ["toy_02", "toy_00"]
    assert [axes.get_xlabel() for axes in chosen.axes[::2]] == ["z = 4"] * 2


def test_uncertainty(files, drawn, capsys):
    run("uncertainty", "-w", files["teacher"], "--case", "toy_02", "--slice", 4, "-o", "a.png")
    run("uncertainty", "-w", files["teacher3d"], "--passes", 2, "-o", "b.png")
    assert [axes.get_xlabel() for axes in drawn[0].axes[:2]] == ["z = 4", "z = 4"]
    assert len(drawn[1].axes) == 6 + 1
    assert "3 passes" in drawn[0].get_suptitle()
    assert "2 passes" in drawn[1].get_suptitle()
    assert heads(drawn[0])[1].startswith("mean uncertainty 0.")
    assert "is of pix2rep, which has no teacher" in fails(capsys, "uncertainty", "-w", files["2d"])
    assert "slice 3: these weights are 3D" in fails(capsys, "uncertainty", "-w", files["teacher3d"], "--slice", 3)


@pytest.mark.parametrize("name", ["teacher", "teacher3d"])
def test_uncertainty_is_that_of_the_teacher(files, name):
    """The uncertainty is computed with network and head of the teacher, not of the student."""
    teacher = teacher_of(open_checkpoint(files[name]), None, torch.device("cpu"))
    state = read_checkpoint(files[name])[0]["nnssl"]["state"]["method"]
    for key, value in teacher.network.network.state_dict().items():
        assert torch.equal(value, state[f"teacher.{key}"])
    for key, value in teacher.head.state_dict().items():
        assert torch.equal(value, state[f"teacher_local_head.{key}"])
    feature_map = torch.randn(1, teacher.head.hidden.in_features, *teacher.network.shape)
    found = tile_uncertainty(teacher, feature_map, "a")
    assert found.shape == (1, *teacher.network.shape)
    assert ((found >= 0) & (found <= 1)).all()
    assert torch.equal(found, tile_uncertainty(teacher, feature_map, "a"))
    # without dropout: the entropy of every voxel, at its own place though they are drawn in random order
    teacher.head.dropout = 0.0
    logits = teacher.head(feature_map.flatten(2).transpose(1, 2))[0] / teacher.temperature
    expected = normalised_entropy(logits.softmax(dim=1)).view(1, *teacher.network.shape)
    torch.testing.assert_close(tile_uncertainty(teacher, feature_map, "a"), expected, atol=1e-4, rtol=1e-3)


def test_retrieval(files, drawn, capsys, monkeypatch):
    """Every pretrained stage has a row, the weights of the file and random ones differ, and chance follows from the sample."""
    monkeypatch.setattr(retrieval, "PATCHES", 5)
    run("retrieval", "-w", files["pcrl"], "-o", "a.png")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("encoder_", "decoder_"))]
    assert [row[0] for row in rows][0] == "encoder_0"
    assert rows[-1][0] == "decoder_0"
    assert all(len(row) == 5 and all(0 <= float(value) <= 1 for value in row[1:]) for row in rows)
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == list(retrieval.PANELS.values())
    for name, stages in (("primus", {"encoder_0"}), ("alice", None), ("hybrid", None)):
        weights = open_checkpoint(files[name])
        store = open_cases(weights.own_provenance, NAME, resolve_folders())
        measured = retrieval.measure_weights(weights, store, torch.device("cpu"))
        assert measured.chance.pooled == 1 / 5
        assert not measured.set_aside
        assert measured.found.keys() == measured.random.keys()
        assert stages is None or set(measured.found) == stages
        assert name != "hybrid" or not any(stage.startswith("decoder_") for stage in measured.found)


def test_reconstruction(files, drawn, capsys):
    run("reconstruction", "-w", files["pcrl"], "--case", "toy_02", "--slice", 4, "--seed", 1, "-o", "a.png")
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[-5:]] == [
        "o",
        "m",
        "h",
        "picture",
        "next",
    ]
    run("reconstruction", "-w", files["pcrl3d"], "-o", "b.png")
    assert [len(figure.axes) for figure in drawn] == [3 * 3, 2 * 3]
    assert "target" in heads(drawn[0])
    assert "is of pix2rep and reconstructs nothing" in fails(capsys, "reconstruction", "-w", files["2d"])
    assert "slice 3: these weights are 3D" in fails(capsys, "reconstruction", "-w", files["pcrl3d"], "--slice", 3)
    assert "99" in fails(capsys, "reconstruction", "-w", files["pcrl"], "--slice", 99)


@pytest.mark.parametrize("name", ["primus", "alice"])
def test_recovered_tokens(files, drawn, capsys, name):
    """Visible tokens are unchanged; masked ones are outputs with the mean and deviation of the true voxels that count."""
    run("reconstruction", "-w", files[name], "--case", "toy_02", "-o", "a.png")
    assert "s: mean squared error" in capsys.readouterr().out
    assert len(drawn[0].axes) == 3
    method, provenance = restore_method(files[name], torch.device("cpu"))
    case = open_cases(provenance, NAME, resolve_folders()).case("toy_02")
    patch = torch.from_numpy(case.read_box((0, 0, 0), method.configuration.patch_size))[None]
    learnable = torch.rand(patch[:, 0].shape, generator=torch.Generator().manual_seed(0)) < 0.6
    views = method.make_views(patch, sample_generators(0, "test", 0, [0]), learnable)
    made = method.recover(views)
    token, grid = method.student.token_vox, method.student.grid
    answers = method.decoder(method.student(patch, views.visible), views.visible, method.positions)
    errors = []
    for index, place in enumerate(np.ndindex(*grid)):
        where = (0, 0, *(slice(n * size, (n + 1) * size) for n, size in zip(place, token, strict=True)))
        truth = patch[where]
        if not views.mask[0, index]:
            assert torch.equal(made.seen[where], truth)
            assert torch.equal(made.output[where], truth)
            continue
        assert not made.seen[where].any()
        answer, counts = answers[0, index].reshape(truth.shape), learnable[(0, *where[2:])]
        mean, deviation = truth[counts].mean(), truth[counts].std(correction=0)
        assert torch.allclose(made.output[where], answer * deviation + mean, atol=1e-3)
        errors.append((answer - (truth - mean) / deviation)[counts].square())
    assert float(made.error) == pytest.approx(float(torch.cat(errors).mean()), rel=1e-3)


def test_an_error_of_a_reconstruction_is_over_the_voxels_that_count(files, monkeypatch):
    method, provenance = restore_method(files["pcrl"], torch.device("cpu"))
    case = open_cases(provenance, NAME, resolve_folders()).case("toy_01")
    with monkeypatch.context() as patched:
        patched.setattr(type(case), "read_learnable", lambda self, lower, size: np.zeros(size, dtype=bool))
        assert {each.error for each in reconstruct_case(method, case, 4, 3, torch.device("cpu"))} == {0.0}
    assert all(each.error > 0 for each in reconstruct_case(method, case, 4, 3, torch.device("cpu")))


def test_matches(files, drawn, capsys):
    run("matches", "-w", files["sam"], "--case", "toy_01", "--other", "toy_03", "--points", 3, "-o", "a.png")
    out = capsys.readouterr().out
    assert out.count("cycle error") == 3
    assert len(drawn[0].axes) == 9
    assert "found in toy_03" in drawn[0].get_suptitle()
    assert "has no embeddings of places" in fails(capsys, "matches", "-w", files["3d"])
    assert "toy_99" in fails(capsys, "matches", "-w", files["sam"], "--other", "toy_99")


def test_a_case_is_found_in_itself_and_its_crops_lie_where_it_says(files):
    _, provenance = restore_method(files["sam"], torch.device("cpu"))
    store = open_cases(provenance, NAME, resolve_folders())
    matcher, method = matcher_of(open_checkpoint(files["sam"]), store, torch.device("cpu"))
    patch = method.configuration.patch_size
    volume = store.case("toy_01").read_box((0, 0, 0), store.case("toy_01").shape)[0]
    for each in find_matches(matcher, store, "toy_01", "toy_01", 12, 0, patch):
        assert np.abs(np.subtract(each.found_vox, each.query_vox)).max() <= 1
        assert each.box_vox == each.query_vox
        assert each.score > 0.999
        middle = each.query[patch[1] // 2, patch[2] // 2]
        assert middle == volume[each.query_vox]


@pytest.mark.parametrize("name", ["pcrl", "pcrl3d", "teacher"])
def test_a_method_is_restored_as_it_was(files, name):
    """Every tensor of network and state is that of the file; without training, it is the seeded initialisation."""
    content = read_checkpoint(files[name])[0]
    method, _ = restore_method(files[name], torch.device("cpu"))
    stored = content["nnssl"]["state"]["method"]
    own = method.state_dict()
    assert stored
    assert all(torch.equal(own[key], value) for key, value in stored.items())
    assert all(torch.equal(method.network.state_dict()[k], v) for k, v in content["network_weights"].items())
    start, _ = restore_method(files[name], torch.device("cpu"), trained=False)
    (key,) = [key for key in stored if key.startswith("teacher.") and key.endswith("stages.0.0.convs.0.conv.weight")][
        :1
    ]
    student = start.network.encoder if name.startswith("pcrl") else start.network
    assert torch.equal(start.state_dict()[key], student.state_dict()[key.removeprefix("teacher.")])
    assert not torch.equal(start.state_dict()[key], stored[key])


def test_a_state_with_other_parts_is_refused(files, tmp_path):
    """Missing parts must not silently keep their random initialisation."""
    content, provenance = read_checkpoint(files["pcrl"])
    state = {"method": dict(content["nnssl"]["state"]["method"])}
    del state["method"]["output.weight"]
    write_checkpoint(tmp_path / "part.pth", {"network_weights": content["network_weights"]}, provenance, state)
    with pytest.raises(
        UserError, match=r"heads differ .*1 tensors exist on one side only, the first is output\.weight"
    ):
        restore_method(tmp_path / "part.pth", torch.device("cpu"))


def test_a_reconstruction_is_what_the_decoder_makes(files, monkeypatch):
    """Recomputed from the restored method with the same draws: error and picture of every model."""
    method, provenance = restore_method(files["pcrl"], torch.device("cpu"))
    case = open_cases(provenance, NAME, resolve_folders()).case("toy_01")
    monkeypatch.setattr(type(case), "read_learnable", lambda self, lower, size: np.ones(size, dtype=bool))
    made = reconstruct_case(method, case, 4, 3, torch.device("cpu"))
    again = reconstruct_case(method, case, 4, 4, torch.device("cpu"))
    assert [each.model for each in made] == ["o", "m", "h"]
    for each in made:
        assert each.seen.shape == each.target.shape == each.output.shape == method.configuration.patch_size
        assert each.error == pytest.approx(float(((each.output - each.target) ** 2).mean()), rel=1e-4)
        versions = [np.rot90(np.flip(each.target, axes), turn) for axes in ((), 0, 1, (0, 1)) for turn in (0, 2)]
        blind = float(((each.target - np.mean(versions, axis=0)) ** 2).mean())
        assert each.error_untold == pytest.approx(blind, rel=1e-4)
    assert not (made[0].target == again[0].target).all()


def test_features_of_the_weights_or_as_asked_for(files):
    for name, asked, kind in (("2d", None, "single"), ("2d", "pyramid", "pyramid"), ("hybrid", None, "pyramid")):
        network = dense_network_of(open_checkpoint(files[name]), asked, torch.device("cpu"))
        assert network.kind == kind


def test_loaded_weights_are_those_of_the_file(files):
    network = dense_network_of(open_checkpoint(files["3d"]), None, torch.device("cpu"))
    stored = read_checkpoint(files["3d"])[0]["network_weights"]
    assert all(torch.equal(value, stored[name]) for name, value in network.network.state_dict().items())
    assert not network.network.training


def test_decoder_that_was_not_pretrained_is_told(files, capsys):
    run("embedding", "-w", files["hybrid"])
    assert "Warning: pix2rep does not pretrain the decoder" in capsys.readouterr().out


def test_latest_weights(files, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    assert "no finished pretraining for weights 'latest'" in fails(capsys, "embedding")
    folder = tmp_path / NAME / "model" / "fold_all"
    folder.mkdir(parents=True)
    shutil.copy(files["2d"], folder / "checkpoint_final.pth")
    capsys.readouterr()
    run("embedding")
    printed = capsys.readouterr().out.splitlines()
    assert f"Newest finished pretraining: {folder / 'checkpoint_final.pth'}" in printed
    assert "Slices are shown as stored, because the orientation of the images is not known" in printed


def test_cases_and_points_that_are_not_there(files, capsys):
    line = fails(capsys, "similarity", "-w", files["3d"], "--case", "nobody")
    assert "case nobody" in line
    assert "it has toy_00, toy_01" in line
    assert "case nobody" in fails(capsys, "similarity", "-w", files["3d"], "--others", "toy_01", "nobody")
    assert "case nobody" in fails(capsys, "embedding", "-w", files["3d"], "--case", "nobody")
    assert "case nobody" in fails(capsys, "embedding", "-w", files["3d"], "--others", "nobody")
    line = fails(capsys, "embedding", "-w", files["3d"], "--others", *["toy_01"] * 4)
    assert "--others must name at most 3 cases, got 4" in line
    line = fails(capsys, "similarity", "-w", files["3d"], "--point", *SHAPE)
    assert "point 16 24 20: lies outside case toy_00, whose shape (z y x, preprocessed) is 16 24 20" in line
    assert "lies outside case toy_00" in fails(capsys, "embedding", "-w", files["2d"], "--slice", 16)
    assert "slice 3: these weights are 3D" in fails(capsys, "embedding", "-w", files["3d"], "--slice", 3)
    assert not list(Path().glob("*.png"))


def test_files_that_are_not_there(files, capsys, tmp_path):
    assert "ends in .png" in fails(capsys, "embedding", "-w", files["2d"], "-o", "a.pdf")
    assert "does not exist; create it first" in fails(capsys, "embedding", "-w", files["2d"], "-o", "none/a.png")
    assert "there is no such checkpoint" in fails(capsys, "embedding", "-w", "none.pth")
    (tmp_path / "text.pth").write_text("weights")
    assert "is not a checkpoint" in fails(capsys, "similarity", "-w", "text.pth")
    content, provenance = read_checkpoint(files["2d"])
    weights = dict(list(content["network_weights"].items())[1:])
    write_checkpoint(tmp_path / "part.pth", {"network_weights": weights}, provenance, {})
    assert "do not fit the network of its plan" in fails(capsys, "embedding", "-w", "part.pth")


def test_an_exported_file_is_refused_in_one_line(files, capsys, tmp_path):
    content, provenance = read_checkpoint(files["2d"])
    plans = {key: value for key, value in provenance.plans.items() if key != "pretext"} | {"plans_name": "nnUNetPlans"}
    origin = {"plans_name": provenance.plans_name, "configuration": "2d"}
    exported = dataclasses.replace(provenance, plans=plans, plans_name="nnUNetPlans", origin=origin)
    write_checkpoint(tmp_path / "exported.pth", {"network_weights": content["network_weights"]}, exported, {})
    line = fails(capsys, "embedding", "-w", "exported.pth")
    assert "exported for 2d of nnUNetPlans, without the plan of the pretraining" in line
    assert "use the checkpoint of nnssl_pretrain that the file was exported from" in line
    with pytest.raises(UserError, match="exported.pth: exported for 2d of nnUNetPlans"):
        dense_network_of(open_checkpoint(tmp_path / "exported.pth"), None, torch.device("cpu"))


def test_network_without_decoder_is_refused(files, capsys, monkeypatch):
    monkeypatch.setattr("nnssl.weights.opened_checkpoint.build_network", lambda *arguments: torch.nn.Linear(1, 1))
    assert "Linear has no convolutional decoder" in fails(capsys, "embedding", "-w", files["2d"])


def test_other_data_sets(files, capsys, tmp_path, monkeypatch, drawn):
    """Its cases must be preprocessed by a plan of the same name; another spacing causes a warning, another modality an error."""
    for name in (NAME, OTHER):
        shutil.copytree(files["root"] / "preprocessed" / NAME, tmp_path / name)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    for path in (tmp_path / OTHER).glob("*/toy_00*"):
        path.unlink()
    run("embedding", "-w", files["2d"], "-d", 502)
    assert "Warning" not in capsys.readouterr().out
    assert heads(drawn[0])[0] == "toy_01"
    assert f"cases of {OTHER}" in drawn[0].get_suptitle()

    plan = tmp_path / OTHER / "nnsslPlans.json"
    content = json.loads(plan.read_text())
    content["pretext"]["configurations"]["2d"]["spacing_mm"] = [1.0, 1.3]
    plan.write_text(json.dumps(content))
    run("embedding", "-w", files["2d"], "-d", 502)
    assert "Warning: pretrained at a spacing of (1.0, 1.25) mm" in capsys.readouterr().out

    content["configurations"]["2d"]["normalization_schemes"] = ["CTNormalization"]
    plan.write_text(json.dumps(content))
    assert "use a data set of the same modality" in fails(capsys, "embedding", "-w", files["2d"], "-d", 502)

    plan.unlink()
    line = fails(capsys, "embedding", "-w", files["2d"], "-d", 502)
    assert "there is no such plan" in line
    assert f"-d {OTHER}" in line
    assert "data set 77 was not found" in fails(capsys, "embedding", "-w", files["2d"], "-d", 77)
    shutil.rmtree(next((tmp_path / NAME).glob("*_cases_3d")))
    assert "contains no preprocessed case" in fails(capsys, "embedding", "-w", files["2d"])
