"""Settings of a stage, merged once from three origins: the method's defaults (paper), the plan (data) and the user."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from nnssl.errors import ArgumentError, UserError
from nnssl.plan import PretextConfiguration
from nnssl.schema import STRICT, parse

S = TypeVar("S")

Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Factor = Annotated[float, Field(ge=0, lt=1)]
"""Number from 0 to below 1, such as the share of a teacher that is kept or the largest change of contrast."""
Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0)]
TwoOrMore = Annotated[int, Field(ge=2)]
CropFraction = tuple[PositiveShare, PositiveShare]
"""Smallest and largest share of the patch's volume (or area in 2D) that a crop covers."""
RotationDeg = tuple[Annotated[float, Field(ge=0, le=180)], ...]
"""Largest rotation to either side about each axis in degrees, z first; one angle in 2D."""

ORIGINS = ("method default", "plan", "command line")


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of the optimisation, which every stage's settings hold as ``training``."""

    __pydantic_config__: ClassVar = STRICT

    epochs: Annotated[int, Field(ge=1)]
    iterations_per_epoch: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    """Patches per step, over all processes."""
    optimizer: Literal["sgd", "adamw"]
    learning_rate: Annotated[float, Field(gt=0)]
    """Largest learning rate of the run."""
    momentum: tuple[float, float]
    """The two betas of AdamW; SGD uses the first as its momentum."""
    weight_decay: Annotated[float, Field(ge=0)]
    learning_rate_schedule: Literal["step", "cosine", "constant"]
    """``step``: multiplied by 0.1 at 60 % and 80 % of the epochs; ``cosine``: falls to 0 at the end."""
    warmup_epochs: Annotated[int, Field(ge=0)]
    gradient_clip: Annotated[float, Field(gt=0)]
    """Norm to which the gradient of all parameters together is clipped."""
    patch_size: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Number of voxels of a patch per axis; the plan gives it."""
    pieces: Annotated[int, Field(ge=1)] = 1
    """Number of pieces in which the batch of a process passes the network. The gradient is that of the whole batch."""
    checkpointing: bool = False
    """Whether the stages of encoder and decoder keep only their inputs and are recomputed in the backward pass."""

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the whole stage."""
        return self.epochs * self.iterations_per_epoch


def changes_in_common(planned: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """Return the intensity changes that both the plan and the method name, in the plan's order.

    Args:
        planned: The plan's ``intensity_views``, which suit the data.
        own: The method's default ``intensity_views``.
    """
    return tuple(name for name in planned if name in own)


def rotation_within(planned_deg: Sequence[float], most_deg: Sequence[float]) -> tuple[float, ...]:
    """Return the plan's rotation about each axis, limited to that of the method.

    Args:
        planned_deg: The plan's ``rotation_deg``.
        most_deg: The method's ``rotation_deg``: one angle for all axes.
    """
    return tuple(min(*most_deg, each) for each in planned_deg)


def resolve_settings(defaults: S, from_plan: dict[str, Any], overrides: Sequence[str]) -> tuple[S, dict[str, str]]:
    """Merge a stage's settings from their three origins; later origins override earlier ones.

    Args:
        defaults: Settings of the stage with the paper's numbers: a frozen dataclass with a field ``training``.
        from_plan: Values that the plan decides, by key.
        overrides: Strings ``key=value`` of the user. A key is a field of the settings or of their ``training``.

    Returns:
        The settings, and the origin of every value by key.

    Raises:
        UserError: If a key is unknown (the valid ones are listed), a value has the wrong type or range, or ``=`` is missing.
    """
    origins = dict.fromkeys(_keys(defaults), ORIGINS[0])
    settings = defaults
    for key, value in from_plan.items():
        settings = _replace(settings, key, value)
        origins[key] = ORIGINS[1]
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ArgumentError(f"overrides must be of the form key=value, got {override}", "overrides")
        if key not in origins:
            raise UserError(f"Unknown setting {key!r}. Available settings: {', '.join(sorted(origins))}")
        settings = _replace(settings, key, _parse(settings, key, text))
        origins[key] = ORIGINS[2]
    return settings, origins


def resolve_stage(
    implementation: Any, configuration: PretextConfiguration, stage: str, overrides: Sequence[str]
) -> tuple[Any, dict[str, str]]:
    """Merge the settings of one stage for one configuration of a plan.

    Args:
        implementation: Class of the stage (``nnssl.methods.protocol.PretextMethod``).
        configuration: The plan's pretext configuration.
        stage: Name of the stage, under which the plan holds its schedule.
        overrides: Strings ``key=value`` of the user.

    Returns:
        The settings and the origin of every value, as ``resolve_settings`` returns them.

    Raises:
        UserError: If ``resolve_settings`` raises it, or if the plan has no schedule for the stage.
    """
    schedule = configuration.stage(stage).schedule
    planned = {**asdict(schedule), **implementation.from_plan(configuration.for_stage(stage))}
    settings, origins = resolve_settings(implementation.defaults, planned, overrides)
    if origins["patch_size"] == ORIGINS[2]:
        own = configuration.for_stage(stage, settings.training.patch_size)
        planned.update(implementation.from_plan(own))
    if origins["epochs"] == ORIGINS[2] and origins["warmup_epochs"] != ORIGINS[2]:
        # The warm-up remains the same share of the run.
        planned["warmup_epochs"] = round(schedule.warmup_epochs * settings.training.epochs / schedule.epochs)
    settings, origins = resolve_settings(implementation.defaults, planned, overrides)
    return settings, origins


def settings_of_run(defaults: S, stored: Mapping[str, Any], source: str) -> S:
    """Return the settings of a finished run, as its checkpoint stores them.

    Args:
        defaults: Default settings of the stage, which determine the type.
        stored: Values of all settings by key, as in a checkpoint's provenance.
        source: Path of the checkpoint, for the error message.

    Raises:
        UserError: If a key is missing, unknown or wrong, as in a checkpoint of another version.
    """
    own = {field.name for field in fields(TrainingSettings)}
    training = {key: value for key, value in stored.items() if key in own}
    others = {key: value for key, value in stored.items() if key not in own}
    return parse(type(defaults), {**others, "training": training}, f"{source}: settings")


def split_overrides(overrides: Sequence[str], stages: dict[str, Any]) -> dict[str, list[str]]:
    """Assign each override to the stages that have its key.

    ``temperature=0.2`` applies to every stage with this setting, ``generative.mask_ratio=0.6`` only to the stage of this name.

    Args:
        overrides: Strings ``key=value`` or ``stage.key=value`` of the user.
        stages: Class of every stage, by the stage's name (``method.stage``).

    Returns:
        Overrides by stage name, without the stage's prefix.

    Raises:
        UserError: If no stage has the key; the valid ones are listed.
    """
    given: dict[str, list[str]] = {name: [] for name in stages}
    known = {name: _keys(implementation.defaults) for name, implementation in stages.items()}
    for override in overrides:
        key = override.partition("=")[0]
        prefix, _, own = key.rpartition(".")
        chosen = [name for name, keys in known.items() if own in keys and prefix in ("", name, name.rpartition(".")[2])]
        if not chosen:
            listed = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, keys in known.items())
            raise UserError(f"Unknown setting {key!r}. Available settings: {listed}")
        for name in chosen:
            given[name].append(override.removeprefix(f"{prefix}."))
    return given


