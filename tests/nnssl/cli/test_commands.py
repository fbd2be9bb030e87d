"""What holds for all commands alike: shared flags, one-line errors, and the next command at the end."""

import argparse
import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from nnssl.cli import benchmark, command, demo, evaluate, export, finetune, info, plan_and_preprocess, pretrain, show
from tests.nnssl.cli.test_help import COMMANDS

WEIGHTS = Path("/results/checkpoint_final.pth")


def parsers_of(name: str) -> list[argparse.ArgumentParser]:
    parser = importlib.import_module(COMMANDS[name].partition(":")[0]).make_parser()
    below = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [each for choices in below for each in choices.values()] or [parser]


ALL_ACTIONS = [
    (parser.prog, action) for name in sorted(COMMANDS) for parser in parsers_of(name) for action in parser._actions
]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_takes_verbose_and_has_help_for_each_argument(name):
    for parser in parsers_of(name):
        assert "--verbose" in parser._option_string_actions
        assert all(action.help for action in parser._actions)


def test_a_letter_means_the_same_in_every_command():
    meanings: dict[str, set[str]] = {}
    for _, action in ALL_ACTIONS:
        letters = [option for option in action.option_strings if not option.startswith("--")]
        words = [option.removesuffix("s") for option in action.option_strings if option.startswith("--")]
        for letter in letters:
            meanings.setdefault(letter, set()).update(words)
    assert meanings.pop("-n") == {"--name", "--number"}  # of a new data set, and of patients to select
    assert {letter: words for letter, words in meanings.items() if len(words) != 1} == {}


@pytest.mark.parametrize(
    "flag", ["--device", "--processes", "--seed", "--verbose", "--restart", "--plans", "--weights"]
)
def test_a_flag_is_read_alike_in_every_command(flag):
    found = [(prog, action) for prog, action in ALL_ACTIONS if flag in action.option_strings]
    assert len(found) > 1
    read = {(action.type, str(action.choices), str(action.nargs)) for _, action in found}
    assert len(read) == 1, [(prog, action.type) for prog, action in found]
    # -p of an export is of nnU-Net's own plans, and looked for
    defaults = {action.default for prog, action in found if not (flag == "--plans" and prog == "nnssl_export")}
    assert len(defaults) == 1


