"""The adaptation plan: how nnU-Net's own loader of pretrained weights, and model hubs, describe a checkpoint.

Source: nnU-Net's main branch (``nnUNetv2_preprocess_like_nnssl``, ``nnUNetv2_train_pretrained``) and the checkpoints of
OpenMind (Wald et al., An OpenMind for 3D medical vision self-supervised learning, 2024), whose files are read here too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl.errors import UserError

KEY = "nnssl_adaptation_plan"

NETWORKS = "dynamic_network_architectures.architectures"
PLAIN = f"{NETWORKS}.unet.PlainConvUNet"
RESIDUAL = f"{NETWORKS}.unet.ResidualEncoderUNet"
PRIMUS = f"{NETWORKS}.primus.Primus"

NAMED_PRIMUS = {"PrimusS": (396, 12, 6), "PrimusB": (792, 12, 12), "PrimusM": (864, 16, 12), "PrimusL": (1056, 24, 16)}
"""Width, depth and heads by the names that nnU-Net knows; tokens of 8 x 8 x 8 voxels. Source: Primus, table 1."""

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
"""What the name ResEncL stands for."""

CLASSES = ("conv_op", "norm_op", "dropout_op", "nonlin")
"""Arguments of a U-Net that are classes, written as strings."""

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
"""Where the parts of a network are."""


@dataclass(frozen=True)
class AdaptationPlan:
    """What a checkpoint made elsewhere says of itself.

    Attributes:
        network_class: dotted name of the network's class.
        arch_kwargs: its arguments.
        requires_import: which of them are classes, written as strings.
        patch_vox: of pretraining.
        spacing_mm: of pretraining; None where the file does not say.
        recommended_patch_vox: for fine-tuning; None where the file does not say.
        pretrain_num_input_channels: of the images.
        key_to_encoder: prefix of the encoder's tensors.
        key_to_stem: prefix of those before it.
        key_to_lpe: name of the learned positions; None without.
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
        """Return the network as a configuration of a plan names it."""
        return {
            "network_class_name": self.network_class,
            "arch_kwargs": self.arch_kwargs,
            "_kw_requires_import": list(self.requires_import),
        }


def network_kind(class_name: str) -> str:
    """Return which of nnU-Net's networks a class is or extends: ``PLAIN``, ``RESIDUAL`` or ``PRIMUS``.

    Raises:
        ValueError: none of them.
    """
    last = class_name.rpartition(".")[2]
    if "Primus" in last:
        return PRIMUS
    if last == "ResEncL" or last.endswith("ResidualEncoderUNet"):
        return RESIDUAL
    if last.endswith(("PlainConvUNet", "HybridUNet")):
        return PLAIN
    raise ValueError(f"{class_name} is no PlainConvUNet, ResidualEncoderUNet or Primus")


def write_adaptation_plan(
    architecture: Mapping[str, Any],
    configuration: str,
    patch_vox: Sequence[int],
    spacing_mm: Sequence[float],
    channels: int,
) -> tuple[dict[str, Any], str]:
    """Return the adaptation plan of a network, in types that a safe load lets through, and a remark.

    A network with a transformer at its bottleneck is described as the U-Net around it, whose names it keeps. Primus has a
    name among nnU-Net's only in four sizes; another size is described by its arguments, which nnssl reads and nnU-Net does
    not.

    Args:
        architecture: of the network, as a configuration of a plan names it.
        configuration: its name.
        patch_vox: of the patches.
        spacing_mm: of pretraining.
        channels: of the network's input.

    Returns:
        The plan, and what a reader has to know; empty where all is said.

    Raises:
        ValueError: the network is none that the format knows.
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
            remark = "nnU-Net knows Primus in its four sizes only; this one is described by its arguments, for nnssl"
    else:
        own = [key for key in kwargs if key.startswith("transformer_") or key == "token_stage"]
        if own:
            written = {key: value for key, value in (written or {}).items() if key not in own}
            remark = "the transformer of the hybrid network is left out, as nnU-Net's adaptation plan knows U-Nets without one"
    patch = [int(n) for n in patch_vox]
    plan = {
        "architecture_plans": {
            "arch_class_name": name,
            "arch_kwargs": written,
            "arch_kwargs_requiring_import": requires,
        },
        "pretrain_plan": {
            "configurations": {configuration: {"patch_size": patch, "spacing": [float(mm) for mm in spacing_mm]}}
        },
        "pretrain_num_input_channels": int(channels),
        "recommended_downstream_patchsize": patch,
        "pretrain_patch_size": patch,
        "architecture_kwargs": written,
        **KEYS[kind],
    }
    return plan, remark


def read_adaptation_plan(path: Path, content: Mapping[str, Any]) -> AdaptationPlan:
    """Read the adaptation plan of a checkpoint that was made elsewhere.

    Only what is needed is asked for: such files are written by several programs, which add keys of their own.

    Args:
        path: for error messages.
        content: of the checkpoint, loaded safely.

    Raises:
        UserError: a key is missing, or the network is none that can be built here.
    """
    plan = content[KEY]
    if not isinstance(content.get("network_weights"), Mapping):
        raise UserError(
            f"{path}: has no network_weights beside its {KEY}; take the whole checkpoint from where it came"
        )
    try:
        architecture = plan["architecture_plans"]
        name = architecture["arch_class_name"]
        first = next(iter(plan["pretrain_plan"]["configurations"].values()))
        # what was pretrained may be cut smaller than the plan says, and then this key says so
        patch = tuple(int(n) for n in plan.get("pretrain_patch_size") or first["patch_size"])
        spacing = first.get("spacing")
        recommended = plan.get("recommended_downstream_patchsize")
        network, kwargs, requires = _network(name, architecture, patch)
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
        raise UserError(f"{path}: its {KEY} has no {error}; it cannot be used without") from error
    except (TypeError, ValueError, AttributeError, StopIteration) as error:
        raise UserError(f"{path}: its {KEY} cannot be read ({error}); ask where the file came from") from error


def _network(
    name: str, architecture: Mapping[str, Any], patch_vox: tuple[int, ...]
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Return class, arguments and which of them are classes, of a network by its name."""
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
        raise ValueError(f"{name} without arch_kwargs says nothing of its size")
    kwargs = {key: _plain(value) for key, value in kwargs.items()}
    if kind == PRIMUS:
        for key in ("embed_dim", "eva_depth", "eva_numheads", "patch_embed_size"):
            if key not in kwargs:
                raise KeyError(key)
        return kind, kwargs, ()
    requires = architecture.get("arch_kwargs_requiring_import") or [key for key in CLASSES if key in kwargs]
    return kind, kwargs, tuple(requires)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
