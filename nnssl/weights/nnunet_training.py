"""Checkpoints of nnU-Net's training with labels, as a start for pretraining and fine-tuning.

nnU-Net writes its plans and ``dataset.json`` into ``init_args`` of every checkpoint and beside the folders of the folds. Encoder
and decoder of such a file count as pretrained. Its network is built only from classes of nnU-Net and nnssl, because a plan
names its classes, and a file from elsewhere must not choose what is imported.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nnssl.checkpoint import ACCEPTED, Provenance, to_plain
from nnssl.errors import UserError
from nnssl.files import read_json
from nnssl.networks.backbone import build_network, planned_configuration, weightless
from nnssl.version import __version__
from nnssl.weights.adaptation_plan import PLAIN, RESIDUAL
from nnssl.weights.importable import check_architecture
from nnssl.weights.tensor_names import SEGMENTATION, WRAPPERS

SUPERVISED = "supervised"
"""Method and stage of weights that nnU-Net trained with labels."""

ARGUMENTS = ("plans", "configuration", "fold", "dataset_json")
"""Arguments of nnU-Net's trainer that are read from a checkpoint."""

MOVED = {"PlainConvUNet": PLAIN, "ResidualEncoderUNet": RESIDUAL}
"""Present names of nnU-Net's networks, whose modules were called otherwise in earlier versions."""

LAYOUTS = (
    (r"conv_blocks_context\.\d+\.\d+\.conv1\.", "STU-Net, whose residual blocks nnU-Net's networks do not have"),
    (r"conv_blocks_context\.", "nnU-Net version 1 (Generic_UNet)"),
    (r"(module\.)?(swinViT|swin_vit)\.", "SwinUNETR"),
)
"""Networks that are recognised by the names of their tensors and cannot be used, the most specific first."""


def is_training(content: Mapping[str, Any]) -> bool:
    """Return whether a file without anything of nnssl looks like a checkpoint of a training."""
    return isinstance(content.get("network_weights"), Mapping) or isinstance(content.get("state_dict"), Mapping)


def read_training(path: Path, content: Mapping[str, Any]) -> tuple[dict[str, Any], Provenance]:
    """Read a checkpoint of nnU-Net's training.

    Args:
        path: Path of the checkpoint. ``plans.json`` and ``dataset.json`` are looked up beside it and two folders up, where
            nnU-Net writes them, unless the checkpoint holds them.
        content: Content of the checkpoint, loaded safely.

    Returns:
        The content, with the weights under the names of nnU-Net's network, and where the weights come from.

    Raises:
        UserError: If there are no plans, or the network in them is unknown, cannot be built, or is not that of the weights.
    """
    weights = content.get("network_weights")
    found = weights if isinstance(weights, Mapping) else content["state_dict"]
    for pattern, name in LAYOUTS:
        if any(re.match(pattern, str(key)) for key in found):
            raise UserError(
                f"{path}: has the weights of {name}, which cannot be fitted; train with nnU-Net version 2; {ACCEPTED}"
            )
    if weights is None or not all(isinstance(each, Tensor) for each in weights.values()):
        raise UserError(f"{path}: has no network_weights that map names to tensors; {ACCEPTED}")
    given = content.get("init_args")
    arguments = {key: given[key] for key in ARGUMENTS if key in given} if isinstance(given, Mapping) else {}
    try:
        arguments = to_plain(arguments)
    except TypeError as error:
        raise UserError(f"{path}: its init_args cannot be read ({error}); {ACCEPTED}") from error
    plans = _current(path, _find(path, arguments, "plans", "plans.json"))
    dataset_json = _with_channel_names(path, _find(path, arguments, "dataset_json", "dataset.json"))
    configuration = _configuration(path, arguments, plans)
    renamed = {_without_wrappers(name): value for name, value in weights.items()}
    _check_network(path, renamed, plans, configuration)
    provenance = Provenance(
        nnssl_version=__version__,
        method=SUPERVISED,
        stage=SUPERVISED,
        dataset_name=plans["dataset_name"],
        plans_name=plans["plans_name"],
        configuration=configuration,
        plans=plans,
        dataset_json=dataset_json,
        settings={
            "trainer": content.get("trainer_name"),
            "fold": arguments.get("fold"),
            "epochs": content.get("current_epoch"),
        },
        seed=0,
        step=0,
        total_steps=0,
        finished=True,
        pretrained=tuple(sorted({f"{name.partition('.')[0]}." for name in renamed})),
        init=None,
    )
    return {**content, "network_weights": renamed}, provenance


