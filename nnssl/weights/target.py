"""The network that weights are made for: that of a user's own nnU-Net plans, built as nnU-Net builds it."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nnssl.data.raw import find_dataset
from nnssl.errors import UserError
from nnssl.files import read_json
from nnssl.networks.backbone import build_network, seeded
from nnssl.paths import Folders

PLACEHOLDER_LABELS = {"background": 0, "foreground": 1}
"""Of a target whose labels nothing names: nnU-Net starts the last layer of a plan's network anew in any case."""


@dataclass(frozen=True)
class TargetNetwork:
    """A network to fill with weights.

    Attributes:
        network: with a seeded random start.
        label: what it is, for a sentence.
        architecture: as the configuration names it; of a trainer with a network of its own it is that of the plan.
        plans: content of the plans file.
        configuration: its name in the plans.
        settings: of the configuration, with what it inherits.
        dataset_json: of the data set, completed where there is none.
        channel_names: of the images; None where nothing names them.
        num_channels: of the images.
        num_inputs: of the network; after the images' channels a cascade's has one for each label of the stage before.
        num_classes: outputs of the network.
        trainer: name of nnU-Net's trainer whose network it is; None for that of the plan.
    """

    network: nn.Module
    label: str
    architecture: dict[str, Any]
    plans: dict[str, Any]
    configuration: str
    settings: dict[str, Any]
    dataset_json: dict[str, Any]
    channel_names: tuple[str, ...] | None
    num_channels: int
    num_inputs: int
    num_classes: int
    trainer: str | None = None

    @property
    def patch_vox(self) -> tuple[int, ...]:
        """Of the patches, (z, y, x) or (y, x)."""
        return tuple(self.settings["patch_size"])

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Of the patches, (z, y, x) or (y, x)."""
        return tuple(self.settings["spacing"])


def open_target(
    wanted: str,
    folders: Folders,
    *,
    plans_name: str | None = None,
    configuration: str | None = None,
    usual_configuration: str = "3d_fullres",
    channels: Sequence[str] | None = None,
    trainer: str | None = None,
    seed: int = 0,
) -> TargetNetwork:
    """Build the network of a plans file, or of a data set's.

    Args:
        wanted: a plans file, or a data set (number or name) that nnU-Net or nnssl has planned.
        folders: nnU-Net's folders.
        plans_name: which plans of the data set; None for the only ones, or ``nnUNetPlans``.
        configuration: of the plans; None for the usual one, or the only one there is.
        usual_configuration: taken if the plans have it, or the U-Net's of the same name, and none is asked for.
        channels: names of the images' channels, or one number; None for those of ``dataset.json``.
        trainer: name of one of nnU-Net's trainers that builds a network of its own, such as ``nnUNet_Primus_S_Trainer``.
        seed: of the random start.

    Raises:
        UserError: there is no such file, configuration or trainer, or the channels are not known.
    """
    path = _find_plans(wanted, folders, plans_name)
    plans = read_json(path, "plans file")
    if not is_plans(plans):
        raise UserError(f"{path}: is no plans file of nnU-Net; it names no configurations, plans or data set")
    chosen = _choose_configuration(path, list(plans["configurations"]), configuration, usual_configuration)
    dataset_json = _dataset_json(path, plans, folders, channels, labels_matter=trainer is not None)
    return build_target(plans, chosen, dataset_json, f"{chosen} of {path}", trainer, seed)


def is_plans(content: Any) -> bool:
    """Whether a JSON file's content is that of a plans file."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("configurations"), dict)
        and all(isinstance(content.get(key), str) for key in ("dataset_name", "plans_name"))
    )


def build_target(
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    label: str,
    trainer: str | None = None,
    seed: int = 0,
    network: nn.Module | None = None,
) -> TargetNetwork:
    """Build the network of a configuration, with a seeded random start.

    Args:
        plans: content of a plans file.
        configuration: one of them.
        dataset_json: names channels and labels.
        label: what it is, for a sentence.
        trainer: see ``open_target``.
        seed: of the random start.
        network: that is there already, of this configuration; None to build it.

    Raises:
        UserError: nnU-Net cannot build a network from the plan, or the trainer cannot; or the plan normalises another
            number of channels.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # slow to import

    try:
        manager = PlansManager(plans)
        resolved = manager.get_configuration(configuration)
        architecture = resolved.configuration["architecture"]
        names = dataset_json["channel_names"]
        num_inputs = len(names) + _channels_of_previous_stage(manager, resolved, dataset_json)
        num_classes = manager.get_label_manager(dataset_json).num_segmentation_heads
        schemes = resolved.configuration["normalization_schemes"]
        assert resolved.patch_size
        if network is None and trainer is None:
            network = build_network(architecture, num_inputs, num_classes, seed)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise UserError(
            f"{label}: nnU-Net cannot build a network from it ({type(error).__name__}: {error}); check plans and dataset.json, "
            "or plan again"
        ) from error
    if len(schemes) != len(names):
        raise UserError(
            f"{label}: normalises {len(schemes)} channel(s), but {len(names)} are named ({', '.join(map(str, names.values()))}); "
            "name those of the plan's data set"
        )
    if network is None:
        assert trainer is not None
        network = seeded(
            lambda: _build_by_trainer(trainer, manager, resolved, num_inputs, num_classes), seed, "network"
        )
    numbered = all(str(name).isdecimal() for name in names.values())
    return TargetNetwork(
        network=network,
        label=label + (f" with {trainer}" if trainer else ""),
        architecture=architecture,
        plans=_with_architecture(plans, configuration, resolved.configuration),
        configuration=configuration,
        settings=resolved.configuration,
        dataset_json=dataset_json,
        channel_names=None if numbered else tuple(str(names[key]) for key in sorted(names, key=int)),
        num_channels=len(names),
        num_inputs=num_inputs,
        num_classes=num_classes,
        trainer=trainer,
    )


def _with_architecture(plans: dict[str, Any], configuration: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return plans that name the network of a configuration; nnU-Net reconstructs it where its plans from before 2.3 do not."""
    if _names_architecture(plans, configuration):
        return plans
    return {**plans, "configurations": {**plans["configurations"], configuration: settings}}


