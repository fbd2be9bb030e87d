"""The pages against the code: links, commands, flags, settings and file formats that are shown must be the real ones."""

import argparse
import ast
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import pytest

from nnssl import plan as plan_module
from nnssl.checkpoint import Provenance
from nnssl.methods import AUTO, METHODS, Stage, find_method, find_stage
from nnssl.methods.settings import resolve_settings, split_overrides
from planners.case_record import CaseRecord
from planners.fingerprint import Fingerprint
from planners.presets import PRESETS
from tests.nnssl.methods.tiny_configuration import make_configuration
from tests.test_layers import ALLOWED
from tools.gather_deviations import PAGE, gather, section_of
from tools.picture_of_stages import COMMANDS
from trainers.benchmark.arms import parse_arms

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
DOCUMENTATION = ROOT / "documentation"
PAGES = sorted([*ROOT.glob("*.md"), *DOCUMENTATION.rglob("*.md")])
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
NNUNET = {
    script.name: script
    for script in importlib.metadata.entry_points(group="console_scripts")
    if script.name.startswith("nnUNetv2_")
}
OTHERS_FLAGS = {"--help", "--c"}
"""Flags in the text that are no flags of nnssl's own parsers to look up: argparse's, and nnU-Net's."""
TEMPLATE = (
    "Idea",
    "Stages",
    "What it needs",
    "Defaults",
    "Deviations",
    "What leaves",
    "How to read the curves",
    "Trivial baseline",
    "Known limits",
    "Results",
)
"""Headings of a method's page, in this order; what is a method's own stands below one of them."""
HEADERS = {
    "Stages": "| stage | trained | frozen | loss | trainer |",
    "Defaults": "| key | default | in a run | from |",
    "Deviations": "| paper or code | here | why |",
}
SCHEDULE = {field.name for field in fields(plan_module.StageSchedule)}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def parser_of(command: str) -> argparse.ArgumentParser:
    return importlib.import_module(SCRIPTS[command].partition(":")[0]).make_parser()


def parsers_of(command: str) -> list[argparse.ArgumentParser]:
    """Return the parser of a command and those of its subcommands."""
    parser = parser_of(command)
    subparsers = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(each for choices in subparsers for each in choices.values())]


def split_code(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return a page's text without its fenced blocks, and the blocks as (language, content)."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL), blocks


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", split_code(text)[0].replace("\n", " "))


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", split_code(page.read_text())[0], flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_rows(text: str, heading: str | None = None) -> list[list[str]]:
    """Return the cells of all table rows of a page, or of the section under a heading, header rows left out."""
    if heading is not None:
        start = text.index(heading) + len(heading)
        text = re.split(r"^(?:#|Stage `)", text[start:], flags=re.MULTILINE)[0]
    lines = text.splitlines()
    rows = [line for line, below in zip(lines, [*lines[1:], ""], strict=True) if not below.startswith("|---")]
    rows = [line for line in rows if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows]


def shown_lines() -> list[tuple[str, str]]:
    """Return (page, line) for every line of a block, and for every piece of code in the text that has arguments."""
    lines = []
    for page in PAGES:
        text = page.read_text()
        calls = [line for _, block in split_code(text)[1] for line in block.replace("\\\n", " ").splitlines()]
        lines += [(name_of(page), call) for call in calls + [span for span in code_spans(text) if " " in span]]
    return lines


def shown_commands() -> list[tuple[str, str]]:
    """Return (page, command line) for every call of a command of nnssl."""
    found = set()
    for page, call in shown_lines():
        # up to a comment or the end of a shell construct; a name inside a longer path or name is no call
        for line in re.findall(r"(?:^|[ /(])(nnssl_\w+(?: [^#;&|\")]*)?)(?=$|[;&|\")])", call.partition("#")[0]):
            if line.split()[0] in SCRIPTS:
                found.add((page, line.strip()))
    return sorted(found)


def shown_calls(pattern: str) -> list[tuple[str, str]]:
    """Return (page, line up to a comment) for every shown line that begins with a pattern."""
    calls = [(page, call.partition("#")[0].strip()) for page, call in shown_lines()]
    return sorted({(page, call) for page, call in calls if re.match(pattern, call)})


def parse_as(call: Callable[[], object], arguments: list[str]) -> argparse.Namespace:
    """Return what the parser of a program makes of arguments, none of them unknown; the program itself does not run."""
    found = []
    with pytest.MonkeyPatch.context() as patched:

        def parse_only(parser, *_):
            patched.undo()
            found.append(parser.parse_args(arguments))
            raise SystemExit

        patched.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patched.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)  # nnU-Net passes unknown flags over
        with pytest.raises(SystemExit):
            call()
    assert found, f"refused: {' '.join(arguments)}"
    return found[0]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", split_code(page.read_text())[0])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{name_of(page)}: {target} does not exist"
        assert not anchor or anchor in anchors_of(there), f"{name_of(page)}: {target} has no such heading"