def _without_wrappers(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _find(path: Path, arguments: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    """Return plans or ``dataset.json`` from the checkpoint or from a file beside it or two folders up."""
    value = arguments.get(key)
    if value is None:
        places = (path.parent / name, path.parent.parent / name)
        present = next((place for place in places if place.is_file()), None)
        if present is None:
            raise UserError(
                f"{path}: has weights of a training but no {key}, and there is no {name} beside it or two folders up; copy "
                f"{name} of the model folder there; {ACCEPTED}"
            )
        value = read_json(present, name)
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} must be a dictionary, got {type(value).__name__}; {ACCEPTED}")
    return value


def _current(path: Path, plans: dict[str, Any]) -> dict[str, Any]:
    """Return plans with the present names of nnU-Net's networks.

    Raises:
        UserError: If they are no plans of nnU-Net version 2, or name a network or layer of another package.
    """
    settings = plans.get("configurations")
    named = all(isinstance(plans.get(key), str) for key in ("dataset_name", "plans_name"))
    if not isinstance(settings, dict) or not all(isinstance(each, dict) for each in settings.values()) or not named:
        raise UserError(f"{path}: its plans are not those of nnU-Net version 2; {ACCEPTED}")
    changed = {}
    for name, configuration in settings.items():
        changed[name] = configuration
        if "architecture" in configuration:
            changed[name] = {**configuration, "architecture": _allowed(path, configuration["architecture"])}
    return {**plans, "configurations": changed}


def _allowed(path: Path, architecture: Any) -> dict[str, Any]:
    """Return an architecture with the present name of its network, of which nothing but nnU-Net and torch is imported."""
    named = architecture
    if isinstance(architecture, dict) and "network_class_name" in architecture:
        name = str(architecture["network_class_name"])
        named = {**architecture, "network_class_name": MOVED.get(name.rpartition(".")[2], name)}
    check_architecture(path, named)
    return dict(named)


def _with_channel_names(path: Path, dataset_json: dict[str, Any]) -> dict[str, Any]:
    """Return a ``dataset.json`` with the key ``channel_names``, which was ``modality`` before."""
    names = dataset_json.get("channel_names", dataset_json.get("modality"))
    if not isinstance(names, dict) or not names or not all(str(key).isdecimal() for key in names):
        raise UserError(f'{path}: its dataset.json must name the channels as {{"0": NAME, ...}}, got {names!r}')
    return {**{key: value for key, value in dataset_json.items() if key != "modality"}, "channel_names": names}


def _configuration(path: Path, arguments: Mapping[str, Any], plans: Mapping[str, Any]) -> str:
    """Return the configuration that was trained: as the checkpoint says, as its model folder is called, or the only one."""
    present = list(plans["configurations"])
    named = path.absolute().parent.parent.name.split("__")
    candidates = (arguments.get("configuration"), named[2] if len(named) == 3 else None, *present[: len(present) == 1])
    chosen = next((each for each in candidates if each is not None), None)
    if chosen not in present:
        raise UserError(
            f"{path}: does not say which of the configurations {', '.join(present)} it was trained with; keep the name of its "
            "model folder, TRAINER__PLANS__CONFIGURATION"
        )
    return str(chosen)


def _check_network(path: Path, weights: Mapping[str, Tensor], plans: dict[str, Any], configuration: str) -> None:
    """Check that the weights belong to the network of the plans, which a trainer may have replaced by its own.

    Raises:
        UserError: If the network cannot be built, or a tensor is missing or has another shape.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nnU-Net's, for plans of its first versions
            architecture = planned_configuration(plans, configuration)["architecture"]
            with weightless():
                network = build_network(_allowed(path, architecture), 1, 2, seed=0, initialise=False)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise UserError(f"{path}: nnU-Net cannot build the network of its plans ({reason}); {ACCEPTED}") from error
    layers = dict(network.named_modules(remove_duplicate=False))
    first = next(each for each in network.modules() if isinstance(each, (nn.Conv2d, nn.Conv3d)))
    inputs = {f"{name}.weight" for name, layer in layers.items() if layer is first}
    for name, value in network.state_dict().items():
        if SEGMENTATION in f".{name}":
            continue
        other = weights.get(name)
        shapes = [list(each.shape) for each in (value, other) if each is not None]
        if name in inputs:
            for shape in shapes:
                shape[1:2] = []  # the number of channels
        if other is None or shapes[0] != shapes[1]:
            what = "is missing" if other is None else f"has the shape {shapes[1]} instead of {shapes[0]}"
            raise UserError(
                f"{path}: its weights are not those of {architecture['network_class_name']}, the network of its plans ({name} "
                f"{what}); its trainer built another network, which cannot be fitted; {ACCEPTED}"
            )
