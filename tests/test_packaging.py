"""What a wheel and a source distribution hold, read off the files that decide it. Nothing is built here."""

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
