"""The shape of the code, read from the source: who may import whom, as documentation/architecture.md says (lazy imports count
too), how long files and functions are, and what they may be called."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOUNDATION = {
    "nnssl.version",
    "nnssl.errors",
    "nnssl.interrupts",
    "nnssl.locks",
    "nnssl.log",
    "nnssl.devices",
    "nnssl.files",
    "nnssl.schema",
    "nnssl.sizes",
    "nnssl.draws",
    "nnssl.paths",
    "nnssl.environment",
    "nnssl.tables",
    "nnssl.palette",
    "nnssl.plan",
}
PUBLIC = "nnssl (public names)"
"""The package itself, ``nnssl/__init__.py``, which hands names on."""
ALLOWED: dict[str, set[str]] = {
    "nnssl.distributed": set(),
    "nnssl.momentum": set(),
    "nnssl.collapse": set(),
    "nnssl.checkpoint": set(),
    "nnssl.views": set(),
    "nnssl.losses": {"nnssl.distributed"},
    "nnssl.networks": {"nnssl.distributed"},
    "nnssl.methods": {
        "nnssl.collapse",
        "nnssl.distributed",
        "nnssl.losses",
        "nnssl.momentum",
        "nnssl.networks",
        "nnssl.views",
    },
    "nnssl.data": set(),
    "nnssl.imports": {"nnssl.data"},
    "nnssl.weights": {"nnssl.checkpoint", "nnssl.data", "nnssl.methods", "nnssl.networks"},
    "nnssl.matching": {"nnssl.data", "nnssl.networks", "nnssl.views"},
    "nnssl.evaluation": {
        "nnssl.collapse",
        "nnssl.data",
        "nnssl.losses",
        "nnssl.networks",
        "nnssl.views",
        "nnssl.weights",
    },
    "nnssl.pictures": {
        "nnssl.data",
        "nnssl.evaluation",
        "nnssl.matching",
        "nnssl.methods",
        "nnssl.networks",
        "nnssl.views",
        "nnssl.weights",
    },
    "nnssl.study": {"nnssl.data", "nnssl.evaluation", "nnssl.pictures", "nnssl.weights"},
    "nnssl.propagation": {
        "nnssl.data",
        "nnssl.evaluation",
        "nnssl.matching",
        "nnssl.networks",
        "nnssl.pictures",
        "nnssl.study",
        "nnssl.weights",
    },
    "planners": {"nnssl.data", "nnssl.methods", "nnssl.momentum", "nnssl.networks", "nnssl.views"},
    "trainers": set(),
    "trainers.precision": {"nnssl.networks"},
    "trainers.launch": set(),
    "trainers.pace": set(),
    "trainers.tracking": set(),
    "trainers.finetuning": {
        "nnssl.checkpoint",
        "nnssl.data",
        "nnssl.distributed",
        "nnssl.evaluation",
        "nnssl.momentum",
        "nnssl.networks",
        "nnssl.study",
        "nnssl.weights",
        "planners",
        "trainers.launch",
        "trainers.pace",
        "trainers.precision",
        "trainers.tracking",
    },
    "trainers.pretraining": {
        "nnssl.checkpoint",
        "nnssl.collapse",
        "nnssl.data",
        "nnssl.distributed",
        "nnssl.evaluation",
        "nnssl.matching",
        "nnssl.methods",
        "nnssl.momentum",
        "nnssl.networks",
        "nnssl.weights",
        "planners",
        "trainers.finetuning",
        "trainers.launch",
        "trainers.pace",
        "trainers.precision",
        "trainers.tracking",
    },
    "trainers.benchmark": {
        "nnssl.checkpoint",
        "nnssl.data",
        "nnssl.evaluation",
        "nnssl.methods",
        "nnssl.networks",
        "nnssl.study",
        "nnssl.weights",
        "planners",
        "trainers.finetuning",
        "trainers.pace",
        "trainers.precision",
        "trainers.pretraining",
    },
    "trainers.demo": {
        "nnssl.data",
        "nnssl.methods",
        "nnssl.study",
        "planners",
        "trainers.benchmark",
        "trainers.finetuning",
        "trainers.pretraining",
    },
    "trainers.nnunet_ext": {"trainers.finetuning", "trainers.pretraining"},
    "nnssl.cli": {"nnssl", "planners", "trainers"},
    PUBLIC: {"nnssl", "planners", "trainers"},
}
"""Which rooms each room may import, from the lowest room to the highest."""


def modules() -> dict[str, Path]:
    found = {}
    for package in ("nnssl", "planners", "trainers"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    known = modules()
    own = {name for name in names if name in known}
    # ``from nnssl.x import y`` names both the package and the module; the module is what counts
    return {name for name in own if not any(other.startswith(f"{name}.") for other in own)}


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def room_of(name: str) -> str | None:
    """Return the room that a module is in, None for the ground floor."""
    if name in FOUNDATION:
        return None
    if name == "nnssl":
        return PUBLIC
    return max((room for room in ALLOWED if within(name, {room})), key=len, default=None)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_stay_in_their_layer(name):
    room = room_of(name)
    if room is None:
        assert name in FOUNDATION, f"{name}: say in ALLOWED which layer it belongs to"
        rooms: set[str] = set()
    else:
        rooms = ALLOWED[room] | {room}
    foreign = {found for found in imports_of(modules()[name]) if not (found in FOUNDATION or within(found, rooms))}
    assert not foreign, f"{name} imports {sorted(foreign)}"


def test_every_arrow_points_down():
    """A room imports rooms that stand below it in the table only, so there are no circles either; the commands are on top."""
    rooms = list(ALLOWED)
    for number, room in enumerate(rooms[:-2]):
        assert ALLOWED[room] <= set(rooms[:number]), room
    assert rooms[-2:] == ["nnssl.cli", PUBLIC]


def test_no_arrow_is_allowed_that_nobody_uses():
    used: dict[str, set[str]] = {room: set() for room in ALLOWED}
    for name, path in modules().items():
        room = room_of(name)
        used[room or ""] = used.get(room or "", set()) | {found for found in map(room_of, imports_of(path)) if found}
    exact = {room: allowed for room, allowed in ALLOWED.items() if room not in ("nnssl.cli", PUBLIC)}
    assert {room: allowed - used[room] for room, allowed in exact.items() if allowed - used[room]} == {}


def test_the_library_imports_neither_planners_nor_trainers():
    """The commands and the public names aside: ``nnssl`` is what both stand on."""
    for name, path in modules().items():
        if within(name, {"nnssl"}) and not within(name, {"nnssl.cli"}) and name != "nnssl":
            assert {m for m in imports_of(path) if within(m, {"planners", "trainers"})} == set(), name


def test_nothing_is_unpickled():
    """Ruff refuses pickle itself; torch and numpy unpickle too unless they are told not to."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "joblib.load"):
                arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                safe = arguments.get("weights_only") == "True" or (
                    ast.unparse(node.func) == "np.load" and arguments.get("allow_pickle", "False") == "False"
                )
                assert safe, f"{name}, line {node.lineno}"


