"""The adaptation plan: how nnU-Net's own loader of pretrained weights, and model hubs, describe a checkpoint.

Source: nnU-Net's main branch (``nnUNetv2_preprocess_like_nnssl``, ``nnUNetv2_train_pretrained``) and the checkpoints of
OpenMind (Wald et al., An OpenMind for 3D medical vision self-supervised learning, 2024), whose files are read here too. The
fields of ``pretrain_plan`` are those that ``AdaptationPlan.from_dict`` of MIC-DKFZ's package demands: it accepts neither fewer
nor others. It has no arguments of ``PlainConvUNet`` and none of Primus, of which it therefore knows the named sizes only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl.checkpoint import ACCEPTED
from nnssl.errors import UserError
from nnssl.networks.primus_positions import INIT_VALUES, SCALE_ATTN_INNER
from nnssl.weights.importable import check_architecture

KEY = "nnssl_adaptation_plan"

NETWORKS = "dynamic_network_architectures.architectures"
PLAIN = f"{NETWORKS}.unet.PlainConvUNet"
RESIDUAL = f"{NETWORKS}.unet.ResidualEncoderUNet"
PRIMUS = f"{NETWORKS}.primus.Primus"

NAMED_PRIMUS = {"PrimusS": (396, 12, 6), "PrimusB": (792, 12, 12), "PrimusM": (864, 16, 12), "PrimusL": (1056, 24, 16)}
"""Width, depth and heads of the networks that nnU-Net knows by name, with tokens of 8 x 8 x 8 voxels. Source: Primus, table 1."""

RESENC_L: dict[str, Any] = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1] * 5,
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
"""Arguments of the network with the name ResEncL."""

PRIMUS_CONSTANTS = {"init_values": INIT_VALUES, "scale_attn_inner": SCALE_ATTN_INNER}
"""Arguments of Primus that nnU-Net's trainers read and that are alike in all plans of nnssl."""

PRIMUS_NAMES = {"encoder_eva_depth": "eva_depth", "encoder_eva_numheads": "eva_numheads"}
"""Names of arguments of Primus in nnU-Net's trainers of pretrained weights, and in the class."""

CLASSES = ("conv_op", "norm_op", "dropout_op", "nonlin")
"""Arguments of a U-Net whose values are classes, written as strings."""

KEYS: dict[str, dict[str, Any]] = {
    PLAIN: {
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stages.0",
        "keys_to_in_proj": (
            "encoder.stages.0.0.convs.0.all_modules.0",
            "encoder.stages.0.0.convs.0.conv",
        ),
        "key_to_lpe": None,
    },
    RESIDUAL: {
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
        "key_to_lpe": None,
    },
    PRIMUS: {
        "key_to_encoder": "eva",
        "key_to_stem": "down_projection",
        "keys_to_in_proj": ("down_projection.proj",),
        "key_to_lpe": "eva.pos_embed",
    },
}
"""Names of the parts of each network."""


@dataclass(frozen=True)
class AdaptationPlan:
    """Description of the network and the pretraining in a checkpoint made elsewhere.

    Attributes:
        network_class: Dotted name of the network's class.
        arch_kwargs: Arguments of the class.
        requires_import: Names of the arguments whose values are classes, written as strings.
        patch_vox: Patch size of the pretraining.
        spacing_mm: Spacing of the pretraining; None if the file does not say.
        recommended_patch_vox: Patch size recommended for fine-tuning; None if the file does not say.
        pretrain_num_input_channels: Number of channels of the images.
        key_to_encoder: Prefix of the encoder's tensors.
        key_to_stem: Prefix of the stem's tensors.
        key_to_lpe: Name of the learned positional embedding; None if there is none.
    """

    network_class: str
    arch_kwargs: dict[str, Any]
    requires_import: tuple[str, ...]
    patch_vox: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    recommended_patch_vox: tuple[int, ...] | None
    pretrain_num_input_channels: int
    key_to_encoder: str
    key_to_stem: str
    key_to_lpe: str | None

    def architecture(self) -> dict[str, Any]:
        """Return the network in the form of a plan's configuration."""
        return {
            "network_class_name": self.network_class,
            "arch_kwargs": self.arch_kwargs,
            "_kw_requires_import": list(self.requires_import),
        }


