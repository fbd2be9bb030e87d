"""Another package of the name nnssl in the environment."""

import sys
from importlib.metadata import EntryPoint

from nnssl import environment
from nnssl.cli.command import CommandParser, run_command
from nnssl.cli.info import explain_installation
from nnssl.environment import other_nnssl


def test_another_package_of_this_name_is_noticed(tmp_path, monkeypatch):
    before = other_nnssl()
    assert not any(str(tmp_path) in text for text in before)
    (tmp_path / "nnssl" / "data").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert other_nnssl() == before  # a folder of this name alone is none
    (tmp_path / "nnssl" / "adaptation_planning").mkdir()
    assert str(tmp_path / "nnssl") in other_nnssl()
    assert any("Warning: MIC-DKFZ's package" in line and str(tmp_path) in line for line in explain_installation())


def test_every_command_warns(tmp_path, monkeypatch, capsys):
    parser = CommandParser("nnssl_any")
    assert run_command(parser, lambda args: None, []) == 0
    assert "MIC-DKFZ" not in capsys.readouterr().err
    (tmp_path / "nnssl" / "training").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert run_command(parser, lambda args: None, []) == 0
    shown = capsys.readouterr()
    assert f"Warning: MIC-DKFZ's package, also called nnssl, is in this environment ({tmp_path / 'nnssl'})" in shown.err
    assert shown.out == ""


def test_its_commands_are_noticed(monkeypatch):
    ours = EntryPoint("nnssl_pretrain", "nnssl.cli.pretrain:main", "console_scripts")
    theirs = EntryPoint("nnssl_plan_and_preprocess", "nnssl.experiment_planning.entry:main", "console_scripts")
    monkeypatch.setattr(environment, "entry_points", lambda group: [ours])
    monkeypatch.setattr(sys, "path", [])
    assert other_nnssl() == []
    assert not any("Warning" in line for line in explain_installation())
    monkeypatch.setattr(environment, "entry_points", lambda group: [ours, theirs])
    assert other_nnssl() == ["command nnssl_plan_and_preprocess (nnssl.experiment_planning.entry:main)"]