def test_methods_do_not_import_one_another():
    shared = {"nnssl.methods", "nnssl.methods.protocol", "nnssl.methods.settings", "nnssl.methods.point_features"}
    for name, path in modules().items():
        if name.startswith("nnssl.methods."):
            assert {m for m in imports_of(path) if m.startswith("nnssl.methods")} <= shared, name


def test_index_of_methods_is_light():
    """The commands list the methods in their help, so the index must not import torch."""
    code = "import sys, nnssl.methods; sys.exit('torch' in sys.modules or 'nnunetv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


LONGEST_FILE, LONGEST_FUNCTION = 400, 60
"""Lines; of a function without its docstring."""
LONGER_FILES = {
    "nnssl.methods.pcrl": (430, "one method is one file: the contrast, and what each model is asked to restore"),
    "nnssl.methods.alice": (415, "one method is one file: masked modelling, and two comparisons with a teacher"),
    "nnssl.methods.pixelglobal": (
        410,
        "one method is one file: two losses, and the weights and targets of the teacher",
    ),
    "nnssl.methods.sam": (
        410,
        "one method is one file: fine and coarse embeddings, and how their negatives are ranked",
    ),
}
"""How long these may be, and why they are one thing."""
LONGER_FUNCTIONS: dict[tuple[str, str], tuple[int, str]] = {
    ("trainers.finetuning.finetune", "finetune"): (75, "checks, then the steps of a fine-tuning in their order"),
}


def lengths_of_functions(path: Path) -> dict[str, int]:
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
            found[node.name] = max(found.get(node.name, 0), node.end_lineno - node.lineno + 1 - docstring)
    return found


def test_files_are_about_one_thing():
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    allowed = {name: LONGER_FILES.get(name, (LONGEST_FILE, ""))[0] for name in lengths}
    assert {name: length for name, length in lengths.items() if length > allowed[name]} == {}


def test_functions_are_about_one_thing():
    lengths = {(name, each): n for name, path in modules().items() for each, n in lengths_of_functions(path).items()}
    allowed = {each: LONGER_FUNCTIONS.get(each, (LONGEST_FUNCTION, ""))[0] for each in lengths}
    assert {each: length for each, length in lengths.items() if length > allowed[each]} == {}


def test_modules_are_nouns_of_the_field():
    empty = {"util", "utils", "helper", "helpers", "common", "misc", "tools", "base"}
    assert [name for name in modules() if empty & set(re.split(r"[._]", name))] == []


def test_no_hyper_parameter_is_a_class_name():
    """A value in a name stands behind letters and without a meaning of its own, as in ``TrainerLR1e4``; ``Pix2Rep`` is a name."""
    classes = [
        (name, node.name)
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    value = re.compile(r"\d(?:$|[eE_x]?\d|ep|[kK]$)|_\d|(?i:lr|bs|wd|epochs?|batch|seed|ratio|temp)\d")
    assert [each for each in classes if value.search(each[1].replace("V2", ""))] == []
