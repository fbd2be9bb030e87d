"""Plans with tiny networks of every kind, and checkpoints of them whose every tensor differs from its initialisation."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnssl.checkpoint import Provenance, write_checkpoint
from nnssl.files import write_json
from nnssl.networks.backbone import build_network
from tests.trainers.tiny_plan import tiny_plan

PATCH = {2: [16, 24], 3: [8, 24, 16]}
SPACING_MM = {2: [1.5, 1.7], 3: [2.5, 1.5, 1.7]}
UNETS = "dynamic_network_architectures.architectures.unet"


def unet(kind: str, dim: int, **changes: Any) -> dict[str, Any]:
    """The architecture of a U-Net of three stages, the first of which keeps thick slices apart in 3D."""
    residual = "residual" in kind
    kernels = [[3] * dim] * 3 if dim == 2 else [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
    strides = [[1] * dim, [2] * dim, [2] * dim] if dim == 2 else [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    kwargs: dict[str, Any] = {
        "n_stages": 3,
        "features_per_stage": [4, 6, 8],
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": kernels,
        "strides": strides,
        "n_blocks_per_stage" if residual else "n_conv_per_stage": [1, 2, 2] if residual else [2, 2, 2],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    name = f"{UNETS}.{'ResidualEncoderUNet' if residual else 'PlainConvUNet'}"
    if "hybrid" in kind:
        name = f"nnssl.networks.hybrid.Hybrid{'ResidualEncoder' if residual else ''}UNet"
        kwargs |= {"token_stage": 2, "transformer_width": 12, "transformer_depth": 1, "transformer_heads": 2}
    return {
        "network_class_name": name,
        "arch_kwargs": kwargs | changes,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def primus(**changes: Any) -> dict[str, Any]:
    kwargs = {
        "embed_dim": 36,
        "eva_depth": 2,
        "eva_numheads": 3,
        "patch_embed_size": [2, 8, 8],
        "input_shape": PATCH[3],
        "decoder_features": 8,
        "strides": [[1, 1, 1], [2, 8, 8], [1, 1, 1]],
    }
    return {
        "network_class_name": "nnssl.networks.primus.PlannedPrimus",
        "arch_kwargs": kwargs | changes,
        "_kw_requires_import": [],
    }


def architecture(kind: str, dim: int, **changes: Any) -> dict[str, Any]:
    return primus(**changes) if kind == "primus" else unet(kind, dim, **changes)


def plans(
    network: dict[str, Any], dim: int, channels: int, name: str = "nnUNetPlans", **settings: Any
) -> dict[str, Any]:
    """A plans file of one configuration."""
    whole = tiny_plan("Dataset004_Labelled", channels)
    configuration = whole["configurations"]["3d_fullres"]
    configuration |= {"architecture": network, "patch_size": PATCH[dim], "spacing": SPACING_MM[dim]} | settings
    del whole["pretext"]
    return whole | {"plans_name": name, "configurations": {"2d" if dim == 2 else "3d_fullres": configuration}}


def dataset_json(channel_names: list[str], classes: int = 3) -> dict[str, Any]:
    return {
        "channel_names": {str(channel): name for channel, name in enumerate(channel_names)},
        "labels": {"background": 0, **{f"organ{label}": label for label in range(1, classes)}},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }


def write_plans(folder: Path, content: dict[str, Any], channel_names: list[str], classes: int = 3) -> Path:
    """Write a plans file and the dataset.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{content['plans_name']}.json", content)
    write_json(folder / "dataset.json", dataset_json(channel_names, classes))
    return folder / f"{content['plans_name']}.json"


def write_source(
    path: Path,
    network: dict[str, Any],
    dim: int,
    channel_names: list[str],
    pretrained: tuple[str, ...] = (
        "encoder.",
        "decoder.",
        "transformer.",
        "eva.",
        "down_projection.",
        "up_projection.",
    ),
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """Write a checkpoint of pretraining and return its weights."""
    built = build_network(network, len(channel_names), 2, 5)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    provenance = Provenance(
        nnssl_version="0",
        method="pix2rep",
        stage="pix2rep.contrast",
        dataset_name="Dataset501_Source",
        plans_name="nnsslPlans",
        configuration="2d" if dim == 2 else "3d_fullres",
        plans=plans(network, dim, len(channel_names), "nnsslPlans", **settings) | {"dataset_name": "Dataset501_Source"},
        dataset_json=dataset_json(channel_names, 2),
        settings={"temperature": 0.1},
        seed=0,
        step=10,
        total_steps=10,
        finished=True,
        pretrained=pretrained,
        init=None,
        cases=("a", "b"),
    )
    weights = built.state_dict()
    write_checkpoint(path, {"network_weights": weights}, provenance, {})
    return {name: copy.copy(value) for name, value in weights.items()}


def write_trained(
    path: Path, network: dict[str, Any], dim: int, channel_names: list[str], classes: int = 3, **changes: Any
) -> dict[str, torch.Tensor]:
    """Write a checkpoint as nnU-Net's trainer does, NumPy's numbers included, and return its weights."""
    built = build_network(network, len(channel_names), classes, 5)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    arguments = {
        "plans": plans(network, dim, len(channel_names)) | {"dataset_name": "Dataset291_Supervised"},
        "configuration": "2d" if dim == 2 else "3d_fullres",
        "fold": 1,
        "dataset_json": dataset_json(channel_names, classes),
        "device": torch.device("cuda", 0),
    }
    content = {
        "network_weights": built.state_dict(),
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01, "momentum": 0.99, "params": [0]}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5)], "dice_per_class_or_region": [[np.float32(0.25), np.nan]]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 2,
        "init_args": arguments,
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save({key: value for key, value in (content | changes).items() if value is not None}, path)
    return built.state_dict()
