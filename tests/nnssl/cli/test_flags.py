"""Errors name what the user of a command typed: the flag, and the value in the form "must be ..., got ..."."""

import importlib
import re
from dataclasses import fields

import pytest
import torch

from nnssl.cli.command import flags_of
from nnssl.errors import ArgumentError
from nnssl.evaluation.classify import ClassifySettings
from nnssl.imports.sources import Choices
from nnssl.propagation.propagate import PropagateSettings
from nnssl.study.select import SelectSettings
from nnssl.weights.export_settings import ExportSettings
from planners.settings import PlanSettings
from tests.nnssl.cli.test_help import COMMANDS
from trainers.benchmark.settings import StudySettings
from trainers.demo import DemoSettings
from trainers.finetuning.settings import FinetuneSettings
from trainers.pretraining.settings import PretrainSettings


def module_of(command: str):
    return importlib.import_module(COMMANDS[command].partition(":")[0])


def run(command: str, argv: list[str]) -> int:
    try:
        return module_of(command).main(argv)
    except SystemExit as end:
        return int(str(end.code))


CUDA = [] if torch.cuda.is_available() else [("nnssl_demo", ["--device", "cuda"], "--device")]


@pytest.mark.parametrize(
    ("command", "argv", "flag"),
    [
        # by argparse
        ("nnssl_import", ["/scans", "-n", "A", "-d", "0"], "-d/--dataset"),
        ("nnssl_plan_and_preprocess", ["-d", "501", "--dense-width", "0"], "--dense-width"),
        ("nnssl_plan_and_preprocess", ["-d", "501", "--spacing", "1", "1", "wide"], "--spacing"),
        ("nnssl_pretrain", ["-m", "reprec", "--epochs", "1", "many"], "--epochs"),
        ("nnssl_demo", ["--held-out", "0"], "--held-out"),
        ("nnssl_evaluate", ["a", "b", "--tolerance-mm", "wide"], "--tolerance-mm"),
        ("nnssl_export", ["a.pth", "--least-share", "half"], "--least-share"),
        ("nnssl_show", ["matches", "--points", "0"], "--points"),
        ("nnssl_benchmark", ["-d", "4", "-m", "reprec", "--tolerance-mm", "-1"], "--tolerance-mm"),
        ("nnssl_evaluate", ["--classify", "a.csv", "--patches", "0"], "--patches"),
        # by the library
        ("nnssl_evaluate", ["--classify", "a.csv", "-w", "a.pth", "--folds", "2"], "--folds"),
        ("nnssl_finetune", ["-d", "4", "--warmup", "250000"], "--warmup"),
        ("nnssl_finetune", ["-d", "4", "--mode", "linear", "--optimizer", "sgd"], "--optimizer"),
        *CUDA,
    ],
)
def test_a_wrong_value_is_named_by_its_flag(nnunet_folders, capsys, command, argv, flag):
    assert run(command, argv) == 2
    error = capsys.readouterr().err
    assert re.match(rf"{command}( \w+)?: error: (argument {flag}:|{flag}) must be .+, got \S+", error), error
    assert len(error.splitlines()) == 1


def test_a_share_is_named_by_its_flag(capsys, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"network_weights": {}}, path)
    assert run("nnssl_export", [str(path), "--least-share", "2.0"]) == 2
    assert "nnssl_export: error: --least-share must be between 0 and 1, got 2.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "settings", "without_flag"),
    [
        ("nnssl_import", Choices, set()),
        ("nnssl_plan_and_preprocess", PlanSettings, {"preprocess"}),  # the flag is its opposite
        ("nnssl_pretrain", PretrainSettings, {"stages"}),  # only from Python
        ("nnssl_finetune", FinetuneSettings, set()),
        ("nnssl_export", ExportSettings, set()),
        ("nnssl_evaluate", ClassifySettings, set()),
        ("nnssl_select", SelectSettings, set()),
        ("nnssl_propagate", PropagateSettings, set()),
        ("nnssl_benchmark", StudySettings, {"pretrain_overrides"}),  # made of two flags
        ("nnssl_demo", DemoSettings, set()),
    ],
)
def test_every_setting_of_the_library_has_its_flag(command, settings, without_flag):
    flags = flags_of(module_of(command).make_parser())
    assert {field.name for field in fields(settings)} - set(flags) == without_flag


def test_flags_replace_names_but_no_parts_of_paths():
    error = ArgumentError("labels must be 1 to 3, got 4 (/data/labels/labels.json, labels-1)", "labels")
    assert error.with_flags({"labels": "--labels"}) == (
        "--labels must be 1 to 3, got 4 (/data/labels/labels.json, labels-1)"
    )
    assert ArgumentError("mode must be linear.", "mode").with_flags({"mode": "--mode"}) == "--mode must be linear."
    assert ArgumentError("stages must be given", "stages").with_flags({}) == "stages must be given"