def test_words_of_the_help_are_those_of_the_code():
    from nnssl.plan import PLANS_NAME
    from trainers.finetuning.recipes import LENGTHS, MODES
    from trainers.finetuning.schedule import Optimizer, Recipe, Trained
    from trainers.tracking import TRACKERS

    assert tuple(TRACKERS) == command.TRACKERS
    assert command.PLANS_NAME == PLANS_NAME
    assert tuple(MODES) == command.MODES
    assert get_args(Optimizer) == command.OPTIMIZERS
    assert get_args(Recipe) == command.RECIPES
    assert get_args(Trained) == command.TRAINED
    assert command.LENGTHS == LENGTHS


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_an_unknown_flag_ends_in_one_line(name, capsys):
    for parser in parsers_of(name):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(["--nosuch"])
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2
        assert len(lines) == 1
        assert lines[0].startswith(f"{parser.prog}: error: ")
        assert lines[0].endswith(f"; {parser.prog} --help lists the arguments")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "reprec", "--epochs", "many"], "argument --epochs: must be a whole number of at least 1, got many"),
        (["-m", "reprec", "--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got 0"),
        (["-m", "reprec", "--seed", "-1"], "argument --seed: must be a whole number of at least 0, got -1"),
        (["-m", "reprec", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        ([], "the following arguments are required: -m/--method"),
    ],
)
def test_a_wrong_number_is_named_with_what_is_wanted(capsys, arguments, message):
    with pytest.raises(SystemExit):
        pretrain.main(arguments)
    assert f"nnssl_pretrain: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "nan", "inf", "-1", "fast"])
def test_a_rate_is_a_number_above_0(capsys, text):
    with pytest.raises(SystemExit):
        finetune.main(["-d", "4", "--learning-rate", text])
    error = capsys.readouterr().err
    assert error.startswith(f"nnssl_finetune: error: argument --learning-rate: must be a number above 0, got {text}")


# the next command


def last_lines(capsys) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    start = max(number for number, line in enumerate(lines) if line.startswith("next: "))
    assert all(line.startswith(("next: ", "  or: ")) for line in lines[start:])
    return lines[start:]


@pytest.fixture(autouse=True)
def folders(nnunet_folders):
    return nnunet_folders


def test_planning_alone_leads_to_preprocessing(monkeypatch, capsys):
    planned = SimpleNamespace(report=None)
    monkeypatch.setattr("planners.plan_and_preprocess.plan_and_preprocess", lambda *given, **named: planned)
    assert plan_and_preprocess.main(["-d", "501", "--no-preprocessing"]) == 0
    assert last_lines(capsys) == ["next: the same command without --no-preprocessing"]


def test_preprocessing_leads_to_a_pretraining_of_what_was_preprocessed(monkeypatch, capsys):
    from planners.plan_and_preprocess import PreparedDataset

    names = {"3d_fullres": "own_cases_3d", "3d_fullres_hybrid": "own_cases_hybrid", "2d": "own_cases_2d"}
    configurations = {name: SimpleNamespace(case_folder=folder) for name, folder in names.items()}
    plan = SimpleNamespace(
        name="own", dataset_name="Dataset501_X", pretext=SimpleNamespace(configurations=configurations)
    )
    for folder, method, chosen in (
        ("own_cases_3d", "pix2rep_v2", ""),
        ("own_cases_2d", "pix2rep_v2", " -c 2d"),
        ("own_cases_hybrid", "reprec", ""),
    ):
        report = SimpleNamespace(folders=(Path("/preprocessed") / folder,))
        prepared = PreparedDataset(SimpleNamespace(), plan, report)
        monkeypatch.setattr("planners.plan_and_preprocess.plan_and_preprocess", lambda *a, made=prepared, **b: made)
        assert plan_and_preprocess.main(["-d", "501", "-p", "own"]) == 0
        (line,) = last_lines(capsys)
        assert (
            line == f"next: nnssl_pretrain -m {method} -d Dataset501_X -p own{chosen} (or another method: nnssl_info)"
        )


def test_pretraining_leads_to_finetuning(monkeypatch, capsys):
    monkeypatch.setattr("trainers.pretraining.pretrain.pretrain", lambda *given, **named: WEIGHTS)
    assert pretrain.main(["-m", "reprec", "--device", "cpu"]) == 0
    assert last_lines(capsys) == [f"next: nnssl_finetune -d LABELLED_ID -w {WEIGHTS}"]


def test_finetuning_leads_to_predictions(monkeypatch, capsys):
    arms = [SimpleNamespace(predict_command=f"nnUNetv2_predict_from_modelfolder -m {arm}") for arm in ("a", "b")]
    monkeypatch.setattr("trainers.finetuning.finetune.finetune", lambda *given, **named: arms)
    assert finetune.main(["-d", "4", "--device", "cpu"]) == 0
    assert last_lines(capsys) == [
        "next: nnUNetv2_predict_from_modelfolder -m a",
        "  or: nnUNetv2_predict_from_modelfolder -m b",
    ]


def test_an_evaluation_leads_to_a_study(monkeypatch, capsys):
    monkeypatch.setattr("nnssl.evaluation.evaluate.evaluate", lambda *given: None)
    assert evaluate.main(["a", "b"]) == 0
    assert last_lines(capsys)[0].startswith("next: nnssl_benchmark ")


def test_a_classification_leads_to_finetuning(monkeypatch, capsys):
    monkeypatch.setattr("nnssl.evaluation.classify.classify", lambda *given: None)
    assert evaluate.main(["--classify", "labels.csv", "-w", str(WEIGHTS)]) == 0
    assert last_lines(capsys) == [f"next: nnssl_finetune -d LABELLED_ID -w {WEIGHTS}"]


def test_a_study_leads_to_its_rest_or_to_finetuning(monkeypatch, capsys):
    argv = ["-d", "4", "-m", "reprec", "--part", "1/2", "--device", "cpu"]
    monkeypatch.setattr("trainers.benchmark.benchmark.benchmark", lambda *given, **named: None)
    assert benchmark.main(argv) == 0
    assert last_lines(capsys) == [f"next: nnssl_benchmark {' '.join(argv)}"]
    monkeypatch.setattr("trainers.benchmark.benchmark.benchmark", lambda *given, **named: "table")
    assert benchmark.main(argv) == 0
    assert last_lines(capsys)[0].startswith("next: nnssl_finetune -d 4 -w CHECKPOINT ")


@pytest.mark.parametrize("form", export.FORMATS)
def test_an_export_leads_to_what_reads_it(monkeypatch, capsys, form):
    plans = {"dataset_name": "Dataset004_Hippocampus", "plans_name": "nnUNetPlans"}
    target = SimpleNamespace(trainer=None, configuration="3d_fullres", plans=plans)
    made = SimpleNamespace(target=target, path=Path("/out"))
    monkeypatch.setattr("nnssl.weights.export.export", lambda *given, **named: made)
    assert export.main([str(WEIGHTS), "--format", form]) == 0
    own = "next: nnUNetv2_train 004 3d_fullres 0 -p nnUNetPlans -pretrained_weights /out"
    assert last_lines(capsys) == [own if form == "nnunet" else "next: nnssl_info /out"]


def test_a_picture_leads_to_finetuning(monkeypatch, capsys):
    monkeypatch.setattr(show, "_open_weights", lambda args: (SimpleNamespace(path=WEIGHTS), None))
    monkeypatch.setattr(show, "_embedding", lambda args, weights, store: None)
    assert show.main(["embedding"]) == 0
    assert last_lines(capsys) == [f"next: nnssl_finetune -d LABELLED_ID -w {WEIGHTS}"]


def test_the_demo_leads_to_its_weights_and_to_ones_own_images(monkeypatch, capsys):
    monkeypatch.setattr("trainers.demo.run_demo", lambda *given: WEIGHTS)
    assert demo.main(["--device", "cpu"]) == 0
    first, second = last_lines(capsys)
    assert first == f"next: nnssl_info {WEIGHTS}"
    assert second.startswith("  or: nnssl_plan_and_preprocess -d ID")


def test_the_installation_leads_to_a_plan(capsys):
    assert info.main([]) == 0
    shown = last_lines(capsys)
    named = {re.split(r"[ ]", line.partition(": ")[2])[0] for line in shown}
    assert named == {"nnssl_plan_and_preprocess", "nnssl_import", "nnssl_demo"}


def test_the_line_for_nnunet_leads_to_its_command_outside_of_what_the_shell_evaluates(capsys):
    assert info.main(["--ext-trainer"]) == 0
    shown = capsys.readouterr()
    (line,) = shown.out.splitlines()
    assert line.startswith("export nnUNet_extTrainer=")
    assert shown.err.startswith("next: nnUNetv2_train ID 3d_fullres all -p nnsslPlans -tr Pix2RepV2Trainer (or ")
