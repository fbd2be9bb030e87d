"""The network that weights are fitted to: that of a user's nnU-Net plans, built as nnU-Net builds it."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nnssl.data.raw import find_dataset
from nnssl.errors import ArgumentError, UserError
from nnssl.files import read_json
from nnssl.networks.backbone import build_network, seeded
from nnssl.paths import Folders

PLACEHOLDER_LABELS = {"background": 0, "foreground": 1}
"""Labels of a target without known labels. nnU-Net initialises the last layer of a plan's network in any case."""


@dataclass(frozen=True)
class TargetNetwork:
    """A network to fill with weights.

    Attributes:
        network: The network, with a seeded random initialisation.
        label: Description of the network within a sentence.
        architecture: Architecture in the plan's configuration, even if a trainer builds its own network.
        plans: Content of the plans file.
        configuration: Name of the configuration.
        settings: Settings of the configuration, including inherited ones.
        dataset_json: Content of ``dataset.json``, with missing keys added.
        channel_names: Channels of the images; None if they are not named.
        num_channels: Number of channels of the images.
        num_inputs: Number of inputs of the network. In a cascade, the images' channels are followed by one input for each label
            of the previous stage.
        num_classes: Number of outputs of the network.
        trainer: Name of the nnU-Net trainer that builds the network; None for the network of the plan.
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
        """Size of the patches in voxels, (z, y, x) or (y, x)."""
        return tuple(self.settings["patch_size"])

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Spacing of the patches, (z, y, x) or (y, x)."""
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
    """Build the network of a plans file, or of the plans of a data set.

    Args:
        wanted: Plans file, or a data set (number or name) that nnU-Net or nnssl has planned.
        folders: nnU-Net's folders.
        plans_name: Name of the data set's plans; None for the only plans, or ``nnUNetPlans``.
        configuration: Configuration of the plans; None for the usual one, or the only one.
        usual_configuration: Default configuration if the plans have it, or the U-Net configuration of the same name.
        channels: Names of the images' channels, or their number as a single text; None for those of ``dataset.json``.
        trainer: Name of a trainer of nnU-Net that builds its own network, such as ``nnUNet_Primus_S_Trainer``.
        seed: Random seed for the initialisation.

    Raises:
        UserError: If a file is missing or wrong, or the channels are unknown.
        ArgumentError: If there is no such configuration or trainer, or the channels are wrong.
    """
    path = _find_plans(wanted, folders, plans_name)
    plans = read_json(path, "plans file")
    if not is_plans(plans):
        raise UserError(
            f"{path}: is not a plans file of nnU-Net (without configurations, plans_name or dataset_name); choose another"
        )
    chosen = _choose_configuration(path, list(plans["configurations"]), configuration, usual_configuration)
    dataset_json = _dataset_json(path, plans, folders, channels, labels_matter=trainer is not None)
    return build_target(plans, chosen, dataset_json, f"{chosen} of {path}", trainer, seed)


