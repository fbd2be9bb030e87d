import importlib
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[3]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
HEAVY = {"torch", "nnunetv2", "SimpleITK", "scipy", "matplotlib", "numpy", "pydantic", "blosc2"}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_imports_nothing_heavy(command):
    """What makes --help slow is imports, so the imports are what is tested; the seconds stand in the benchmarks page."""
    module = COMMANDS[command].partition(":")[0]
    code = (
        "import sys\n"
        f"from {module} import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print('HEAVY', sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"usage: {command}" in done.stdout
    loaded = done.stdout.rpartition("HEAVY")[2]
    assert [name for name in HEAVY if f"'{name}'" in loaded] == []


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_parser_and_command_agree_on_the_name(command):
    module = importlib.import_module(COMMANDS[command].partition(":")[0])
    assert module.make_parser().prog == command
