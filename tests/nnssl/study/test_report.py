"""The report of a study: its claims, its numbers, and that it is self-contained."""

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import matplotlib as mpl
import numpy as np
import pytest

from nnssl.errors import UserError
from nnssl.evaluation.metrics import CaseMetrics
from nnssl.plan import Decision
from nnssl.study.figures import arm_styles, pretraining_panels
from nnssl.study.report import (
    Picture,
    PretrainingCurve,
    Report,
    markdown_table,
    render_report,
    results_csv,
    write_report,
)
from nnssl.study.table import SCRATCH, Cell, Gain, Interval, RateChoice, Rise, Row, StudyTable
from nnssl.study.words import summarise

VOID = {"meta", "link", "br", "img", "wbr", "hr"}
HOSTILE = '<script>alert("x")</script>&\''
ARM = "pcrl:attention=none"
STILL_RISES = "scratch still rises by +12.3 points: no claim"


class Page(HTMLParser):
    """A parsed page: elements with attributes in order, text, and the text of every table cell."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.open, self.text, self.style = [], [], "", ""
        self.tables, self.svg_texts = [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"{tag}: an attribute twice"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")
        elif tag == "text":
            self.svg_texts.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            self.style += data
            return
        self.text += data
        if self.open and self.open[-1] == "text":
            self.svg_texts[-1] += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def named(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


def make_row(
    arm=SCRATCH, labels=5, steps=450, dice=0.5, gain=None, verdict="", mode="finetune", seeds=(0, 1), pairs=40
):
    """Return a row; ``gain`` is the mean difference, or None for no comparison."""
    compared = None
    if gain is not None:
        differences = tuple(gain + 0.01 * (seed - 0.5) for seed in seeds)
        compared = Gain(Interval(gain, gain - 0.021, gain + 0.034), differences, 0.0004, 0.0123, num_cases=pairs)
    return Row(
        arm=arm,
        mode=mode,
        labels=labels,
        steps=steps,
        seeds=seeds,
        dice=Interval(dice, dice - 0.051, dice + 0.042),
        seed_dice=tuple(dice + 0.02 * (seed - 0.5) for seed in seeds),
        class_dice={"Anterior": dice - 0.1, "Posterior": None},
        nsd=dice + 0.05,
        hd95_mm=7.25,
        gain=compared,
        verdict=verdict,
        labels_of_scratch="" if arm == SCRATCH else "> 20",
    )


def make_table(*rows, rises=()):
    return StudyTable(rows, rises, tolerance_mm=2.0, num_test_cases=40)


FULL = make_table(
    make_row(labels=1, steps=150, dice=0.201),
    make_row(ARM, 1, 150, 0.252, 0.051, "short schedule: no claim"),
    make_row(labels=1, dice=0.234),
    make_row(ARM, 1, dice=0.3267, gain=0.0927, verdict="gain"),
    make_row(labels=20, steps=150, dice=0.605),
    make_row(ARM, 20, 150, 0.692, 0.087, "short schedule: no claim"),
    make_row(labels=20, dice=0.728),
    make_row(ARM, 20, dice=0.812, gain=0.084, verdict=STILL_RISES, seeds=(0,)),
    make_row(labels=1, dice=0.05, mode="linear"),
    make_row(ARM, 1, dice=0.011, gain=-0.039, verdict="loss", mode="linear"),
    rises=(
        Rise("finetune", 1, (150, 450), 0.0041, begun=True, stopped=True),
        Rise("finetune", 20, (150, 450), 0.123, begun=True, stopped=False),
        Rise("finetune", 5, (150, 450), 0.001, begun=False, stopped=False),
    ),
)


def make_png(width=40, height=20) -> bytes:
    file = BytesIO()
    mpl.image.imsave(file, np.zeros((height, width)), format="png")
    return file.getvalue()


def make_report(table=FULL, **changes):
    losses = [3.0, 2.0, 1.5]
    report = Report(
        title="Does it help?",
        dataset_name="Dataset004_Hippocampus",
        source_name="Dataset501_Unlabelled",
        table=table,
        rates=(RateChoice(ARM, "finetune", 5, 150, {0.01: 0.4512, 0.001: 0.4711}),),
        pictures=(Picture(make_png(900), "scratch beside the reference", "case_7, z = 4"),),
        method_pictures={ARM: (Picture(make_png(), "matches of two views", "matches"),)},
        curves=(
            PretrainingCurve(ARM, "pcrl.all", {"loss": losses, "probe_dice": [float("nan"), 0.4, 0.3]}),
            PretrainingCurve("pix2rep", "pix2rep.dense", {"loss": losses, "loss_a": losses, "loss_b": losses}),
        ),
        decisions=(Decision("3d_fullres", "patch", "40 x 56 x 40", "as large as the memory target allows"),),
        facts={"Versions": {"nnssl": "0.1"}, "Time": {"pretraining": "29 min"}},
        commands=("nnssl_benchmark -d 4 --from 501",),
        notes=("Split by patient.",),
    )
    return replace(report, **changes)


def empty_report(table):
    return make_report(
        table, rates=(), pictures=(), method_pictures={}, curves=(), decisions=(), facts={}, commands=(), notes=()
    )


@pytest.fixture(scope="module")
def html():
    return render_report(make_report())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_page_refers_to_nothing_outside(page, html):
    assert not page.named("script", "iframe", "object", "embed", "base", "form", "image")
    assert len(page.named("style")) == 1
    for tag, attributes in page.elements:
        for name, text in attributes.items():
            if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}:
                assert text.startswith(("#", "data:")), f"{tag} {name}={text[:60]}"
            assert not name.startswith(("on", "xmlns"))
            assert "//" not in text or text.startswith("data:image/png;base64,"), f"{tag} {name}={text[:60]}"
            assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", text))
    assert not re.search(r"url\(|@import|//|@font-face", page.style)
    assert not re.search("http", html)


def test_figures_have_text_alternatives(page):
    assert len(page.named("img")) == 2
    assert len(page.named("svg")) > 8
    assert all(attributes["alt"].strip() for attributes in page.named("img"))
    assert all(
        attributes["role"] == "img" and len(attributes["aria-label"].split()) > 3 for attributes in page.named("svg")
    )


def test_ids_are_unique_and_references_lead_somewhere(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids) > 10
    referred = set()
    for _, attributes in page.elements:
        referred |= {text[1:] for name, text in attributes.items() if name == "href" and text.startswith("#")}
        referred |= {text for name, text in attributes.items() if name == "aria-labelledby"}
        referred |= {found for text in attributes.values() for found in re.findall(r"url\(#([^)]*)\)", text)}
    assert referred <= set(ids)
    assert any(name.startswith("mode0") for name in referred)


def test_structure_is_semantic(page):
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert page.named("html") == [{"lang": "en"}]
    assert all(attributes.get("scope") in {"col", "row", "rowgroup"} for attributes in page.named("th"))
    assert len(page.named("caption")) == len(page.named("table")) == len(page.tables)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")


def test_parts_stand_in_their_order(html):
    parts = ["curves", "table", "scratch", "classes", "pictures", "methods", "pretraining", "plan", "facts", "commands"]
    places = [html.index(f'<h2 id="{part}"') for part in parts]
    assert places == sorted(places)


def test_user_text_is_escaped():
    table = make_table(make_row(), make_row(HOSTILE, gain=0.1, verdict=HOSTILE))
    report = make_report(
        table,
        title=HOSTILE,
        dataset_name=HOSTILE,
        source_name=HOSTILE,
        pictures=(Picture(make_png(), HOSTILE, HOSTILE),),
        method_pictures={HOSTILE: (Picture(make_png(), HOSTILE, HOSTILE),)},
        curves=(PretrainingCurve(HOSTILE, HOSTILE, {HOSTILE: [1.0, 2.0]}),),
        decisions=(Decision(HOSTILE, HOSTILE, HOSTILE, HOSTILE),),
        facts={HOSTILE: {HOSTILE: HOSTILE}},
        commands=(HOSTILE,),
        notes=(HOSTILE,),
    )
    html = render_report(report)
    page = Page(html)
    assert "<script" not in html
    assert not page.named("script")
    assert page.text.count(HOSTILE) > 15
    assert [attributes["alt"] for attributes in page.named("img")] == [HOSTILE, HOSTILE]
    assert sum(HOSTILE in attributes["aria-label"] for attributes in page.named("svg")) == 3


def words_of(text: str) -> str:
    """Return the text of a cell in one line."""
    return " ".join(text.split())


def test_table_shows_the_numbers_of_the_study(page):
    longest, shorter, linear = (table for table in page.tables if table[0][0] == "Arm" and "Verdict" in table[0])
    assert [words_of(name) for name in longest[0]] == [
        "Arm",
        "Dice (points), 95 % interval",
        "Gain (points), 95 % interval",
        "Verdict",
        "p (Holm)",
        "Gain of each seed (points)",
        "Labels scratch needs",
        "NSD (points)",
        "HD95 (mm)",
    ]
    rows = [[words_of(cell) for cell in row] for row in longest[1:]]
    assert rows == [
        ["1 label, 450 steps"],
        ["scratch", "23.4 [18.3, 27.6]", "–", "–", "–", "–", "–", "28.4", "7.2"],
        [ARM, "32.7 [27.6, 36.9]", "+9.3 [+7.2, +12.7]", "gain", "0.012", "+8.8 +9.8", "> 20", "37.7", "7.2"],
        ["20 labels, 450 steps"],
        ["scratch", "72.8 [67.7, 77.0]", "–", "–", "–", "–", "–", "77.8", "7.2"],
        [
            f"{ARM} 1 of 2 seeds",
            "81.2 [76.1, 85.4]",
            "+8.4 [+6.3, +11.8]",
            STILL_RISES,
            "0.012",
            "+7.9",
            "> 20",
            "86.2",
            "7.2",
        ],
    ]
    assert [row[0] for row in shorter if len(row) == 1] == ["1 label, 150 steps", "20 labels, 150 steps"]
    assert words_of(linear[3][2]) == "−3.9 [−6.0, −0.5]"


@pytest.mark.parametrize(("pairs", "shown"), [(1, "n/a (1 pair)"), (5, "n/a (5 pairs)"), (6, "0.012")])
def test_p_is_shown_only_where_it_could_be_significant(pairs, shown):
    page = Page(
        render_report(empty_report(make_table(make_row(), make_row(ARM, gain=0.1, verdict="gain", pairs=pairs))))
    )
    (table,) = (table for table in page.tables if "Verdict" in table[0])
    assert table[3][4] == shown
    assert "With fewer than 6 pairs" in page.text


def test_every_row_of_the_study_is_shown_once(page):
    shown = [row for table in page.tables if "Verdict" in table[0] for row in table[1:] if len(row) > 1]
    assert len(shown) == len(FULL.rows)


def test_rise_of_scratch_and_classes_are_shown(page):
    (rises,) = (table for table in page.tables if table[0][0] == "Mode")
    assert rises[1:] == [
        ["fine-tuning", "1", "150 to 450", "+0.4", "yes"],
        ["fine-tuning", "20", "150 to 450", "+12.3", "no, it still improves"],
        ["fine-tuning", "5", "150 to 450", "+0.1", "no, it has hardly begun to segment"],
    ]
    classes = [table for table in page.tables if table[0] == ["Arm", "Anterior", "Posterior"]]
    assert len(classes) == 2
    assert classes[0][3] == [ARM, "22.7", "–"]


def test_curves_say_their_numbers_and_have_the_labels_as_ticks(page):
    (longest,) = (
        attributes["aria-label"]
        for attributes in page.named("svg")
        if attributes["aria-label"].startswith("Fine-tuning, 450 steps (the longest)")
    )
    assert f"{ARM}: 32.7 [27.6, 36.9] with 1 label, 81.2 [76.1, 85.4] with 20 labels" in longest
    start = page.svg_texts.index("labels, log scale")
    assert page.svg_texts[:start] == ["1", "20"]
    assert {"150", "450"} <= set(page.svg_texts)


def test_lines_follow_the_colour_of_the_page(html):
    assert "#010203" not in html
    assert "currentColor" in html
    assert "font-family" not in html[html.index("</style>") :]


def test_arms_differ_in_more_than_colour():
    styles = arm_styles([SCRATCH, *(f"arm {index}" for index in range(15))])
    assert len(styles) == 16
    assert len({(style.colour, str(style.line)) for style in styles.values()}) == 16
    first = [styles[name] for name in (SCRATCH, *(f"arm {index}" for index in range(6)))]
    assert len({style.marker for style in first}) == len({style.colour for style in first}) == 7


def test_pretraining_panels():
    nan = float("nan")
    metrics = {
        "loss": [3.0, 2.0, 1.0],
        "loss_a": [2.0, 1.0, 0.5],
        "loss_b": [1.0, 1.0, 0.5],
        "head_rank": [4.0, 5.0, 6.0],
        "nothing": [nan, nan, nan],
        "learning_rate": [1e-3, 1e-3, 1e-3],
        "probe_dice": [nan, 0.5, 0.25],
    }
    panels = pretraining_panels(metrics, "x", "arm")
    assert [panel.caption for panel in panels] == [
        "loss: 3 to 1; loss a: 2 to 0.5; loss b: 1 to 0.5",
        "probe Dice (points): 50 to 25, best 50 in epoch 1 (ring)",
        "head rank: 4 to 6",
    ]
    alone = pretraining_panels({"loss": [2.0, 1.0], "loss_contrast": [2.0, 1.0]}, "x", "arm")
    assert [panel.caption for panel in alone] == ["loss contrast: 2 to 1"]
    assert pretraining_panels({"loss": []}, "x", "arm") == []


def summary_of(*rows) -> tuple[str, ...]:
    return summarise(make_table(make_row(), *rows), "A", "B")


def test_summary_of_a_gain():
    assert summary_of(make_row("pix2rep", gain=0.0927, verdict="gain")) == (
        "pix2rep, pretrained on B, was compared with training from scratch on A with 5 labels and 2 seeds, "
        "evaluated on 40 held-out cases.",
        "Pretraining helps: pix2rep (fine-tuning, 5 labels: +9.3 Dice points).",
    )


@pytest.mark.parametrize(("lengths", "said"), [((150, 450), True), ((150, 450, 1350), False)])
def test_summary_warns_of_a_gain_that_two_lengths_show(lengths, said):
    scratch = [make_row(steps=steps) for steps in lengths]
    gain = make_row("pix2rep", steps=lengths[-1], gain=0.1, verdict="gain")
    assert ("two lengths only" in summarise(make_table(*scratch, gain), "A", "B")[1]) is said
    none = make_row("pix2rep", steps=lengths[-1], gain=0.0, verdict="no difference seen")
    assert "two lengths" not in " ".join(summarise(make_table(*scratch, none), "A", "B"))


def test_summary_of_a_loss():
    assert summary_of(make_row("pix2rep", gain=-0.039, verdict="loss", mode="linear"))[1:] == (
        "No gain is claimed for the only comparison. "
        "Pretraining harms: pix2rep (linear probe, 5 labels: -3.9 Dice points).",
    )


@pytest.mark.parametrize(
    ("verdict", "rest"),
    [
        ("no difference seen", "No difference was seen."),
        (STILL_RISES, "Reason: scratch still rises."),
        ("one length only: no claim", "Reason: one length only."),
        ("short schedule: no claim", "Reason: short schedule."),
        ("fewer than 2 seeds: no claim", "Reason: fewer than 2 seeds."),
        ("", "Reason: no verdict yet."),
        ("a gain would need 6 cases", "Reason: a gain would need 6 cases."),
    ],
)
@pytest.mark.parametrize("gain", [0.4, None])
def test_summary_claims_nothing_without_a_verdict(verdict, rest, gain):
    row = make_row("pix2rep", dice=0.9, gain=gain, verdict=verdict)
    assert summary_of(row)[1:] == ("No gain is claimed for the only comparison.", rest)
    assert summary_of(row, replace(row, labels=1))[1:] == ("No gain is claimed for any of the 2 comparisons.", rest)


def test_summary_reads_the_longest_length_only():
    short = make_row("pix2rep", steps=150, gain=0.3, verdict="gain")
    long = make_row("pix2rep", steps=450, gain=0.01, verdict="no difference seen")
    assert "No gain" in summary_of(long, short)[1]
    assert "No gain" in summary_of(short, long)[1]


def test_summary_joins_the_numbers_of_labels_and_counts_the_rest():
    rows = [
        make_row("a", 1, gain=0.3, verdict="gain"),
        make_row("a", 20, gain=0.02, verdict="gain"),
        make_row("a", 50, gain=0.3, verdict=STILL_RISES),
        make_row("b", 1, gain=0.3, verdict=STILL_RISES.replace("12.3", "4.5")),
        make_row("b", 5, gain=0.3, verdict="one length only: no claim"),
        make_row("b", 20, gain=0.0, verdict="no difference seen"),
    ]
    assert summary_of(*rows)[1:] == (
        "Pretraining helps: a (fine-tuning, 1 and 20 labels: +2.0 to +30.0 Dice points).",
        "No difference was seen in 1 of 6 comparisons. "
        "3 of 6 comparisons allow no claim: scratch still rises (2), one length only (1).",
    )


def test_summary_of_many_gains_stays_short():
    rows = [make_row(f"arm{index}", 5, gain=0.1 + 0.01 * index, verdict="gain") for index in range(4)]
    rows.append(make_row("arm0", 20, gain=0.9, verdict="no difference seen"))
    first, second, _ = summary_of(*rows)
    assert first.startswith("4 arms, pretrained on B, were compared")
    expected = "by +10.0 to +13.0 Dice points, most for arm3 (fine-tuning, 5 labels)."
    assert second == f"Pretraining helps in 4 of 5 comparisons, {expected}"


def test_summary_before_anything_is_compared():
    assert summarise(make_table(), "A", "B") == (
        "No network of this study has been evaluated yet, so there is nothing to conclude.",
    )
    assert summary_of() == (
        "So far, only training from scratch has been measured, on A with 5 labels and 2 seeds, evaluated on 40 held-out "
        "cases.",
    )


def test_minus_signs_are_typeset_in_numbers_only():
    html = render_report(make_report(notes=("a-1",)))
    assert "a-1" in html
    assert "linear probe, 1 label: −3.9 Dice points" in Page(html).text


@pytest.mark.parametrize(
    "table",
    [
        make_table(),
        make_table(make_row()),
        make_table(make_row("pix2rep", verdict="scratch is missing")),
        make_table(make_row(), make_row("pix2rep", labels=20, seeds=(0,))),
        make_table(make_row(labels=1), make_row("pix2rep", steps=1, dice=0.0), make_row(steps=1, mode="mean_teacher")),
        make_table(replace(make_row(), nsd=None, hd95_mm=None, class_dice={})),
    ],
    ids=["nothing", "scratch", "no scratch", "other labels", "one step", "no metrics"],
)
def test_incomplete_study_is_a_page(table):
    page = Page(render_report(empty_report(table)))
    assert len(page.named("h1")) == 1
    assert sum(len(row) > 1 for found in page.tables if "Verdict" in found[0] for row in found[1:]) == len(table.rows)
    targets = [attributes["href"] for attributes in page.named("a")]
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {target[1:] for target in targets} <= ids
    assert not page.named("img")


def test_one_length_says_that_it_cannot_be_known():
    page = Page(render_report(empty_report(make_table(make_row()))))
    assert "Scratch has not been measured at two lengths yet" in page.text


def test_pretraining_that_has_not_begun():
    page = Page(render_report(make_report(curves=(PretrainingCurve(ARM, "pcrl.all", {"loss": []}),))))
    assert "No epoch has finished yet." in page.text


def test_picture_has_its_size_and_a_wide_one_is_marked(page):
    sizes = [(attributes["width"], attributes["height"]) for attributes in page.named("img")]
    assert sizes == [("900", "20"), ("40", "20")]
    assert [figure["class"] for figure in page.named("figure") if "picture" in figure.get("class", "")] == [
        "picture wide",
        "picture",
    ]
    with pytest.raises(ValueError, match="not a PNG"):
        render_report(make_report(pictures=(Picture(b"GIF89a", "alt", "caption"),)))


def test_same_study_is_the_same_page(html, tmp_path):
    write_report(tmp_path / "report.html", make_report())
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(UserError, match=r"report\.html"):
        write_report(tmp_path / "nowhere" / "report.html", make_report())


def test_results_csv_keeps_every_number(tmp_path):
    cells = [
        Cell(
            HOSTILE,
            "finetune",
            5,
            seed,
            450,
            (
                CaseMetrics("case, 1", "Anterior", 1 / 3 + seed, None, 7.1, 1e-9, 123456.789),
                CaseMetrics('case "2"', "Posterior", None, 0.25, None, 0.0, 0.0),
            ),
        )
        for seed in (0, 1)
    ]
    results_csv(tmp_path / "results.csv", cells)
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert ",".join(lines[0]) == (
        "arm,mode,labels,seed,steps,case,class,dice,nsd,hd95_mm,volume_ml,reference_volume_ml"
    )
    found = {}
    for line in lines:
        key = (line["arm"], line["mode"], int(line["labels"]), int(line["seed"]), int(line["steps"]))
        numbers = [float(line[name]) if line[name] else None for name in list(line)[7:]]
        found.setdefault(key, []).append(CaseMetrics(line["case"], line["class"], *numbers))
    assert [Cell(*key, tuple(metrics)) for key, metrics in found.items()] == cells


def test_markdown_table():
    assert markdown_table(FULL).splitlines() == [
        "| arm | steps | Dice (points), 1 label | Dice (points), 20 labels |",
        "|---|---|---|---|",
        "| scratch, fine-tuning | 150 | 20.1 [15.0, 24.3] | 60.5 [55.4, 64.7] |",
        "| scratch, fine-tuning | 450 | 23.4 [18.3, 27.6] | 72.8 [67.7, 77.0] |",
        f"| `{ARM}`, fine-tuning | 150 | 25.2 [20.1, 29.4]; +5.1; short schedule: no claim "
        "| 69.2 [64.1, 73.4]; +8.7; short schedule: no claim |",
        f"| `{ARM}`, fine-tuning | 450 | 32.7 [27.6, 36.9]; +9.3; gain | 81.2 [76.1, 85.4]; +8.4; {STILL_RISES} |",
        "| scratch, linear probe | 450 | 5.0 [-0.1, 9.2] |  |",
        f"| `{ARM}`, linear probe | 450 | 1.1 [-4.0, 5.3]; -3.9; loss |  |",
    ]


def test_markdown_table_of_one_mode_does_not_name_it():
    assert markdown_table(make_table(make_row("a|b"))).splitlines()[2] == "| `a\\|b` | 450 | 50.0 [44.9, 54.2] |"
    assert markdown_table(make_table()) == "| arm | steps |\n|---|---|\n"