def is_plans(content: Any) -> bool:
    """Return whether the content of a JSON file is that of a plans file."""
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
    """Build the network of a configuration with a seeded random initialisation.

    Args:
        plans: Content of a plans file.
        configuration: Configuration of the plans.
        dataset_json: Content of ``dataset.json``, which names channels and labels.
        label: Description of the network within a sentence.
        trainer: As in ``open_target``.
        seed: Random seed for the initialisation.
        network: Existing network of this configuration; None to build it.

    Raises:
        UserError: If nnU-Net cannot build a network from the plan, or the plan normalises another number of channels.
        ArgumentError: If the trainer does not exist or cannot build its network.
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
            f"{label}: nnU-Net cannot build this network ({type(error).__name__}: {error}); check the plans file and "
            "dataset.json, or plan again"
        ) from error
    if len(schemes) != len(names):
        raise UserError(
            f"{label}: normalises {len(schemes)} channel(s), but {len(names)} are named ({', '.join(map(str, names.values()))}); "
            "name the channels of the plan's data set"
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
    """Return plans with the network of a configuration. nnU-Net before 2.3 did not write it, so nnU-Net reconstructs it."""
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
            raise ArgumentError(
                f"plans_name must not be given if for_plans is a plans file ({wanted}), got {plans_name}",
                "plans_name",
                "for_plans",
            )
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
        asked = f"no plans {plans_name}" if plans_name else "several plans" if present else "no plans"
        raise ArgumentError(
            f"{folder}: has {asked} (found: {there}); set plans_name, or run nnUNetv2_plan_and_preprocess", "plans_name"
        )
    return folder / f"{plans_name}.json"


def _choose_configuration(path: Path, present: list[str], wanted: str | None, usual: str) -> str:
    if wanted is not None:
        if wanted not in present:
            known = ", ".join(sorted(present))
            raise ArgumentError(f"configuration must be one of {known} (in {path}), got {wanted}", "configuration")
        return wanted
    # nnU-Net's plans do not have nnssl's configurations 3d_fullres_hybrid and 3d_fullres_primus.
    for name in (usual, usual.removesuffix("_hybrid").removesuffix("_primus")):
        if name in present:
            return name
    if len(present) == 1:
        return present[0]
    raise ArgumentError(
        f"{path}: has {', '.join(sorted(present))}, but not {usual}; set configuration", "configuration"
    )


def _dataset_json(
    path: Path, plans: dict[str, Any], folders: Folders, channels: Sequence[str] | None, labels_matter: bool
) -> dict[str, Any]:
    """Return the content of the data set's ``dataset.json``, with other channels if the user names them."""
    name = plans["dataset_name"]
    found = [
        path.parent / "dataset.json",
        folders.preprocessed / name / "dataset.json",
        folders.raw / name / "dataset.json",
    ]
    present = next((each for each in found if each.is_file()), None)
    content = {} if present is None else read_json(present, "dataset.json")
    if not isinstance(content, dict):
        raise UserError(f"{present}: is not a dataset.json, which must hold a JSON object; replace the file")
    if channels is not None:
        content = {**content, "channel_names": _named(channels)}
    if "channel_names" not in content:
        raise ArgumentError(f"{path}: no dataset.json beside this file gives channel_names; set channels", "channels")
    names = content["channel_names"]
    if not isinstance(names, dict) or not names or not all(str(key).isdecimal() for key in names):
        raise ArgumentError(
            f'{present}: channel_names must have the form {{"0": NAME, ...}}; fix the file or set channels', "channels"
        )
    labels = content.get("labels")
    if not isinstance(labels, dict) or "background" not in labels:
        if labels_matter:
            raise UserError(
                f"{path}: no dataset.json gives labels, which decide the shape of this trainer's network; put the data set's "
                "dataset.json beside the plans"
            )
        content = {**content, "labels": PLACEHOLDER_LABELS}
    return {"file_ending": ".nii.gz", "numTraining": 0, **content}


def _named(channels: Sequence[str]) -> dict[str, str]:
    if len(channels) == 1 and channels[0].isdecimal():
        if int(channels[0]) < 1:
            raise ArgumentError(f"channels must be at least 1, got {channels[0]}", "channels")
        return {str(channel): str(channel) for channel in range(int(channels[0]))}
    if len(set(channels)) != len(channels):
        raise ArgumentError(f"channels must have different names, got {' '.join(channels)}", "channels")
    return {str(channel): name for channel, name in enumerate(channels)}


def _channels_of_previous_stage(manager: Any, settings: Any, dataset_json: dict[str, Any]) -> int:
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    return determine_num_input_channels(manager, settings, dataset_json) - len(dataset_json["channel_names"])


def _build_by_trainer(name: str, manager: Any, settings: Any, channels: int, classes: int) -> nn.Module:
    """Build the network of a trainer of nnU-Net, with the arguments that the installed version of nnU-Net passes."""
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(nnunetv2.__path__[0]) / "training" / "nnUNetTrainer"
    cls: Any = recursive_find_python_class(str(folder), name, "nnunetv2.training.nnUNetTrainer")
    if cls is None:
        raise ArgumentError(f"trainer must be one that nnUNetv2_train -tr accepts, got {name}", "trainer")
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
        raise ArgumentError(
            f"trainer {name} cannot build its network for {manager.plans_name} with patch {list(settings.patch_size)} "
            f"({error}); choose another trainer or other plans",
            "trainer",
        ) from error
    return network
