"""Modes, optimizers and recipes of fine-tuning with their defaults for each kind of network and start, and their checks."""

from dataclasses import dataclass
from typing import Literal, get_args

from nnssl.errors import ArgumentError
from planners.primus_rules import CLASS_NAME as PRIMUS
from trainers.finetuning.schedule import FinetuneSchedule, Optimizer, Recipe, Trained

NetworkKind = Literal["unet", "hybrid", "primus"]
LENGTHS = {"short": 50, "medium": 150, "full": 1000}
"""Lengths of fine-tuning that have a name, in epochs."""


@dataclass(frozen=True)
class Mode:
    """Optimizers of a mode of fine-tuning."""

    optimizers: tuple[Optimizer, ...]
    """Supported optimizers; the first is the default, unless the network has another one."""


MODES = {
    "finetune": Mode(("sgd", "adam", "adamw")),
    "linear": Mode(("adam",)),  # Pix2Rep
    "mean_teacher": Mode(("sgd", "adam", "adamw")),
}
PROBE_RATE = 1e-2
"""Learning rate of a linear probe (Pix2Rep)."""
WARMUP_SHARE = 0.1
"""Share of a run that its warm-up takes, and the first phase of ``sawtooth``: 15 of 150 epochs (Wald et al., 2025) ..."""
LONGEST_WARMUP = 50 * 250
"""... but at most this number of steps: 50 of 1,000 epochs (nnU-Net)."""
OWN_OPTIMIZER: dict[NetworkKind, Optimizer] = {"unet": "sgd", "hybrid": "adam", "primus": "adamw"}
"""nnU-Net's for U-Nets and Primus; RepRec's for its hybrid network."""


OWN_RECIPE: dict[NetworkKind, Recipe] = {"unet": "sawtooth", "hybrid": "warmup", "primus": "warmup"}
"""Recipes of pretrained weights: measured for U-Nets (documentation/results/recipes.md), where Wald et al. found the same."""


@dataclass(frozen=True)
class Rates:
    """Highest learning rates of an optimizer."""

    scratch: float
    """Of a network with random weights."""
    pretrained: float
    """Of a pretrained network."""


RATES: dict[Optimizer, Rates] = {
    "sgd": Rates(1e-2, 1e-3),  # nnU-Net; Wald et al.
    "adam": Rates(3e-3, 3e-3),  # measured in short runs (documentation/results/recipes.md)
    "adamw": Rates(1e-3, 1e-3),
}
PRIMUS_RATES: dict[Optimizer, Rates] = {
    "sgd": Rates(1e-2, 1e-3),
    "adam": Rates(1e-4, 1e-4),
    "adamw": Rates(3e-4, 1e-4),  # nnU-Net's Primus; Wald et al.
}
HYBRID_RATES: dict[Optimizer, Rates] = {
    "sgd": Rates(1e-2, 1e-3),
    "adam": Rates(3e-3, 3e-3),  # measured in short runs (documentation/results/recipes.md); RepRec states none
    "adamw": Rates(3e-4, 1e-4),
}
OWN_RATES = {"unet": RATES, "hybrid": HYBRID_RATES, "primus": PRIMUS_RATES}
"""Highest learning rates by the kind of the network."""


@dataclass(frozen=True)
class Choices:
    """What a user chose of the optimization; None stands for the default of mode, network and start.

    Attributes:
        epochs: Number of epochs.
        iterations_per_epoch: Optimizer steps per epoch.
        recipe: Recipe of the pretrained arm.
        scratch_recipe: Recipe of the arm with random weights.
        warmup: Length of the warm-up: a share of the run if below 1, else a number of steps.
        learning_rate: Highest learning rate, of both arms.
        head_learning_rate: Highest learning rate of layers that are new in a pretrained network.
        batch_size: Patches per step.
        optimizer: Optimizer, of both arms.
        trained: What is trained of a pretrained network.
    """

    epochs: int = 1000
    iterations_per_epoch: int = 250
    recipe: Recipe | None = None
    scratch_recipe: Recipe = "nnunet"
    warmup: float | None = None
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    batch_size: int | None = None
    optimizer: Optimizer | None = None
    trained: Trained = "everything"


def network_kind(class_name: str) -> NetworkKind:
    """Return the kind of a plan's network by the name of its class."""
    if class_name == PRIMUS:
        return "primus"
    return "hybrid" if class_name.startswith("nnssl.networks.hybrid.") else "unet"


def check_mode(mode: str) -> None:
    """Check that a mode exists.

    Raises:
        ArgumentError: If it does not.
    """
    if mode not in MODES:
        raise ArgumentError(f"mode must be one of {', '.join(MODES)}, got {mode}", "mode")