def links_of(page: Path) -> set[Path]:
    return {(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())}


def test_index_lists_every_page():
    index = DOCUMENTATION / "index.md"
    assert [name_of(page) for page in PAGES if page != index and page not in links_of(index)] == []
    assert index in links_of(ROOT / "README.md")


@pytest.fixture(scope="module")
def site_hooks():
    pytest.importorskip("mkdocs", reason="the documentation site needs the extra docs")
    return importlib.import_module("tools.site_hooks")


def test_site_has_every_page_in_its_navigation(site_hooks):
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"([\w/]+\.md)$", navigation, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == {site_hooks.place_in_site(name_of(page)) for page in PAGES}


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("README.md", "[plan](documentation/plan.md#presets)", "[plan](plan.md#presets)"),
        ("README.md", "![Stages](documentation/stages.png)", "![Stages](stages.png)"),
        ("README.md", "[pages](documentation/index.md)", "[pages](contents.md)"),
        ("documentation/methods/sam.md", "[why](../../README.md#methods)", "[why](../index.md#methods)"),
        ("documentation/methods/sam.md", "[how](../plan.md), [`here`](#idea)", "[how](../plan.md), [`here`](#idea)"),
        ("documentation/plan.md", "[`plan.py`](../nnssl/plan.py)", "`plan.py`"),
        ("documentation/plan.md", "[gone](../nnssl/gone.py)", "[gone](../nnssl/gone.py)"),
        ("documentation/plan.md", "[nnU-Net](https://a.b/c.md)", "[nnU-Net](https://a.b/c.md)"),
        ("documentation/plan.md", "```\n[a](../README.md)\n```", "```\n[a](../README.md)\n```"),
    ],
)
def test_links_of_the_site_lead_where_those_of_the_repository_do(site_hooks, source, link, expected):
    assert site_hooks.links_of_site(link, source) == expected


def test_every_picture_is_shown_and_described():
    shown = set()
    for page in PAGES:
        for words, file in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text()):
            assert len(words.split()) > 5, f"{name_of(page)}: {file} has no words for those who do not see it"
            shown.add((page.parent / file).resolve())
    assert {path for path in DOCUMENTATION.rglob("*") if path.suffix in {".png", ".svg", ".jpg"}} == shown


def test_commands_are_shown_at_all():
    assert {line.split()[0] for _, line in shown_commands()} == set(SCRIPTS)
    assert len(shown_commands()) > 30


@pytest.mark.parametrize(("page", "line"), shown_commands())
def test_shown_command_parses(page, line):
    command, *arguments = shlex.split(line)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            parser_of(command).parse_args(arguments)
    except SystemExit:
        pytest.fail(f"{page}: {line}: {message.getvalue().strip().splitlines()[-1]}")


@pytest.mark.parametrize(("page", "line"), shown_calls("nnUNetv2_"))
def test_shown_command_of_nnunet_parses(page, line):
    command, *arguments = shlex.split(line)
    if arguments == ["-pretrained_weights"]:
        return  # the name of the flag, not a call
    args = parse_as(NNUNET[command].load(), arguments)
    given = getattr(args, "tr", "nnUNetTrainer")
    trainers = given if isinstance(given, list) else [given]
    ours = {stage.trainer for method in METHODS.values() for stage in method.stages}
    folder = Path(importlib.util.find_spec("nnunetv2").origin).parent / "training" / "nnUNetTrainer"
    theirs = {name for path in folder.rglob("*.py") for name in re.findall(r"^class (\w+)", path.read_text(), re.M)}
    for trainer in trainers:
        assert trainer in ours | theirs or trainer.startswith("nnssl_"), (
            f"{page}: {line}: there is no trainer {trainer}"
        )


