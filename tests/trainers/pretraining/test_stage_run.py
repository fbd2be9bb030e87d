"""A run resumes only from its own checkpoint: differences that make it another run, and differences that do not."""

import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from nnssl.errors import UserError
from nnssl.methods import find_stage
from nnssl.methods.settings import TrainingSettings
from nnssl.plan import plan_from_dict
from tests.nnssl.networks.test_hybrid import architecture
from tests.nnssl.test_checkpoint import make_provenance
from tests.nnssl.test_plan import NNUNET, make_pretext
from trainers.pretraining.stage_run import StageRun, check_patch, check_same_run, plain_settings

CONFIGURATION = "3d_fullres_hybrid"
STAGE = "reprec.contrastive"


@dataclass(frozen=True)
class Settings:
    training: TrainingSettings = TrainingSettings(2, 3, 4, "sgd", 0.1, (0.9, 0.999), 0.0, "constant", 0, 1.0)
    temperature: float = 0.2
    flip_axes: tuple[int, int] = (1, 2)


SETTINGS = plain_settings(Settings())
TRAINING = {key: value for key, value in SETTINGS.items() if key not in ("temperature", "flip_axes")}


def make_content() -> dict:
    own = {CONFIGURATION: {"patch_size": [16, 24, 20], "batch_size": 2}}
    return json.loads(json.dumps({**NNUNET, "configurations": own, "pretext": asdict(make_pretext())}))


def check(found, content=None) -> None:
    plan = plan_from_dict(content or make_content(), "plan")
    run = StageRun(plan, find_stage(STAGE)[1], CONFIGURATION, (), 0, Settings(), {})
    check_same_run(Path("checkpoint.pth"), found, run, Path("nowhere"))


FOUND = make_provenance(plans=make_content(), settings=SETTINGS)


def test_the_same_run_goes_on():
    check(FOUND)
    content = make_content()
    content["pretext"]["decisions"] = []  # The recorded decisions of a plan may change.
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
    with pytest.raises(UserError, match=rf"checkpoint.pth: made with {key} {value}, but this run has .*; use restart"):
        check(replace(FOUND, **{key: value}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.1, "flip_axes": [1, 2]}, r"temperature 0.1 -> 0.2\)"),
        ({"temperature": 0.2, "flip_axes": [2]}, r"flip_axes \[2\] -> \[1, 2\]\)"),
        ({"temperature": 0.2}, r"flip_axes None -> \[1, 2\]\)"),
        ({"temperature": 0.2, "flip_axes": [1, 2], "epochs": 9}, r"epochs 9 -> 2\)"),
    ],
)
def test_other_settings_are_named(settings, message):
    with pytest.raises(UserError, match=rf"made with other settings \({message}"):
        check(replace(FOUND, settings={**TRAINING, **settings}))


def test_a_plan_that_was_made_again_is_refused_where_it_differs():
    changes = (
        lambda content: content["configurations"][CONFIGURATION].update(patch_size=[16, 24, 24]),
        lambda content: content["pretext"]["configurations"][CONFIGURATION].update(flip_axes=[1]),
        lambda content: content["configurations"].update(parent={}),  # Inherited values count.
    )
    for change in changes:
        content = copy.deepcopy(make_content())
        change(content)
        with pytest.raises(UserError, match="made with an earlier plan nnsslPlans"):
            check(FOUND, content)


def test_a_patch_is_a_multiple_of_what_the_network_halves():
    """The encoder of the small network halves the last two axes twice and the first one once."""
    plans = {
        **NNUNET,
        "configurations": {"3d_fullres": {"architecture": architecture(3, residual=False, hybrid=False)}},
    }
    check_patch((2, 8, 12), plans, "3d_fullres")
    for patch in ((3, 8, 12), (2, 6, 12), (8, 12)):
        with pytest.raises(
            UserError, match="patch_size must be a multiple of 2x4x4 voxels, as the network of 3d_fullres"
        ):
            check_patch(patch, plans, "3d_fullres")
    primus = {"arch_kwargs": {"patch_embed_size": [4, 8, 8]}}
    plans = {**NNUNET, "configurations": {"3d_fullres_primus": {"architecture": primus}}}
    check_patch((4, 16, 8), plans, "3d_fullres_primus")
    with pytest.raises(
        UserError, match="must be a multiple of 4x8x8 voxels, as the network of 3d_fullres_primus requires"
    ):
        check_patch((4, 12, 8), plans, "3d_fullres_primus")


def test_another_plan_of_another_stage_changes_nothing():
    content = make_content()
    stages = content["pretext"]["configurations"][CONFIGURATION]["stages"]
    stages["reprec.generative"] = {**stages[STAGE], "queue_length": 7}
    check(FOUND, content)
    stages[STAGE]["queue_length"] = 7
    with pytest.raises(UserError, match="made with an earlier plan nnsslPlans"):
        check(FOUND, content)