def network_kind(class_name: str) -> str:
    """Return which of nnU-Net's networks a class is or extends: ``PLAIN``, ``RESIDUAL`` or ``PRIMUS``.

    Raises:
        ValueError: If it is none of them.
    """
    last = class_name.rpartition(".")[2]
    if "Primus" in last:
        return PRIMUS
    if last == "ResEncL" or last.endswith("ResidualEncoderUNet"):
        return RESIDUAL
    if last.endswith(("PlainConvUNet", "HybridUNet")):
        return PLAIN
    raise ValueError(f"{class_name} is not a PlainConvUNet, ResidualEncoderUNet or Primus")


def write_adaptation_plan(
    architecture: Mapping[str, Any],
    configuration: str,
    patch_vox: Sequence[int],
    spacing_mm: Sequence[float],
    channels: int,
    plans: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], str]:
    """Return the adaptation plan of a network, in types that a safe load accepts, and a remark.

    A network with a transformer at its bottleneck is described as the U-Net around it, whose names it keeps. Primus has a name
    in four sizes only. Another size is described by its arguments, under the names of the class and under those that nnU-Net's
    trainers read.

    Args:
        architecture: The network, in the form of a plan's configuration.
        configuration: Name of the configuration.
        patch_vox: Patch size.
        spacing_mm: Spacing of the pretraining.
        channels: Number of input channels of the network.
        plans: Content of the plans file; None to leave out what only MIC-DKFZ's package demands.
        settings: Settings of the configuration, including inherited ones; needed with ``plans``.

    Returns:
        The plan, and a remark on its limits; the remark is empty if there are none.

    Raises:
        ValueError: If the format has no name for the network.
    """
    kind = network_kind(architecture["network_class_name"])
    kwargs = dict(architecture["arch_kwargs"])
    name, remark = kind, ""
    written: dict[str, Any] | None = {key: _plain(value) for key, value in kwargs.items()}
    requires: list[str] | None = list(architecture["_kw_requires_import"])
    if kind == PRIMUS:
        size = (kwargs["embed_dim"], kwargs["eva_depth"], kwargs["eva_numheads"])
        named = [each for each, numbers in NAMED_PRIMUS.items() if numbers == size]
        if named and tuple(kwargs["patch_embed_size"]) == (8, 8, 8):
            name, written, requires = named[0], None, None
        else:
            written = {
                **(written or {}),
                **{key: kwargs[name] for key, name in PRIMUS_NAMES.items()},
                **PRIMUS_CONSTANTS,
            }
            remark = (
                "Primus has a name in four sizes only; this one is described by its arguments, which nnssl and nnU-Net read, but "
                "not MIC-DKFZ's package"
            )
    else:
        own = [key for key in kwargs if key.startswith("transformer_") or key == "token_stage"]
        if own:
            written = {key: value for key, value in (written or {}).items() if key not in own}
            remark = (
                "the transformer of the hybrid network is omitted, because nnU-Net's adaptation plan cannot describe it"
            )
    patch = [int(n) for n in patch_vox]
    spacing = [float(mm) for mm in spacing_mm]
    if plans is not None and settings is not None:
        pretraining = _pretrain_plan(configuration, patch, spacing, plans, settings)
    else:
        pretraining = {"configurations": {configuration: {"patch_size": patch, "spacing": spacing}}}
    plan = {
        "architecture_plans": {
            "arch_class_name": name,
            "arch_kwargs": written,
            "arch_kwargs_requiring_import": requires,
        },
        "pretrain_plan": pretraining,
        "pretrain_num_input_channels": int(channels),
        "recommended_downstream_patchsize": patch,
        "pretrain_patch_size": patch,
        "architecture_kwargs": written,
        **KEYS[kind],
    }
    return plan, remark


