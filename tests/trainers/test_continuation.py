"""A run goes on from its own checkpoint only: what makes it another one, and what does not."""

import copy
import json
from dataclasses import asdict, replace

import pytest

from nnssl.errors import UserError
from planners.plan import plan_from_dict
from tests.nnssl.test_checkpoint import make_provenance
from tests.planners.test_plan import NNUNET, make_pretext
from trainers.continuation import check_same_run

CONFIGURATION = "3d_fullres_hybrid"
STAGE = "reprec.contrastive"
SETTINGS = {"temperature": 0.2, "flip_axes": [1, 2]}


def make_content() -> dict:
    own = {CONFIGURATION: {"patch_size": [16, 24, 20], "batch_size": 2}}
    return json.loads(json.dumps({**NNUNET, "configurations": own, "pretext": asdict(make_pretext())}))


def check(found, content=None, **changes) -> None:
    arguments = {"configuration": CONFIGURATION, "stage": STAGE, "settings": SETTINGS, "seed": 0, **changes}
    plan = plan_from_dict(content or make_content(), "plan")
    check_same_run("checkpoint.pth", found, plan, **arguments)


FOUND = make_provenance(plans=make_content(), settings=SETTINGS)


def test_the_same_run_goes_on():
    check(FOUND)
    content = make_content()
    content["pretext"]["decisions"] = []  # what was said of the plan may change
    content["pretext"]["nnssl_version"] = "1"
    check(FOUND, content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", "reprec.generative"),
        ("dataset_name", "Dataset502_Other"),
        ("plans_name", "otherPlans"),
        ("configuration", "2d_hybrid"),
        ("seed", 1),
    ],
)
def test_another_run_is_refused_by_what_differs(key, value):
    with pytest.raises(UserError, match=rf"checkpoint.pth: is of {key} {value}, this run of .*; --restart"):
        check(replace(FOUND, **{key: value}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.1, "flip_axes": [1, 2]}, r"temperature 0.1 -> 0.2\)"),
        ({"temperature": 0.2, "flip_axes": [2]}, r"flip_axes \[2\] -> \[1, 2\]\)"),
        ({"temperature": 0.2}, r"flip_axes None -> \[1, 2\]\)"),
    ],
)
def test_other_settings_are_named(settings, message):
    with pytest.raises(UserError, match=rf"was run with other settings \({message}"):
        check(replace(FOUND, settings=settings))


def test_a_plan_that_was_made_again_is_refused_where_it_differs():
    changes = (
        lambda content: content["configurations"][CONFIGURATION].update(patch_size=[16, 24, 24]),
        lambda content: content["pretext"]["configurations"][CONFIGURATION].update(crop_overlap=0.5),
        lambda content: content["configurations"].update(parent={}),  # what a configuration inherits counts
    )
    for change in changes:
        content = copy.deepcopy(make_content())
        change(content)
        with pytest.raises(UserError, match="was run with an earlier plan nnsslPlans"):
            check(FOUND, content)
