"""Content of the wheel and the source distribution, and declared dependencies, read from the files that decide them."""

import ast
import fnmatch
import re
import sys
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

import nnssl

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
TOP = ("nnssl", "planners", "trainers")
INSTALLED_BY = {
    "PIL": "Pillow",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "distributed": "dask",
    "mkdocs": "mkdocs-material",
    "markdown": "mkdocs-material",
    "griffe": "mkdocstrings",
}
"""Imported packages and the declared dependency that installs each, where the names differ."""
NOT_IMPORTED = {"batchgenerators": "nnU-Net's data loading and augmentation processes build on it"}
"""Declared dependencies that no file imports, and the reason for each."""


def files_of_packages() -> list[Path]:
    return [
        path.relative_to(ROOT)
        for name in TOP
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]


def test_wheel_holds_every_file_of_the_packages():
    packages = find_namespace_packages(str(ROOT), include=SETUPTOOLS["packages"]["find"]["include"])
    missing = []
    for path in files_of_packages():
        package = ".".join(path.parent.parts)
        patterns = SETUPTOOLS["package-data"].get(package, [])
        held = path.suffix == ".py" or any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
        if package not in packages or not held:
            missing.append(str(path))
    assert len(files_of_packages()) > 100
    assert not missing, "pyproject.toml: packages.find and package-data leave these out"


def test_wheel_holds_nothing_that_runs_leave_behind(tmp_path):
    for name in (*TOP, "nnssl_workspace/raw", "nnssl_demo/raw", "tests"):
        (tmp_path / name).mkdir(parents=True)
    packages = find_namespace_packages(str(tmp_path), include=SETUPTOOLS["packages"]["find"]["include"])
    assert sorted(packages) == sorted(TOP)


def test_source_distribution_holds_tests_and_documentation():
    lines = (ROOT / "MANIFEST.in").read_text().splitlines()
    grafted = {line.split()[1] for line in lines if line.startswith("graft ")}
    included = {name for line in lines if line.startswith("include ") for name in line.split()[1:]}
    assert {"tests", "documentation", ".ci"} <= grafted
    assert "mkdocs.yml" in included
    assert {page.name for page in ROOT.glob("*.md")} - {"README.md"} <= included  # the README is always taken


def test_version_is_written_once():
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "nnssl.version.__version__"}


def test_changelog_begins_with_the_version_of_the_code():
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert next(version for version in versions if version != "Unreleased") == nnssl.__version__


def imported_by(*folders: str) -> set[str]:
    """Return the distributions that the files of some folders import, including lazy imports."""
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module))
    packages = {name.partition(".")[0] for name in found} - {*TOP, "tests", "tools"} - sys.stdlib_module_names
    return {normalise(INSTALLED_BY.get(name, name)) for name in packages}


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """Return the names of the dependencies of the project, or of some of its extras."""
    project = PYPROJECT["project"]
    lines = [line for extra in extras for line in project["optional-dependencies"][extra]] or project["dependencies"]
    return {normalise(re.split(r"[\[<>=!~; ]", line)[0]) for line in lines}


def test_every_import_of_the_packages_is_a_declared_dependency():
    extras = declared("dask", "tensorboard", "wandb")
    assert imported_by(*TOP) - declared() == extras - {"tensorboard"}  # torch imports that one
    assert imported_by("tests") - declared() <= extras | declared("test") | {
        "tomli"
    }  # the oldest Python has no tomllib
    assert imported_by("tools") - declared() <= declared("docs")


def test_every_declared_dependency_is_imported_or_has_a_reason():
    assert declared() - imported_by(*TOP) == set(NOT_IMPORTED)