@pytest.mark.parametrize(("page", "line"), shown_calls(r"python -m tools\."))
def test_shown_measurement_parses(page, line):
    module, *arguments = shlex.split(line.replace("(", "").replace(")", ""))[2:]
    program = ROOT / (module.replace(".", "/") + ".py")
    assert program.exists(), f"{page}: {line}"
    parse_as(importlib.import_module(module).main, arguments)


@pytest.mark.parametrize("program", sorted((ROOT / "tools").glob("*.py")), ids=lambda program: program.stem)
def test_programs_for_developers_know_their_arguments(program):
    """So that ``--help`` prints help, instead of starting the work."""
    if "__main__" in program.read_text():
        assert "argparse.ArgumentParser(description=__doc__" in program.read_text()


def test_pages_say_where_measurements_run():
    for name in {page for page, _ in shown_calls(r"python -m tools\.")}:
        assert "checkout" in (ROOT / name).read_text(), f"{name}: an installed nnssl has no tools/"


def check_settings(stages: Sequence[Stage], overrides: Sequence[str]) -> None:
    implementations = {stage.name: stage.load() for stage in stages}
    for stage, given in split_overrides(overrides, implementations).items():
        resolve_settings(implementations[stage].defaults, {}, given)


def test_shown_study_can_be_asked_for():
    for _, line in shown_commands():
        if line.startswith("nnssl_benchmark"):
            args = parser_of("nnssl_benchmark").parse_args(shlex.split(line)[1:])
            for arm in parse_arms([arm for arm in args.arms if not arm.endswith(".pth")]):
                check_settings([find_stage(stage)[1] for stage in arm.stages], arm.overrides)