def make_schedule(
    mode: str, choices: Choices, kind: NetworkKind = "unet", pretrained: bool = True, head: bool = False
) -> FinetuneSchedule:
    """Return the schedule of an arm.

    A linear probe has the same optimizer, rate and recipe in both arms, because it trains the same new layer in both. The arm
    with random weights ignores ``recipe``, ``head_learning_rate`` and ``trained``.

    Args:
        mode: Mode of fine-tuning.
        choices: What the user chose.
        kind: Kind of the network.
        pretrained: Whether the arm starts from pretrained weights.
        head: Whether the segmentation layers are pretrained as well, so that no layer is new; the default is then ``warmup``
            where it would be ``sawtooth``.

    Raises:
        ArgumentError: If a number is out of range, or mode, optimizer, recipe and warm-up do not fit one another.
    """
    check_mode(mode)
    _check_words(choices)
    _check_numbers(choices)
    if head:
        _check_without_new(choices)
    optimizer = _optimizer(mode, choices, kind)
    if mode == "linear":
        _check_probe(choices)
        rate = PROBE_RATE if choices.learning_rate is None else choices.learning_rate
        recipe: Recipe = "nnunet"
    else:
        rates = OWN_RATES[kind][optimizer]
        rate = choices.learning_rate or (rates.pretrained if pretrained else rates.scratch)
        own: Recipe = "warmup" if head else OWN_RECIPE[kind]
        recipe = (choices.recipe or own) if pretrained else choices.scratch_recipe
    total = choices.epochs * choices.iterations_per_epoch
    if choices.warmup and choices.recipe == "nnunet" == choices.scratch_recipe:
        raise ArgumentError(
            f"warmup must not be given with recipe nnunet, which has none, got {choices.warmup:g}; leave it out, or choose "
            "another recipe",
            "warmup",
            "recipe",
        )
    warmup = _warmup_steps(recipe, choices, total)
    phase = min(round(WARMUP_SHARE * total), LONGEST_WARMUP) if recipe == "sawtooth" else 0
    if phase + warmup >= total:
        raise ArgumentError(
            f"warmup must be less than {total - phase} steps, so that the rate can fall afterwards, got {warmup} of {total} steps"
            f"{f', of which {phase} train new layers alone' if phase else ''}; shorten warmup, lengthen the run with epochs or "
            "iterations_per_epoch, or choose recipe nnunet",
            "warmup",
            "epochs",
            "iterations_per_epoch",
            "recipe",
        )
    return FinetuneSchedule(
        epochs=choices.epochs,
        iterations_per_epoch=choices.iterations_per_epoch,
        recipe=recipe,
        warmup_steps=warmup,
        new_steps=phase,
        learning_rate=rate,
        head_learning_rate=(choices.head_learning_rate if pretrained else None) or rate,
        batch_size=choices.batch_size,
        optimizer=optimizer,
        trained=choices.trained if pretrained else "everything",
    )


def _optimizer(mode: str, choices: Choices, kind: NetworkKind) -> Optimizer:
    supported = MODES[mode].optimizers
    if choices.optimizer is None:
        own = OWN_OPTIMIZER[kind]
        return own if own in supported else supported[0]
    if choices.optimizer not in supported:
        known = " or ".join(supported)
        raise ArgumentError(f"optimizer must be {known} in mode {mode}, got {choices.optimizer}", "optimizer", "mode")
    return choices.optimizer


def _check_probe(choices: Choices) -> None:
    """Check that a linear probe is not given what has no meaning for its single new layer."""
    for name, value, default in (
        ("recipe", choices.recipe, None),
        ("warmup", choices.warmup, None),
        ("head_learning_rate", choices.head_learning_rate, None),
        ("trained", choices.trained, "everything"),
    ):
        if value != default:
            raise ArgumentError(
                f"{name} cannot be given with mode linear, which trains one new layer; leave it out", name, "mode"
            )


def _check_without_new(choices: Choices) -> None:
    """Check that nothing is asked of new layers where all layers are pretrained."""
    for name, value, wrong in (("recipe", choices.recipe, "sawtooth"), ("trained", choices.trained, "new")):
        if value == wrong:
            raise ArgumentError(
                f"{name} must not be {wrong} with weights that were trained with the labels of this data set, got {wrong}: their "
                "segmentation layers are kept, so no layer is new",
                name,
            )


def _warmup_steps(recipe: Recipe, choices: Choices, total: int) -> int:
    """Return the steps of the warm-up of all layers; a share that is given is at least one step."""
    wanted = choices.warmup
    if recipe == "nnunet" or wanted == 0:
        return 0
    if wanted is None:
        return min(round(WARMUP_SHARE * total), LONGEST_WARMUP)
    return max(1, round(wanted * total)) if wanted < 1 else round(wanted)


def _check_words(choices: Choices) -> None:
    for name, kind in (("recipe", Recipe), ("scratch_recipe", Recipe), ("trained", Trained)):
        value = getattr(choices, name)
        if value is not None and value not in get_args(kind):
            raise ArgumentError(f"{name} must be one of {', '.join(get_args(kind))}, got {value}", name)


def _check_numbers(choices: Choices) -> None:
    for name in ("epochs", "iterations_per_epoch", "batch_size"):
        value = getattr(choices, name)
        if value is not None and value < 1:
            raise ArgumentError(f"{name} must be at least 1, got {value}", name)
    for name in ("learning_rate", "head_learning_rate"):
        value = getattr(choices, name)
        if value is not None and value <= 0:
            raise ArgumentError(f"{name} must be above 0, got {value:g}", name)
    warmup = choices.warmup
    if warmup is not None and (warmup < 0 or (warmup >= 1 and warmup != round(warmup))):
        raise ArgumentError(
            f"warmup must be a share of the run below 1, or a whole number of steps, got {warmup:g}", "warmup"
        )
