"""The printed plan: its stages, the time that they take, and the page of reasons."""

from dataclasses import replace

from nnssl.plan import Decision, Plan
from planners import reasons
from planners.reasons import reasons_page, summarise
from tests.nnssl.test_plan import NNUNET, make_pretext

PLAN = Plan(NNUNET, make_pretext())  # one stage of 12 steps with 3e9 multiply-adds each


def test_a_screen_lists_the_stages_with_their_time():
    lines = summarise(PLAN, speeds={3: 1e9})
    (row,) = (line for line in lines if line.startswith("reprec.contrastive"))
    assert row.split() == [
        "reprec.contrastive",
        "3d_fullres_hybrid",
        "16x24x20",
        "2",
        "12",
        "0.25",
        "GB",
        "3",
        "billion",
        "36",
        "s",
    ]
    assert not any("WARNING" in line for line in lines)
    assert not any("time here" in line for line in summarise(PLAN))
    assert not any(line.startswith("reprec") for line in summarise(PLAN, methods=["simclr"]))
    assert not any(line.startswith("reprec") for line in summarise(PLAN, configurations=["2d_hybrid"]))


def test_a_stage_of_months_is_the_first_line():
    month = 36e9 / (30 * 24 * 3600)
    assert summarise(PLAN, speeds={3: month / 1.01})[0].startswith(
        "WARNING: on this machine, reprec.contrastive in 3d_fullres_hybrid would take about 30 days"
    )
    assert not any("WARNING" in line for line in summarise(PLAN, speeds={3: month * 1.01}))


def test_fine_tuning_is_listed_with_its_time_and_may_be_the_longest(monkeypatch):
    unet = {"patch_size": [32, 24, 20], "batch_size": 2, "architecture": {}}
    plan = Plan({**NNUNET, "configurations": {"3d_fullres": unet}}, PLAN.pretext)
    monkeypatch.setattr(reasons, "multiply_adds_of_finetuning", lambda nnunet, name: 4e9)
    lines = summarise(plan, speeds={3: 4e10})
    (row,) = (line.split() for line in lines if line.startswith("fine-tuning"))
    assert row[1:5] == ["3d_fullres", "32x24x20", "2", "250,000"]
    assert row[-2:] == ["6.9", "h"]  # 250,000 times a tenth of a second
    first = summarise(plan, speeds={3: 1e8})[0]
    assert first.startswith("WARNING: on this machine, fine-tuning in 3d_fullres would take about 120 days")


def test_a_stage_that_is_left_out_is_named_on_the_screen():
    left_out = Decision("3d_fullres", "sam.embedding", "left out", "too large")
    plan = Plan(NNUNET, replace(make_pretext(), decisions=(*make_pretext().decisions, left_out)))
    assert "left out: 3d_fullres sam.embedding: too large" in summarise(plan)


def test_the_page_holds_every_step_and_decision():
    page = reasons_page(PLAN)
    assert "| reprec.contrastive | 16x24x20 | 48 x 24 x 30 | 2 | 1 | 12 | 9 | 0.25 GB | 3 billion |" in page
    assert "| spacing | 1 mm | median |" in page
