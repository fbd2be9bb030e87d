"""Settings of a stage, resolved once from three origins: method defaults (paper), plan (data), command line (user)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from nnssl.errors import UserError
from nnssl.plan import PretextConfiguration
from nnssl.schema import STRICT, parse

S = TypeVar("S")

Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Factor = Annotated[float, Field(ge=0, lt=1)]
"""Below 1: the share of a teacher that is kept, the largest change of a contrast."""
Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0)]
TwoOrMore = Annotated[int, Field(ge=2)]
CropFraction = tuple[PositiveShare, PositiveShare]
"""Least and largest share of the patch's volume, or area, that a crop covers."""
RotationDeg = tuple[Annotated[float, Field(ge=0, le=180)], ...]
"""Largest rotation to either side about each axis, z first; a single angle in 2D."""

ORIGINS = ("method default", "plan", "command line")


@dataclass(frozen=True)
class TrainingSettings:
    """How a stage is optimised; every stage's settings hold one as ``training``."""

    __pydantic_config__: ClassVar = STRICT

    epochs: Annotated[int, Field(ge=1)]
    iterations_per_epoch: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    """Patches per step over all processes."""
    optimizer: Literal["sgd", "adamw"]
    learning_rate: Annotated[float, Field(gt=0)]
    """Largest learning rate of the run."""
    momentum: tuple[float, float]
    """AdamW's two betas; SGD's momentum is the first."""
    weight_decay: Annotated[float, Field(ge=0)]
    learning_rate_schedule: Literal["step", "cosine", "constant"]
    """``step``: times 0.1 at 60 % and at 80 % of the epochs; ``cosine``: to 0 at the end."""
    warmup_epochs: Annotated[int, Field(ge=0)]
    gradient_clip: Annotated[float, Field(gt=0)]
    """Largest norm of the gradient."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.epochs * self.iterations_per_epoch


def changes_in_common(planned: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """Return the intensity changes that suit the data and that the method has, in the plan's order.

    Args:
        planned: the plan's ``intensity_views``.
        own: the method's, as its defaults have them.
    """
    return tuple(name for name in planned if name in own)


def rotation_within(planned_deg: Sequence[float], most_deg: Sequence[float]) -> tuple[float, ...]:
    """Return the plan's rotation about each axis, at most the method's.

    Args:
        planned_deg: the plan's ``rotation_deg``.
        most_deg: the method's, one angle for all axes.
    """
    return tuple(min(*most_deg, each) for each in planned_deg)


def resolve_settings(defaults: S, from_plan: dict[str, Any], overrides: Sequence[str]) -> tuple[S, dict[str, str]]:
    """Merge a stage's settings from their three origins; later ones win.

    Args:
        defaults: the stage's settings with the paper's numbers; a frozen dataclass with a field ``training``.
        from_plan: values that the plan decides, by key.
        overrides: ``key=value`` as typed. A key is a field of the settings or of their ``training``.

    Returns:
        The settings, and the origin of every value by key.

    Raises:
        UserError: a key is unknown (the valid ones are listed), a value has the wrong type, or ``=`` is missing.
    """
    origins = dict.fromkeys(_keys(defaults), ORIGINS[0])
    settings = defaults
    for key, value in from_plan.items():
        settings = _replace(settings, key, value)
        origins[key] = ORIGINS[1]
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--set {override}: write it as key=value")
        if key not in origins:
            raise UserError(
                f"--set {override}: there is no setting {key!r}; the settings are {', '.join(sorted(origins))}"
            )
        settings = _replace(settings, key, _parse(settings, key, text))
        origins[key] = ORIGINS[2]
    return settings, origins


def resolve_stage(
    implementation: Any, configuration: PretextConfiguration, stage: str, overrides: Sequence[str]
) -> tuple[Any, dict[str, str]]:
    """Resolve the settings of one stage for one configuration of a plan.

    Args:
        implementation: the stage's class (``nnssl.methods.protocol.PretextMethod``).
        configuration: the plan's pretext configuration.
        stage: name of the stage, for its schedule.
        overrides: ``key=value`` as typed.

    Returns:
        The settings and the origin of every value, as ``resolve_settings``.

    Raises:
        UserError: as ``resolve_settings``, or the plan is older than the method.
    """
    if stage not in configuration.schedules:
        raise UserError(
            f"The plan has no schedule for {stage} with this configuration: either the plan was made before this method was "
            "there; then plan again with the same command (nnssl_plan_and_preprocess), weights that are there stay. Or the "
            "planner left it out; its reasons (nnssl_info) say why"
        )
    schedule = configuration.schedules[stage]
    planned = {**asdict(schedule), **implementation.from_plan(configuration)}
    settings, origins = resolve_settings(implementation.defaults, planned, overrides)
    if origins["epochs"] == ORIGINS[2] and origins["warmup_epochs"] != ORIGINS[2]:
        # the warm-up is a share of the run
        planned["warmup_epochs"] = round(schedule.warmup_epochs * settings.training.epochs / schedule.epochs)
        settings, origins = resolve_settings(implementation.defaults, planned, overrides)
    return settings, origins


def settings_of_run(defaults: S, stored: Mapping[str, Any], source: str) -> S:
    """Return the settings of a finished run from what its checkpoint says of them.

    Args:
        defaults: of the stage.
        stored: flat, by key, as in a checkpoint's provenance.
        source: of the checkpoint, for the error message.

    Raises:
        UserError: a key is missing, unknown or wrong, as in a checkpoint of another version.
    """
    own = {field.name for field in fields(TrainingSettings)}
    training = {key: value for key, value in stored.items() if key in own}
    others = {key: value for key, value in stored.items() if key not in own}
    return parse(type(defaults), {**others, "training": training}, f"{source}: settings")


def split_overrides(overrides: Sequence[str], stages: dict[str, Any]) -> dict[str, list[str]]:
    """Give each override to the stages that have its key.

    ``temperature=0.2`` goes to every stage with that setting, ``generative.mask_ratio=0.6`` to the stage of that name.

    Args:
        overrides: ``key=value`` or ``stage.key=value`` as typed.
        stages: implementation by stage name (``method.stage``).

    Returns:
        Overrides by stage name, without the stage's prefix.

    Raises:
        UserError: no stage has the key; the valid ones are listed.
    """
    given: dict[str, list[str]] = {name: [] for name in stages}
    known = {name: _keys(implementation.defaults) for name, implementation in stages.items()}
    for override in overrides:
        key = override.partition("=")[0]
        prefix, _, own = key.rpartition(".")
        chosen = [name for name, keys in known.items() if own in keys and prefix in ("", name, name.rpartition(".")[2])]
        if not chosen:
            listed = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, keys in known.items())
            raise UserError(f"--set {override}: there is no setting {key!r}; the settings are {listed}")
        for name in chosen:
            given[name].append(override.removeprefix(f"{prefix}."))
    return given


def describe_settings(settings: Any, origins: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return ``{key: {"value", "origin"}}`` for ``run.json``."""
    return {key: {"value": value, "origin": origins[key]} for key, value in values_by_key(settings).items()}


def values_by_key(settings: Any) -> dict[str, Any]:
    """Return the values of a stage's settings, those of ``training`` among them."""
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
    problem = ""
    for attempt in _as_json(text, is_tuple=_plain_type(hint, tuple)):
        try:
            return adapter.validate_json(attempt, strict=True)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
    bare = get_type_hints(type(owner))[key]
    wanted = str(bare).replace("typing.", "") if get_origin(bare) else bare.__name__
    raise UserError(f"--set {key}={text}: {problem[0].lower() + problem[1:]} (a {wanted} is wanted)")


def _plain_type(hint: Any, wanted: type) -> bool:
    """Say whether a type, without what is annotated to it, is built from another."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return get_origin(hint) is wanted


def _as_json(text: str, is_tuple: bool) -> list[str]:
    """Return the ways in which a typed value can be meant: as JSON, as a bare word, as a comma-separated list."""
    if not is_tuple or text.startswith("["):
        return [text.lower() if text.lower() in ("true", "false") else text, json.dumps(text)]
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    return [f"[{','.join(map(json.dumps, entries))}]", f"[{','.join(entries)}]"]