def test_shown_pretraining_can_be_asked_for():
    for page, line in shown_commands():
        if line.startswith("nnssl_pretrain"):
            args = parser_of("nnssl_pretrain").parse_args(shlex.split(line)[1:])
            if args.method == AUTO:
                assert set(args.candidates) <= set(METHODS), f"{page}: {line}"
                continue
            method = find_method(args.method)
            assert args.configuration in {None, *method.configurations}, f"{page}: {line}"
            check_settings(method.stages, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_in_the_text_exist(page):
    known = {
        option for command in SCRIPTS for parser in parsers_of(command) for option in parser._option_string_actions
    }
    for span in code_spans(page.read_text()):
        for flag in re.findall(r"(?:^|(?<=[ /]))--[a-z][a-z-]*", span):
            foreign = re.match(r"(ruff|mypy|mkdocs|dask|pip|torchrun|python) ", span)
            assert foreign or flag in known | OTHERS_FLAGS, f"{name_of(page)}: no command has {flag}"


@pytest.mark.parametrize("command", sorted(SCRIPTS))
def test_every_flag_is_documented(command):
    pages = [page.read_text() for page in DOCUMENTATION.rglob("*.md") if command in page.read_text()]
    assert pages, f"no page mentions {command}"
    text = "\n".join(pages)
    for action in [action for parser in parsers_of(command) for action in parser._actions]:
        flag = action.option_strings[-1] if action.option_strings else None
        shown = flag is None or any(
            re.search(rf"(?<![\w-]){option}(?![\w-])", text) for option in action.option_strings
        )
        assert shown, f"{command} {flag} is on no page that mentions the command"


@pytest.mark.parametrize("method", METHODS)
def test_method_pages_follow_one_template(method):
    text = (DOCUMENTATION / "methods" / f"{method}.md").read_text()
    assert tuple(re.findall(r"^## (.+)$", split_code(text)[0], flags=re.MULTILINE)) == TEMPLATE
    for heading, header in HEADERS.items():
        tables = re.findall(
            r"^(\|.*)\n\|---", re.split(r"^### ", section_of(text, heading), flags=re.MULTILINE)[0], flags=re.MULTILINE
        )
        assert tables, f"{method}: no table below {heading}"
        assert set(tables) == {header}, f"{method}: {heading}"


def test_no_page_is_of_an_unknown_method():
    assert {page.stem for page in (DOCUMENTATION / "methods").glob("*.md")} == set(METHODS)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_stages_and_trainers_are_those_of_the_code(method):
    rows = table_rows((DOCUMENTATION / "methods" / f"{method.name}.md").read_text(), "## Stages")
    shown = [(row[0].strip("`"), row[-1].strip("`")) for row in rows]
    assert shown == [(stage.name, stage.trainer) for stage in method.stages]


def test_deviations_are_those_of_the_method_pages():
    assert PAGE.read_text() == gather(), "python -m tools.gather_deviations writes the page again"


def test_methods_are_compared_as_the_index_has_them():
    rows = table_rows((DOCUMENTATION / "methods.md").read_text().split("\n## ")[0])
    expected = []
    for method in METHODS.values():
        passes = [
            f"encoder {stage.encoder_graphs} + {stage.encoder_passes}, decoder {stage.decoder_graphs}"
            for stage in method.stages
        ]
        batches = [str(stage.needs.useful_batch) for stage in method.stages]
        expected.append((method.name, method.configurations, ", then ".join(batches), "; then ".join(passes)))
    assert [(code_spans(row[0])[0], tuple(code_spans(row[1])), row[3], row[4]) for row in rows] == expected


def test_readme_and_index_list_the_methods():
    rows = table_rows((ROOT / "README.md").read_text(), "## Methods")
    shown = [(row[0].strip("`"), tuple(code_spans(row[2]))) for row in rows]
    assert shown == [(method.name, method.configurations) for method in METHODS.values()]
    assert re.findall(r"\(methods/(\w+)\.md\)", (DOCUMENTATION / "index.md").read_text()) == list(METHODS)


def test_readme_says_of_which_methods_dice_was_measured():
    for row in table_rows((ROOT / "README.md").read_text(), "## Methods"):
        method = row[0].strip("`")
        results = section_of((DOCUMENTATION / "methods" / f"{method}.md").read_text(), "Results")
        assert row[-1] == ("yes" if "Dice" in results else "not yet"), f"{method}: see Results on its page"


def test_every_stage_says_which_views_it_uses():
    rows = table_rows((DOCUMENTATION / "views.md").read_text(), "## Who uses what")
    shown = [stage for row in rows for stage in code_spans(row[0])]
    assert len(shown) == len(set(shown))
    stages = {stage.name: stage.load().defaults for method in METHODS.values() for stage in method.stages}
    assert set(shown) == set(stages)
    for row in rows:
        for stage in code_spans(row[0]):
            for cell, setting in ((row[2], "rotation_deg"), (row[3], "flip_axes"), (row[6], "points")):
                if setting != "points" or hasattr(stages[stage], "points"):
                    assert (cell == "no") != hasattr(stages[stage], setting), f"{stage}: {setting}"


def test_picture_shows_the_stages_in_order():
    (line,) = re.findall(r"^raw images -> .*$", (DOCUMENTATION / "architecture.md").read_text(), flags=re.MULTILINE)
    assert [name for *_, stages in COMMANDS for name, _ in stages] == line.split(" -> ")
    assert {command for commands, *_ in COMMANDS for command in commands.split(", ")} <= set(SCRIPTS)
    assert (DOCUMENTATION / "stages.png").stat().st_size < 100_000


@pytest.mark.parametrize("stage", [stage.name for method in METHODS.values() for stage in method.stages])
def test_defaults_are_those_of_the_code(stage):
    page = (DOCUMENTATION / "methods" / f"{stage.partition('.')[0]}.md").read_text()
    implementation = next(s for method in METHODS.values() for s in method.stages if s.name == stage).load()
    defaults = implementation.defaults
    expected = {field.name: getattr(defaults, field.name) for field in fields(defaults) if field.name != "training"}
    expected |= {field.name: getattr(defaults.training, field.name) for field in fields(defaults.training)}
    rows = table_rows(page, f"Stage `{stage}`:")
    assert {row[0].strip("`"): ast.literal_eval(row[1].strip("`")) for row in rows} == expected
    planned = set(implementation.from_plan(make_configuration(3))) | SCHEDULE
    assert {row[0].strip("`") for row in rows if row[2] == "plan"} == planned
    assert {row[2] for row in rows} == {"plan", "default"}


def test_every_key_of_the_plan_is_documented():
    text = (DOCUMENTATION / "plan_format.md").read_text()
    documented = {row[0].strip("`") for row in table_rows(text)}
    classes = (
        "Pretext",
        "PretextConfiguration",
        "StagePlan",
        "TokenGrid",
        "DenseSampling",
        "ContextChoices",
        "AnatomyChoices",
        "TransformerSize",
        "StageSchedule",
        "StageCost",
        "Decision",
    )
    keys = {field.name for name in classes for field in fields(getattr(plan_module, name))}
    assert documented == keys


def test_every_key_of_a_checkpoint_is_documented():
    text = (DOCUMENTATION / "checkpoint_format.md").read_text()
    section = text[text.index("`provenance`:") :]
    spans = {span for row in table_rows(section) for span in code_spans(row[0])}
    assert spans == {field.name for field in fields(Provenance)}


def test_every_key_of_the_fingerprint_is_documented():
    spans = set(code_spans((DOCUMENTATION / "fingerprint.md").read_text()))
    assert {field.name for cls in (Fingerprint, CaseRecord) for field in fields(cls)} <= spans


def test_presets_are_those_of_the_code():
    rows = table_rows((DOCUMENTATION / "plan.md").read_text(), "## Presets")
    shown = {row[0].strip("`"): row[1:] for row in rows}
    expected = {}
    for name, preset in PRESETS.items():
        size = preset.transformer
        expected[name] = [
            f"{preset.memory_gb:g} GB",
            preset.encoder,
            str(preset.base_features),
            ", ".join(map(str, preset.max_features)),
            f"{size.depth}, {size.width}, {size.heads}, {size.decoder_depth}",
            f"{preset.primus.depth}, {preset.primus.width}, {preset.primus.heads}",
            "-" if preset.step_multiply_adds is None else f"{preset.step_multiply_adds / 1e9:g} billion",
            preset.length,
        ]
    assert shown == expected


def test_layers_are_those_that_are_enforced():
    rows = table_rows((DOCUMENTATION / "architecture.md").read_text(), "## Who may import whom")
    assert {row[0].strip("`"): set(code_spans(row[1])) for row in rows} == ALLOWED


def python_examples() -> list[tuple[str, str]]:
    return [
        (name_of(page), block)
        for page in PAGES
        for language, block in split_code(page.read_text())[1]
        if language == "python"
    ]


@pytest.mark.parametrize(("page", "block"), python_examples())
def test_python_example_imports_what_there_is(page, block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), f"{page}: from {node.module}"


def readme_line(start: str) -> str:
    """Return the one line of a block in the README that begins so."""
    blocks = split_code((ROOT / "README.md").read_text())[1]
    (line,) = [line for _, block in blocks for line in block.splitlines() if line.startswith(start)]
    return line


def test_readme_sets_up_and_runs_the_demo():
    command = readme_line("python3 -m venv .venv && .venv/bin/pip install . && ").rpartition(" ")[2]
    assert command.removeprefix(".venv/bin/") in SCRIPTS


def test_ci_runs_the_test_command_of_the_readme():
    line = readme_line('python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && ').rpartition(" && ")[2]
    assert line.replace(".venv/", ".venv-ci/") in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("room", ["losses", "views"])
def test_every_module_is_on_its_page_of_the_api(room):
    page = (DOCUMENTATION / "api" / f"{room}.md").read_text()
    shown = {line.removeprefix("::: ") for line in page.splitlines() if line.startswith("::: ")}
    there = {f"nnssl.{room}.{path.stem}" for path in (ROOT / "nnssl" / room).glob("*.py") if path.stem != "__init__"}
    assert shown == there


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_rows_of_a_table_have_the_same_number_of_cells(page):
    cells = 0
    for line in page.read_text().splitlines():
        if not line.startswith("|"):
            cells = 0
            continue
        found = len(re.split(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line)))
        assert cells in (0, found), line
        cells = found