def describe_settings(settings: Any, origins: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the value and the origin of every setting by key, as ``run.json`` stores them."""
    return {key: {"value": value, "origin": origins[key]} for key, value in values_by_key(settings).items()}


def values_by_key(settings: Any) -> dict[str, Any]:
    """Return the values of a stage's settings by key, including those of ``training``."""
    flat = {**asdict(settings), **asdict(settings.training)}
    return {key: flat[key] for key in _keys(settings)}


def _keys(settings: Any) -> list[str]:
    own = [field.name for field in fields(settings) if field.name != "training"]
    return own + [field.name for field in fields(settings.training)]


def _owner(settings: Any, key: str) -> Any:
    return settings if key in {field.name for field in fields(settings)} else settings.training


def _replace(settings: Any, key: str, value: Any) -> Any:
    if _owner(settings, key) is settings:
        return replace(settings, **{key: value})
    training = settings.training
    return replace(settings, training=replace(training, **{key: value}))


def _parse(settings: Any, key: str, text: str) -> Any:
    owner = _owner(settings, key)
    assert is_dataclass(owner)
    hint = get_type_hints(type(owner), include_extras=True)[key]
    adapter: TypeAdapter[Any] = TypeAdapter(hint)
    bare = get_type_hints(type(owner))[key]
    condition = f"of type {str(bare).replace('typing.', '') if get_origin(bare) else bare.__name__}"
    for attempt in _as_json(text, is_tuple=_plain_type(hint, tuple)):
        try:
            return adapter.validate_json(attempt, strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            if problem["type"].startswith(("greater_than", "less_than", "literal_error")):
                condition = problem["msg"].removeprefix("Input should be ")
    raise UserError(f"{key} must be {condition}, got {text}")


def _plain_type(hint: Any, wanted: type) -> bool:
    """Return whether a type without its annotations is built from another type."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return get_origin(hint) is wanted


def _as_json(text: str, is_tuple: bool) -> list[str]:
    """Return the possible readings of a value: as JSON, as a bare word, as a comma-separated list."""
    if not is_tuple or text.startswith("["):
        return [text.lower() if text.lower() in ("true", "false") else text, json.dumps(text)]
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    return [f"[{','.join(map(json.dumps, entries))}]", f"[{','.join(entries)}]"]
