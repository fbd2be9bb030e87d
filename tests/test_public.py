"""The names that users import from ``nnssl``: light, complete, and with examples that work."""

import ast
import doctest
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nnssl
from nnssl.data.phantoms import write_phantom_dataset
from nnssl.log import silence
from tests.trainers.phantom_study import narrow_unet

SHAPE, SPACING_MM = (16, 24, 20), (2.5, 1.5, 1.7)
IN_ORDER = (
    "import_dataset",
    "plan_and_preprocess",
    "read_plan",
    "pretrain",
    "export",
    "finetune",
    "segment",
    "evaluate",
    "classify",
    "select",
    "propagate",
    "preview",
    "benchmark",
)
"""Functions with an example; each uses what the ones before it have written."""


def test_importing_nnssl_imports_nothing_heavy():
    code = (
        "import sys, nnssl; dir(nnssl); nnssl.METHODS; nnssl.UserError; "
        "sys.exit(bool({'torch', 'numpy', 'nnunetv2', 'pydantic', 'planners', 'trainers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there():
    for name in nnssl.__all__:
        assert getattr(nnssl, name) is not None
    assert set(nnssl.__all__) <= set(dir(nnssl))
    with pytest.raises(AttributeError, match="'nnssl' has no attribute 'nope'"):
        nnssl.nope  # noqa: B018


def test_type_checkers_see_what_is_imported():
    tree = ast.parse(Path(nnssl.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    shown = {alias.asname: node.module for node in block.body for alias in node.names}
    assert shown == nnssl._MODULES
    assert {"__version__", *shown} == set(nnssl.__all__)


def test_no_function_has_more_than_eight_parameters():
    for name in IN_ORDER:
        assert len(inspect.signature(getattr(nnssl, name)).parameters) <= 8, name


def test_settings_have_defaults_and_say_what_each_is():
    for name in nnssl.__all__:
        if name.endswith("Settings"):
            cls = getattr(nnssl, name)
            described = inspect.getdoc(cls)
            assert all(f"\n    {field}: " in described for field in cls.__dataclass_fields__), name


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A working folder with scans, and labelled phantoms in nnU-Net's raw folder."""
    folder = tmp_path_factory.mktemp("workspace")
    scans = write_phantom_dataset(folder, "Dataset900_Scans", 6, 0, SHAPE, SPACING_MM, labelled=False)
    (scans / "imagesTr").rename(folder / "scans")
    for number, image in enumerate(sorted((folder / "scans").iterdir())):
        image.rename(image.with_name(f"scan_{number}.nii.gz"))
    raw = folder / "nnssl_workspace" / "raw"
    write_phantom_dataset(raw, "Dataset004_MyTask", 8, 0, SHAPE, SPACING_MM, first_case=6)
    return folder


def narrow_networks(path: Path) -> None:
    """Narrow the U-Nets of a plan, so that the examples take seconds."""
    content = json.loads(path.read_text())
    for configuration in content["configurations"].values():
        narrow_unet(configuration)
    path.write_text(json.dumps(content))


def test_examples_of_the_docstrings_work(workspace, monkeypatch):
    """They are run in one session, in the order in which a user would, on phantoms."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("nnssl.evaluation.cross_validation.REPEATS", 1)
    monkeypatch.setattr("trainers.pretraining.retrieval_run.PATCHES", 6)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{name}", raising=False)
    known: dict[str, object] = {"nnssl": nnssl, "Path": Path}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    before = dict(os.environ)
    for name in IN_ORDER:
        function = getattr(nnssl, name)
        example = doctest.DocTestParser().get_doctest(inspect.getdoc(function), known, name, None, 0)
        assert example.examples, f"nnssl.{name} has no example"
        with silence():
            runner.run(example, clear_globs=False)
        known |= example.globs
        assert runner.failures == 0, name
        if name == "plan_and_preprocess":
            narrow_networks(Path(nnssl.resolve_folders().preprocessed) / "Dataset501_Scans" / "nnsslPlans.json")
    os.environ.clear()
    os.environ.update(before)


def test_examples_are_shown_on_the_page_of_the_public_names():
    page = Path(nnssl.__file__).parents[1] / "documentation" / "api" / "nnssl.md"
    assert page.read_text().startswith("# ")
    for name in set(nnssl.__all__) - {"__version__"}:
        module = importlib.import_module(nnssl._MODULES[name])
        assert f"::: {module.__name__}.{name}" in page.read_text(), name