def _names_architecture(plans: dict[str, Any], configuration: str) -> bool:
    content = plans["configurations"][configuration]
    if "architecture" in content:
        return True
    return "inherits_from" in content and _names_architecture(plans, content["inherits_from"])


def _find_plans(wanted: str, folders: Folders, plans_name: str | None) -> Path:
    if wanted.endswith(".json"):
        if plans_name is not None:
            raise UserError(f"-p {plans_name}: {wanted} is a plans file already; leave -p out")
        return Path(wanted).expanduser().absolute()
    folder = folders.preprocessed / find_dataset(wanted, folders)
    candidates = [path for path in sorted(folder.glob("*.json")) if "plans" in path.stem.lower()]
    present = [path.stem for path in candidates if is_plans(read_json(path, "plans file"))]
    if plans_name is None and len(present) > 1 and "nnUNetPlans" in present:
        plans_name = "nnUNetPlans"
    if plans_name is None and len(present) == 1:
        plans_name = present[0]
    if plans_name not in present:
        there = ", ".join(present) or "none"
        asked = f"no plans {plans_name}" if plans_name else "not one plans file"
        raise UserError(
            f"{folder}: has {asked} (there: {there}); name one with -p, or run nnUNetv2_plan_and_preprocess"
        )
    return folder / f"{plans_name}.json"


def _choose_configuration(path: Path, present: list[str], wanted: str | None, usual: str) -> str:
    if wanted is not None:
        if wanted not in present:
            raise UserError(f"-c {wanted}: {path} has no such configuration; it has {', '.join(sorted(present))}")
        return wanted
    # a configuration of nnssl's own that a U-Net's plan does not have: 3d_fullres_hybrid, 3d_fullres_primus
    for name in (usual, usual.removesuffix("_hybrid").removesuffix("_primus")):
        if name in present:
            return name
    if len(present) == 1:
        return present[0]
    raise UserError(f"{path}: has {', '.join(sorted(present))}, none of them {usual}; choose one with -c")


def _dataset_json(
    path: Path, plans: dict[str, Any], folders: Folders, channels: Sequence[str] | None, labels_matter: bool
) -> dict[str, Any]:
    """Return the data set's own description, with other channels if the user names some."""
    name = plans["dataset_name"]
    found = [
        path.parent / "dataset.json",
        folders.preprocessed / name / "dataset.json",
        folders.raw / name / "dataset.json",
    ]
    present = next((each for each in found if each.is_file()), None)
    content = {} if present is None else read_json(present, "dataset.json")
    if not isinstance(content, dict):
        raise UserError(f"{present}: is no dataset.json; it starts with {{")
    if channels is not None:
        content = {**content, "channel_names": _named(channels)}
    if "channel_names" not in content:
        raise UserError(f"{path}: there is no dataset.json beside it that names channels; say them with --channels")
    names = content["channel_names"]
    if not isinstance(names, dict) or not names or not all(str(key).isdecimal() for key in names):
        raise UserError(
            f'{present}: channel_names is not {{"0": NAME, ...}}; mend it, or say the channels with --channels'
        )
    labels = content.get("labels")
    if not isinstance(labels, dict) or "background" not in labels:
        if labels_matter:
            raise UserError(
                f"{path}: no dataset.json names its labels, which decide the shape of this trainer's network; put the data set's "
                "dataset.json beside the plans"
            )
        content = {**content, "labels": PLACEHOLDER_LABELS}
    return {"file_ending": ".nii.gz", "numTraining": 0, **content}


def _named(channels: Sequence[str]) -> dict[str, str]:
    if len(channels) == 1 and channels[0].isdecimal():
        if int(channels[0]) < 1:
            raise UserError(f"--channels {channels[0]}: a network needs 1 or more")
        return {str(channel): str(channel) for channel in range(int(channels[0]))}
    if len(set(channels)) != len(channels):
        raise UserError(f"--channels {' '.join(channels)}: names one twice")
    return {str(channel): name for channel, name in enumerate(channels)}


def _channels_of_previous_stage(manager: Any, settings: Any, dataset_json: dict[str, Any]) -> int:
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    return determine_num_input_channels(manager, settings, dataset_json) - len(dataset_json["channel_names"])


def _build_by_trainer(name: str, manager: Any, settings: Any, channels: int, classes: int) -> nn.Module:
    """Build the network that one of nnU-Net's trainers makes, with the arguments that its version of nnU-Net passes."""
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(nnunetv2.__path__[0]) / "training" / "nnUNetTrainer"
    cls: Any = recursive_find_python_class(str(folder), name, "nnunetv2.training.nnUNetTrainer")
    if cls is None:
        raise UserError(f"--trainer {name}: nnU-Net has no such trainer; its names are those of nnUNetv2_train -tr")
    if "plans_manager" in inspect.signature(cls.build_network_architecture).parameters:
        arguments: tuple[Any, ...] = (manager, settings, channels, classes)
    else:
        arguments = (
            settings.network_arch_class_name,
            settings.network_arch_init_kwargs,
            settings.network_arch_init_kwargs_req_import,
            channels,
            classes,
        )
    try:
        network: nn.Module = cls.build_network_architecture(*arguments, enable_deep_supervision=True)
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"--trainer {name}: cannot build its network for {manager.plans_name}, patch {list(settings.patch_size)} ({error})"
        ) from error
    return network
