from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pytest

from nnssl.errors import UserError
from nnssl.methods.settings import TrainingSettings, describe_settings, resolve_settings, resolve_stage, split_overrides
from nnssl.plan import StageSchedule
from tests.nnssl.methods.tiny_configuration import make_configuration, planned

TRAINING = TrainingSettings(
    epochs=200,
    iterations_per_epoch=250,
    batch_size=256,
    optimizer="sgd",
    learning_rate=0.03,
    momentum=(0.9, 0.999),
    weight_decay=1e-4,
    learning_rate_schedule="step",
    warmup_epochs=40,
    gradient_clip=12.0,
)


@dataclass(frozen=True)
class Settings:
    training: TrainingSettings
    temperature: float = 0.07
    negatives: Literal["queue", "batch"] = "queue"
    queue_length: int = 65536
    crop: tuple[float, float] = (0.2, 1.0)
    views: tuple[str, ...] = ("gamma",)
    residual: bool = False


class Implementation:
    defaults: ClassVar = Settings(TRAINING)

    @classmethod
    def from_plan(cls, configuration):
        return {"queue_length": 64}


SCHEDULE = StageSchedule(
    patch_size=(8, 12, 10),
    batch_size=8,
    pieces=1,
    checkpointing=False,
    epochs=100,
    iterations_per_epoch=25,
    warmup_epochs=20,
)
PLANNED = planned(make_configuration(3), ("toy.first",))
CONFIGURATION = replace(PLANNED, stages={"toy.first": replace(PLANNED.stages["toy.first"], schedule=SCHEDULE)})


def test_command_line_wins_over_plan_over_paper():
    settings, origins = resolve_settings(
        Settings(TRAINING), {"queue_length": 512, "batch_size": 8}, ["batch_size=4", "temperature=0.2"]
    )
    assert (settings.queue_length, settings.training.batch_size, settings.temperature) == (512, 4, 0.2)
    assert settings.training.weight_decay == 1e-4
    described = describe_settings(settings, origins)
    assert described["queue_length"] == {"value": 512, "origin": "plan"}
    assert described["batch_size"] == {"value": 4, "origin": "command line"}
    assert described["epochs"] == {"value": 200, "origin": "method default"}


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("negatives=batch", "negatives", "batch"),
        ("crop=0.5,1", "crop", (0.5, 1.0)),
        ("crop=[0.5,1]", "crop", (0.5, 1.0)),
        ("residual=True", "residual", True),
        ("temperature=1", "temperature", 1.0),
        ('views=["blur","noise"]', "views", ("blur", "noise")),
        ("views=blur,noise", "views", ("blur", "noise")),
        ("views=", "views", ()),
    ],
)
def test_values_are_read_as_their_type(text, key, value):
    settings, _ = resolve_settings(Settings(TRAINING), {}, [text])
    assert getattr(settings, key) == value


@pytest.mark.parametrize("text", ["queue_length=many", "queue_length=1.5", "negatives=other", "crop=1", "residual=2"])
def test_wrong_type_is_one_line_that_names_key_and_value(text):
    key, _, value = text.partition("=")
    with pytest.raises(UserError) as error:
        resolve_settings(Settings(TRAINING), {}, [text])
    assert str(error.value).startswith(f"{key} must be ")
    assert str(error.value).endswith(f", got {value}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("queue_length=many", "queue_length must be of type int, got many"),
        ("queue_length=1.5", "queue_length must be of type int, got 1.5"),
        ("learning_rate=-1", "learning_rate must be greater than 0, got -1"),
        ("epochs=0", "epochs must be greater than or equal to 1, got 0"),
        ("optimizer=lars", "optimizer must be 'sgd' or 'adamw', got lars"),
        ("momentum=0.9", "momentum must be of type tuple[float, float], got 0.9"),
    ],
)
def test_error_states_the_condition(text, message):
    with pytest.raises(UserError) as error:
        resolve_settings(Settings(TRAINING), {}, [text])
    assert str(error.value) == message


def test_unknown_key_lists_the_valid_ones():
    with pytest.raises(UserError, match=r"Unknown setting 'temprature'.*temperature") as error:
        resolve_settings(Settings(TRAINING), {}, ["temprature=1"])
    assert "weight_decay" in str(error.value)
    with pytest.raises(UserError, match="key=value"):
        resolve_settings(Settings(TRAINING), {}, ["temperature"])


def test_warm_up_shrinks_with_the_run_unless_given():
    settings, _ = resolve_stage(Implementation, CONFIGURATION, "toy.first", [])
    assert (settings.training.epochs, settings.training.warmup_epochs, settings.queue_length) == (100, 20, 64)
    settings, _ = resolve_stage(Implementation, CONFIGURATION, "toy.first", ["epochs=10"])
    assert settings.training.warmup_epochs == 2
    settings, _ = resolve_stage(Implementation, CONFIGURATION, "toy.first", ["epochs=10", "warmup_epochs=5"])
    assert settings.training.warmup_epochs == 5


def test_a_plan_older_than_the_method_says_to_plan_again():
    with pytest.raises(UserError, match=r"no schedule for toy\.second with .*nnssl_plan_and_preprocess"):
        resolve_stage(Implementation, CONFIGURATION, "toy.second", [])


def test_overrides_go_to_the_stages_that_have_the_key():
    @dataclass(frozen=True)
    class Other:
        training: TrainingSettings
        mask_ratio: float = 0.75

    class Second:
        defaults: ClassVar = Other(TRAINING)

    stages = {"toy.first": Implementation, "toy.second": Second}
    given = split_overrides(
        ["temperature=0.2", "batch_size=4", "second.epochs=7", "toy.first.epochs=3", "mask_ratio=0.5"], stages
    )
    assert given == {
        "toy.first": ["temperature=0.2", "batch_size=4", "epochs=3"],
        "toy.second": ["batch_size=4", "epochs=7", "mask_ratio=0.5"],
    }
    with pytest.raises(UserError, match="Unknown setting 'first.mask_ratio'"):
        split_overrides(["first.mask_ratio=1"], stages)