def _pretrain_plan(
    configuration: str, patch: list[int], spacing_mm: list[float], plans: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the plan of a pretraining with exactly the fields of MIC-DKFZ's ``Plan`` and ``ConfigurationPlan``."""
    described = {
        "data_identifier": settings["data_identifier"],
        "preprocessor_name": settings["preprocessor_name"],
        "spacing_style": "median",  # one of onemmiso, median and noresample; the spacing itself is given
        "normalization_schemes": settings["normalization_schemes"],
        "use_mask_for_norm": settings["use_mask_for_norm"],
        "resampling_fn_data": settings["resampling_fn_data"],
        "resampling_fn_data_kwargs": settings["resampling_fn_data_kwargs"],
        "resampling_fn_mask": settings["resampling_fn_seg"],
        "resampling_fn_mask_kwargs": settings["resampling_fn_seg_kwargs"],
        "spacing": spacing_mm,
        "patch_size": patch,
    }
    own = (
        "dataset_name", "plans_name", "original_median_spacing_after_transp", "image_reader_writer", "transpose_forward",
        "transpose_backward", "experiment_planner_used",
    )  # fmt: skip
    whole = {key: plans[key] for key in own}
    return {key: _plain(value) for key, value in (whole | {"configurations": {configuration: described}}).items()}


def read_adaptation_plan(path: Path, content: Mapping[str, Any]) -> AdaptationPlan:
    """Read the adaptation plan of a checkpoint that was made elsewhere.

    Unknown keys are accepted, because several programs write such files and add their own keys.

    Args:
        path: Path of the checkpoint, for error messages.
        content: Content of the checkpoint, loaded safely.

    Raises:
        UserError: If a key is missing or the network cannot be built.
    """
    plan = content[KEY]
    if not isinstance(content.get("network_weights"), Mapping):
        raise UserError(
            f"{path}: has an {KEY} but no network_weights; download the complete checkpoint again; {ACCEPTED}"
        )
    try:
        architecture = plan["architecture_plans"]
        name = architecture["arch_class_name"]
        first = next(iter(plan["pretrain_plan"]["configurations"].values()))
        # Pretraining may use smaller patches than its plan says; this key then holds their size.
        patch = tuple(int(n) for n in plan.get("pretrain_patch_size") or first["patch_size"])
        spacing = first.get("spacing")
        recommended = plan.get("recommended_downstream_patchsize")
        network, kwargs, requires = _network(name, architecture, patch)
        check_architecture(
            path, {"network_class_name": network, "arch_kwargs": kwargs, "_kw_requires_import": requires}
        )
        return AdaptationPlan(
            network_class=network,
            arch_kwargs=kwargs,
            requires_import=requires,
            patch_vox=patch,
            spacing_mm=None if spacing is None else tuple(float(mm) for mm in spacing),
            recommended_patch_vox=None if recommended is None else tuple(int(n) for n in recommended),
            pretrain_num_input_channels=int(plan["pretrain_num_input_channels"]),
            key_to_encoder=plan["key_to_encoder"],
            key_to_stem=plan["key_to_stem"],
            key_to_lpe=plan.get("key_to_lpe"),
        )
    except KeyError as error:
        raise UserError(
            f"{path}: the {KEY} lacks the key {error}; ask the author of the file for a complete one; {ACCEPTED}"
        ) from error
    except (TypeError, ValueError, AttributeError, StopIteration) as error:
        raise UserError(
            f"{path}: the {KEY} cannot be read ({error}); ask the author of the file for a correct one; {ACCEPTED}"
        ) from error


def _network(
    name: str, architecture: Mapping[str, Any], patch_vox: tuple[int, ...]
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Return the class of a network by its name, its arguments, and the names of the arguments that are classes."""
    last = name.rpartition(".")[2]
    if last in NAMED_PRIMUS:
        width, depth, heads = NAMED_PRIMUS[last]
        sizes = {"embed_dim": width, "eva_depth": depth, "eva_numheads": heads, "patch_embed_size": [8, 8, 8]}
        return PRIMUS, {**sizes, "input_shape": list(patch_vox)}, ()
    if last == "ResEncL":
        return RESIDUAL, dict(RESENC_L), CLASSES
    kind = network_kind(name)
    kwargs = architecture["arch_kwargs"]
    if not kwargs:
        raise ValueError(f"{name} without arch_kwargs has no known size")
    kwargs = {key: _plain(value) for key, value in kwargs.items()}
    if kind == PRIMUS:
        kwargs = {PRIMUS_NAMES[key]: kwargs[key] for key in PRIMUS_NAMES if key in kwargs} | kwargs
        for key in ("embed_dim", "eva_depth", "eva_numheads", "patch_embed_size"):
            if key not in kwargs:
                raise KeyError(key)
        return kind, kwargs, ()
    requires = architecture.get("arch_kwargs_requiring_import") or [key for key in CLASSES if key in kwargs]
    return kind, kwargs, tuple(requires)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
