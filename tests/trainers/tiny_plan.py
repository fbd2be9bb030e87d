"""A plan and weights small enough to train within a second, written by hand."""

from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnssl.checkpoint import Provenance, write_checkpoint

SPACING_MM = (2.5, 1.5, 1.7)
PATCH_SIZE = (8, 16, 12)


def tiny_plan(dataset_name: str = "Dataset501_Source", channels: int = 1) -> dict[str, Any]:
    """A plan with ``3d_fullres`` and ``3d_fullres_wide``, which is the same with more features."""
    return {
        "dataset_name": dataset_name,
        "plans_name": "nnsslPlans",
        "original_median_spacing_after_transp": list(SPACING_MM),
        "original_median_shape_after_transp": [24, 32, 28],
        "image_reader_writer": "NibabelIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnsslPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(PATCH_SIZE),
                "median_image_size_in_voxels": [24.0, 32.0, 28.0],
                "spacing": list(SPACING_MM),
                "normalization_schemes": ["ZScoreNormalization"] * channels,
                "use_mask_for_norm": [False] * channels,
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": _resampling(False, 3),
                "resampling_fn_seg_kwargs": _resampling(True, 1),
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": _resampling(False, 1),
                "batch_dice": False,
                "architecture": _architecture([4, 6, 8]),
            },
            "3d_fullres_wide": {"inherits_from": "3d_fullres", "architecture": _architecture([4, 6, 10])},
        },
        "experiment_planner_used": "PretrainPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(channel): {
                "max": 900.0, "mean": 300.0, "median": 290.0, "min": 0.0,
                "percentile_00_5": 10.0, "percentile_99_5": 800.0, "std": 120.0,
            }
            for channel in range(channels)
        },
        "pretext": {"schema_version": 2, "num_cases": 99},
    }  # fmt: skip


def write_weights(
    path: Path, plan: dict[str, Any], classes: int = 2, seed: int = 7, settings: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Write a checkpoint of pretraining with random weights for ``3d_fullres`` and return its ``network_weights``."""
    architecture = plan["configurations"]["3d_fullres"]["architecture"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            len(plan["configurations"]["3d_fullres"]["normalization_schemes"]),
            classes,
            deep_supervision=True,
        )
        with torch.no_grad():
            for parameter in network.parameters():  # biases and norms too, so that no tensor equals an initialisation
                parameter.add_(0.05 * torch.randn(parameter.shape))
    provenance = Provenance(
        nnssl_version="0",
        method="rep_rec",
        stage="generative",
        dataset_name=plan["dataset_name"],
        plans_name=plan["plans_name"],
        configuration="3d_fullres",
        plans=plan,
        dataset_json={"channel_names": {"0": "MRI"}},
        settings=settings or {},
        seed=seed,
        step=10,
        total_steps=10,
        finished=True,
        pretrained=("encoder",),
        init=None,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, {"network_weights": network.state_dict()}, provenance, state={})
    return network.state_dict()


def _resampling(is_seg: bool, order: int) -> dict[str, Any]:
    return {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}


def _architecture(features: list[int]) -> dict[str, Any]:
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": features,
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
            "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
