"""What pretraining needs from the data beyond nnU-Net's plan; every rule records its reason.

The rules look at a finished nnU-Net plan (from the data or taken over from a data set with labels) and add a hybrid
configuration beside each convolutional one and nnssl's own section for all of them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import ANISO_THRESHOLD

from nnssl.methods import METHODS, Stage
from nnssl.momentum import momentum_for_run
from nnssl.networks.backbone import build_network, encoder_strides
from planners.anatomy_rules import decide_anatomy
from planners.context_rules import decide_context
from planners.dense_rules import decide_dense
from planners.fingerprint import Fingerprint
from planners.plan import (
    AnatomyChoices,
    ContextChoices,
    Decision,
    DenseSampling,
    PretextConfiguration,
    StageSchedule,
    TokenGrid,
    TransformerSize,
)
from planners.presets import VIT_SIZES, Preset
from planners.primus_rules import decide_primus

TOKENS_WANTED = 196
"""Tokens of RepRec's 14 x 14 grid (224 pixels at stride 16), the length ViT-B/16 was made for."""
TOKENS_MIN, TOKENS_MAX = 64, 2000
"""Fewer tokens leave nothing to relate; more make attention the costliest part of the network."""
FEW_TOKENS = 128
"""Below this many tokens the next smaller transformer is taken."""
NO_GRAD_SHARE = 0.15
"""Memory of a pass without a graph over one that keeps it: two feature maps of one stage live at a time."""
LEAST_CROP_VOX = 4
"""A random crop covers at least this many voxels along every axis."""
STEPS_PER_EPOCH = (25, 250)
"""Fewest and most steps of an epoch; 250 is nnU-Net's."""
HYBRID_CLASSES = {"PlainConvUNet": "HybridUNet", "ResidualEncoderUNet": "HybridResidualEncoderUNet"}


class PretextRules:
    """Adds hybrid configurations to a plan and decides nnssl's section of every configuration.

    Args:
        fingerprint: of the usable cases.
        preset: the memory target.
        nnunet: the plans file; hybrid configurations are added to it.
        channels: of the input.
        budgets: by configuration, feature values that fit into memory; a missing one is taken from the plan's batch size.
        like: the plans file that was taken over, None for a plan from the data.
        plans_name: identifier of the plan.
        spacing_given: whether the user chose the spacing.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        preset: Preset,
        nnunet: dict[str, Any],
        channels: int,
        budgets: dict[str, float],
        like: Path | None,
        plans_name: str,
        spacing_given: bool = False,
    ) -> None:
        self.preset = preset
        self.nnunet = nnunet
        self.channels = channels
        self.budgets = budgets
        self.like = like
        self.plans_name = plans_name
        self.spacing_given = spacing_given
        self.is_ct = "CT" in fingerprint.modalities
        self.modalities = fingerprint.modalities
        forward = list(nnunet["transpose_forward"])
        self.spacings_mm = np.array([case.spacing_mm for case in fingerprint.cases])[:, forward]
        self.shapes = np.array([case.shape_after_crop for case in fingerprint.cases])[:, forward]
        self.configurations: dict[str, PretextConfiguration] = {}
        self.decisions: list[Decision] = []

    def decide(self) -> None:
        """Fill ``configurations`` and ``decisions``."""
        self._explain_data_set()
        for name in [name for name in ("3d_fullres", "2d") if name in self.nnunet["configurations"]]:
            base = self.nnunet["configurations"][name]
            self._explain_network(name, base)
            features = self._feature_sizes(base["architecture"], base["patch_size"])
            budget = self.budgets.get(name, sum(features) * base["batch_size"])
            views = self._decide_views(name, base)
            views |= {
                "dense": self._decide_dense(name, base),
                "context": self._decide_context(name, base, views),
                "anatomy": self._decide_anatomy(name, base, views),
            }
            hybrid = f"{name}_hybrid"
            # nothing looks at the tokens of a U-Net for slices
            tokens = self._decide_tokens(name if len(views["patch_size"]) == 3 else hybrid, base)
            self._decide_run(name, views, tokens if len(views["patch_size"]) == 3 else None, None, features, budget)
            if tokens is not None:
                self._say(hybrid, "views", f"as {name}", "same patches")
                size = self._decide_transformer(hybrid, tokens)
                self._add_hybrid(name, hybrid, base, tokens, size, budget)
                self._decide_run(hybrid, views, tokens, size, features, budget)
            if len(views["patch_size"]) == 3:
                self._add_primus(name, base, views, budget)

    def _say(self, configuration: str, what: str, value: Any, reason: str) -> None:
        self.decisions.append(Decision(configuration, what, str(value), reason))

    # what all configurations share

    def _explain_data_set(self) -> None:
        say = lambda what, value, reason: self._say("data set", what, value, reason)  # noqa: E731
        source = f"taken over from {self.like.parent.name}/{self.like.name}" if self.like else None
        base = self.nnunet["configurations"].get("3d_fullres", self.nnunet["configurations"]["2d"])
        median = np.median(self.spacings_mm, axis=0)
        low, high = self.spacings_mm.min(axis=0), self.spacings_mm.max(axis=0)
        cases = len(self.spacings_mm)
        anisotropy = float(median.max() / median.min())
        if np.allclose(low, high):
            rule = f"the same in all {cases} cases"
        else:
            rule = f"median over {cases} cases, {_mm(low)} to {_mm(high)} mm"
        if not self.like and len(base["spacing"]) == 3 and base["spacing"][0] < 0.99 * median[0]:
            rule += "; 10th percentile along the thick slices, so that thin ones are not thrown away"
        if self.spacing_given:
            rule = f"given with --spacing; {rule}"
        say("spacing", f"{_mm(base['spacing'])} mm", source or rule)
        forward = tuple(self.nnunet["transpose_forward"])
        order = "as stored" if forward == (0, 1, 2) else "axis of the largest spacing first"
        say("axis order", forward, source or order)
        slices = f"{median.max():g} mm against {median.min():g} mm"
        if anisotropy > ANISO_THRESHOLD:
            say("slice axis", "treated apart", f"thick slices: {slices} is more than a factor of {ANISO_THRESHOLD}")
        else:
            say("slice axis", "like the others", f"{slices} is within a factor of {ANISO_THRESHOLD}")
        schemes = base["normalization_schemes"]
        for channel, (modality, scheme) in enumerate(zip(self.modalities, schemes, strict=True)):
            why = {
                "CTNormalization": "clipped to the 0.5 to 99.5 percentile of the body, one mean and deviation for all images",
                "ZScoreNormalization": "in arbitrary units: each image by its own mean and deviation",
            }.get(scheme, "nnU-Net's rule for this channel name")
            say(f"normalisation of channel {channel}", scheme, source or f"{modality}; {why}")
        say(
            "memory target",
            f"{self.preset.memory_gb:g} GB",
            f"encoder {self.preset.encoder}, {self.preset.base_features} features in the first stage",
        )

    def _explain_network(self, name: str, base: dict[str, Any]) -> None:
        source = f"taken over from {self.like.parent.name}/{self.like.name}" if self.like else None
        arch = base["architecture"]["arch_kwargs"]
        median = [round(float(v)) for v in base["median_image_size_in_voxels"]]
        self._say(
            name,
            "patch",
            _times(base["patch_size"]),
            source
            or f"aspect of the median image {_times(median)} at this spacing, as large as the memory target allows",
        )
        strides = " ".join(_times(s) for s in arch["strides"])
        self._say(
            name,
            "strides",
            strides,
            source or "an axis is halved while its spacing is within a factor of 2 of the finest and 4 voxels remain",
        )
        kernels = " ".join(_times(k) for k in arch["kernel_sizes"])
        thin = any(1 in (k if isinstance(k, (list, tuple)) else [k]) for k in arch["kernel_sizes"])
        self._say(
            name,
            "kernels",
            kernels,
            source
            or ("1 along thick slices until the spacings are within a factor of 2" if thin else "spacings are alike"),
        )
        self._say(
            name,
            "backbone",
            base["architecture"]["network_class_name"].rsplit(".", 1)[-1],
            source or f"{self.preset.encoder} encoder for a memory target of {self.preset.memory_gb:g} GB",
        )
        self._say(
            name,
            "batch size (fine-tuning)",
            base["batch_size"],
            source or "nnU-Net's rule: memory target, and at most 5 % of the data set's voxels in a step"
            if self.preset.encoder == "plain"
            else "nnU-Net's rule: memory target",
        )

    # transformer

    def _decide_tokens(self, name: str, base: dict[str, Any]) -> TokenGrid | None:
        patch = base["patch_size"]
        strides = np.cumprod(np.array(encoder_strides(base["architecture"])), axis=0)
        grids = [[math.ceil(n / s) for n, s in zip(patch, stride, strict=True)] for stride in strides]
        counts = [math.prod(grid) for grid in grids]
        fitting = [stage for stage, count in enumerate(counts) if TOKENS_MIN <= count <= TOKENS_MAX and stage > 0]
        if not fitting:
            self._say(
                name,
                "left out",
                "-",
                f"no stage of the encoder has {TOKENS_MIN} to {TOKENS_MAX} positions "
                f"(it has {', '.join(map(str, counts))})",
            )
            return None
        stage = min(fitting, key=lambda s: abs(math.log(counts[s] / TOKENS_WANTED)))
        size_mm = [s * float(mm) for s, mm in zip(strides[stage], base["spacing"], strict=True)]
        block_mm = 2 * float(np.median(size_mm))
        block = [max(1, min(round(block_mm / mm), n // 2)) for mm, n in zip(size_mm, grids[stage], strict=True)]
        self._say(
            name,
            "tokens",
            f"{_times(grids[stage])} = {counts[stage]} at stage {stage}",
            f"of {', '.join(map(str, counts))} positions the nearest to RepRec's {TOKENS_WANTED}",
        )
        self._say(
            name,
            "token size",
            f"{_times(strides[stage])} voxels, {_mm(size_mm)} mm",
            "one position of that feature map",
        )
        block_size_mm = [n * mm for n, mm in zip(block, size_mm, strict=True)]
        self._say(
            name,
            "mask block",
            f"{_times(block)} tokens, {_mm(block_size_mm)} mm",
            f"near {block_mm:.0f} mm, at most half of the grid: neighbours of a single masked token have seen most of it",
        )
        return TokenGrid(
            stage=stage,
            grid=tuple(grids[stage]),
            size_vox=tuple(int(s) for s in strides[stage]),
            size_mm=tuple(round(mm, 6) for mm in size_mm),
            width=base["architecture"]["arch_kwargs"]["features_per_stage"][stage],
            mask_block=tuple(block),
        )

    def _decide_transformer(self, name: str, tokens: TokenGrid) -> TransformerSize:
        size = self.preset.transformer
        count = math.prod(tokens.grid)
        reason = f"memory target of {self.preset.memory_gb:g} GB"
        index = VIT_SIZES.index(size)
        if count < FEW_TOKENS and index > 0:
            size = VIT_SIZES[index - 1]
            reason += f", one size smaller for {count} tokens"
        if size == VIT_SIZES[-1]:
            reason += "; ViT-Base as in the paper"
        self._say(
            name,
            "transformer",
            f"{size.depth} blocks, width {size.width}, {size.heads} heads; decoder {size.decoder_depth} blocks",
            reason,
        )
        return size

    def _add_hybrid(
        self, name: str, hybrid: str, base: dict[str, Any], tokens: TokenGrid, size: TransformerSize, budget: float
    ) -> None:
        architecture = base["architecture"]
        stock = architecture["network_class_name"].rsplit(".", 1)[-1]
        arch_kwargs = {
            **architecture["arch_kwargs"],
            "token_stage": tokens.stage,
            "transformer_width": size.width,
            "transformer_depth": size.depth,
            "transformer_heads": size.heads,
        }
        configuration: dict[str, Any] = {
            "inherits_from": name,
            "architecture": {
                "network_class_name": f"nnssl.networks.hybrid.{HYBRID_CLASSES[stock]}",
                "arch_kwargs": arch_kwargs,
                "_kw_requires_import": architecture["_kw_requires_import"],
            },
        }
        network = build_network(configuration["architecture"], self.channels, 2, seed=0)
        cost = network.compute_conv_feature_map_size(tuple(base["patch_size"]))
        configuration["batch_size"] = max(2, min(base["batch_size"], int(budget // cost)))
        self.nnunet["configurations"][hybrid] = configuration
        self._say(
            hybrid,
            "backbone",
            HYBRID_CLASSES[stock],
            f"the U-Net of {name} with a transformer on stage {tokens.stage}: its weights fit {name} too",
        )
        self._say(
            hybrid,
            "batch size (fine-tuning)",
            configuration["batch_size"],
            f"that of {name} with the transformer's memory",
        )

    def _add_primus(self, name: str, base: dict[str, Any], views: dict[str, Any], budget: float) -> None:
        primus = f"{name}_primus"
        chosen, decisions = decide_primus(
            base["patch_size"], base["spacing"], self.channels, budget, base["batch_size"], self.preset
        )
        for decision in decisions:
            self._say(primus, *decision)
        if chosen is None:
            return
        self.nnunet["configurations"][primus] = {
            "inherits_from": name,
            "patch_size": list(chosen.patch),
            "batch_size": chosen.batch,
            "architecture": chosen.architecture,
        }
        if chosen.patch == views["patch_size"]:
            self._say(primus, "views", f"as {name}", "same patches")
        else:
            crop, overlap = self._decide_crop(primus, chosen.patch)
            views = {**views, "patch_size": chosen.patch, "crop_fraction": crop, "crop_overlap": overlap}
        self._decide_run(primus, views, chosen.tokens, chosen.size, (chosen.values, 0.0), budget)

    def _feature_sizes(self, architecture: dict[str, Any], patch: Sequence[int]) -> tuple[float, float]:
        network = build_network(architecture, self.channels, 2, seed=0)
        size = tuple(patch)
        return (
            float(network.encoder.compute_conv_feature_map_size(size)),
            float(network.decoder.compute_conv_feature_map_size(size)),
        )

    # what pretext methods read

    def _decide_views(self, name: str, base: dict[str, Any]) -> dict[str, Any]:
        """Return what the views of a configuration take from the data, for itself and its hybrid."""
        patch = tuple(int(n) for n in base["patch_size"])
        spacing = tuple(float(mm) for mm in base["spacing"])
        thick = int(np.argmax(spacing)) if len(spacing) == 3 and max(spacing) / min(spacing) > ANISO_THRESHOLD else None
        crop, overlap = self._decide_crop(name, patch)
        return {
            "case_folder": self._case_folder(spacing),
            "patch_size": patch,
            "spacing_mm": spacing,
            "thick_axis": thick,
            "crop_fraction": crop,
            "crop_overlap": overlap,
            "rotation_deg": self._decide_rotation(name, len(patch), thick),
            "flip_axes": self._decide_flips(name, len(patch)),
            "intensity_views": self._decide_intensity(name),
        }

    def _decide_dense(self, name: str, base: dict[str, Any]) -> DenseSampling:
        features = base["architecture"]["arch_kwargs"]["features_per_stage"]
        sampling, decisions = decide_dense(features, base["patch_size"], self.preset)
        for decision in decisions:
            self._say(name, *decision)
        return sampling

    def _decide_context(self, name: str, base: dict[str, Any], views: dict[str, Any]) -> ContextChoices:
        chosen, decisions = decide_context(
            base["architecture"], views["patch_size"], views["spacing_mm"], views["thick_axis"]
        )
        for decision in decisions:
            self._say(name, *decision)
        return chosen

    def _decide_anatomy(self, name: str, base: dict[str, Any], views: dict[str, Any]) -> AnatomyChoices:
        scan_mm = np.median(self.shapes * self.spacings_mm, axis=0)[-len(views["patch_size"]) :]
        chosen, decisions = decide_anatomy(base["architecture"], views["patch_size"], views["spacing_mm"], scan_mm)
        for decision in decisions if len(views["patch_size"]) == 3 else ():  # no method looks for places in slices
            self._say(name, *decision)
        return chosen

    def _decide_run(
        self,
        name: str,
        views: dict[str, Any],
        tokens: TokenGrid | None,
        size: TransformerSize | None,
        features: tuple[float, float],
        budget: float,
    ) -> None:
        patches = self._distinct_patches(views["patch_size"], views["spacing_mm"])
        found = (
            stage
            for method in METHODS.values()
            if name in method.configurations
            for stage in method.stages
            if stage.runs_in(name) == name and not (stage.reads_tokens and tokens is None)
        )
        stages = list(dict.fromkeys(found))  # a stage may serve several methods
        schedules = {
            stage.name: self._decide_schedule(name, stage, features, budget, tokens, size, patches) for stage in stages
        }
        # a teacher sees what its student sees, without a graph
        taught = [
            schedules[stage.name]
            for stage in stages
            if stage.encoder_graphs and stage.encoder_passes and not stage.reads_tokens
        ]
        queue, momentum = self._decide_teacher(name, patches, taught)
        self.configurations[name] = PretextConfiguration(
            **views,
            tokens=tokens,
            transformer=size,
            queue_length=queue,
            teacher_momentum=momentum,
            schedules=schedules,
        )

    def _case_folder(self, spacing: Sequence[float]) -> str:
        if len(spacing) == 3:
            return f"{self.plans_name}_cases_3d"
        full = self.nnunet["configurations"].get("3d_fullres")
        slices = self.spacings_mm[:, 0]
        if (
            full is not None
            and np.allclose(slices, full["spacing"][0], rtol=1e-3)
            and full["spacing"][1:] == list(spacing)
        ):
            return f"{self.plans_name}_cases_3d"
        return f"{self.plans_name}_cases_2d"

    def _decide_crop(self, name: str, patch: Sequence[int]) -> tuple[tuple[float, float], float]:
        least_zoom = max(0.2 ** (1 / len(patch)), min(1.0, LEAST_CROP_VOX / min(patch)))
        low = round(least_zoom ** len(patch), 4)
        overlap = _mean_overlap(low, len(patch))
        reason = "RepRec's 0.2 to 1.0" if low <= 0.2 else f"at least {LEAST_CROP_VOX} voxels along the shortest axis"
        self._say(
            name,
            "crop",
            f"{low:g} to 1 of the patch",
            f"{reason}; two crops share {overlap:.0%} of the smaller on average",
        )
        return (low, 1.0), overlap

    def _decide_rotation(self, name: str, dimensions: int, thick: int | None) -> tuple[float, ...]:
        if dimensions == 2:
            self._say(
                name,
                "rotation",
                "up to 180 deg in the plane",
                "single slices: turning them moves no voxel out of the slice",
            )
            return (180.0,)
        if thick is not None:
            self._say(
                name,
                "rotation",
                f"up to 180 deg about axis {thick} only",
                "thick slices: any other rotation would mix voxels of different slices",
            )
            return tuple(180.0 if axis == thick else 0.0 for axis in range(3))
        self._say(name, "rotation", "up to 30 deg about every axis", "spacing alike along all axes")
        return (30.0, 30.0, 30.0)

    def _decide_flips(self, name: str, dimensions: int) -> tuple[int, ...]:
        axes = tuple(range(dimensions - 2, dimensions))
        self._say(
            name,
            "flips",
            f"axes {axes}",
            "in the fine plane: RepRec's horizontal flip, and its like along the other axis",
        )
        return axes

    def _decide_intensity(self, name: str) -> tuple[str, ...]:
        views: tuple[str, ...]
        if self.is_ct:
            views = ("contrast", "brightness", "noise", "blur", "window")
            reason = "CT: Hounsfield numbers mean tissue, so the window moves and contrast is never inverted"
        else:
            views = ("contrast", "brightness", "noise", "blur", "gamma", "bias_field", "inversion")
            reason = "MR: units, coil sensitivity and contrast are the scanner's, so all may change"
        self._say(name, "intensity views", ", ".join(views), reason)
        return views

    def _distinct_patches(self, patch: Sequence[int], spacing: Sequence[float]) -> int:
        shapes = self.shapes * self.spacings_mm
        if len(patch) == 2:
            in_plane = shapes[:, 1:] / np.array(spacing)
            per_slice = np.prod(np.ceil(in_plane / np.array(patch) - 1e-6).clip(1), axis=1)
            return int((per_slice * self.shapes[:, 0]).sum())
        return int(np.prod(np.ceil(shapes / np.array(spacing) / np.array(patch) - 1e-6).clip(1), axis=1).sum())

    def _decide_schedule(
        self,
        name: str,
        stage: Stage,
        features: tuple[float, float],
        budget: float,
        tokens: TokenGrid | None,
        size: TransformerSize | None,
        patches: int,
    ) -> StageSchedule:
        encoder, decoder = features
        graphs = stage.encoder_graphs
        masked = stage.reads_tokens and tokens is not None and size is not None
        cost = (NO_GRAD_SHARE * stage.encoder_passes + (0 if masked else graphs)) * encoder
        cost += stage.decoder_graphs * decoder
        if masked:
            assert tokens is not None
            assert size is not None
            # the token decoder sees all tokens, the encoder at most a quarter of them
            blocks = size.depth / 4 + size.decoder_depth
            cost += math.prod(tokens.grid) * 9 * size.width * blocks
        if tokens is not None:
            cost += math.prod(tokens.grid) * stage.token_values
        fits = int(budget // cost)
        most = max(2, min(fits, self.preset.largest_batch, patches // 2))
        batch = most // stage.batch_multiple * stage.batch_multiple
        limit = {
            fits: "memory target",
            self.preset.largest_batch: "largest useful batch",
            patches // 2: "half of the distinct patches",
        }
        reason = f"{fits} fit, {patches} distinct patches: limited by the {limit.get(most, 'least batch')}"
        if batch < most:
            reason += f", a multiple of {stage.batch_multiple}"
        if fits < batch:
            reason += "; WARNING: more than the memory target allows, take a larger one or a smaller patch"
        if batch < stage.useful_batch:
            reason += (
                f"; WARNING: contrast is weak below {stage.useful_batch}, take a larger memory target or more data"
            )
        self._say(name, f"batch size ({stage.name})", batch, reason)
        defaults = stage.load().defaults.training
        iterations = min(max(math.ceil(patches / batch), STEPS_PER_EPOCH[0]), STEPS_PER_EPOCH[1])
        epochs = max(1, round(defaults.epochs * self.preset.epochs_share))
        warmup = round(defaults.warmup_epochs * self.preset.epochs_share)
        self._say(
            name,
            f"length ({stage.name})",
            f"{epochs} epochs of {iterations} steps, {warmup} to warm up",
            f"one pass over {patches} distinct patches is an epoch (25 to 250 steps); {self.preset.epochs_share:.0%} of "
            f"the paper's {defaults.epochs} epochs",
        )
        return StageSchedule(batch_size=batch, epochs=epochs, iterations_per_epoch=iterations, warmup_epochs=warmup)

    def _decide_teacher(self, name: str, patches: int, taught: Sequence[StageSchedule]) -> tuple[int, float]:
        batch = max((schedule.batch_size for schedule in taught), default=2)
        queue = min(max(2 ** int(math.log2(max(2, patches / 4))), 64, 2 * batch), 4096)
        steps = min((schedule.epochs * schedule.iterations_per_epoch for schedule in taught), default=None)
        momentum = 0.999 if steps is None else momentum_for_run(0.999, steps)
        if steps is not None:
            self._say(
                name,
                "queue",
                queue,
                f"a quarter of {patches} distinct patches, 64 to 4096, at least two batches (for negatives=queue)",
            )
            self._say(
                name,
                "teacher momentum",
                f"{momentum:.4f}",
                f"averages over at most a twentieth of {steps} steps; MoCo's 0.999 in a long run",
            )
        return queue, momentum


def _mean_overlap(low: float, dimensions: int, draws: int = 4096) -> float:
    """Mean share of the smaller of two random crops that both have in common; a seeded estimate."""
    rng = np.random.default_rng(0)
    zoom = rng.uniform(low, 1.0, size=(2, draws)) ** (1 / dimensions)
    start = rng.uniform(size=(2, draws, dimensions)) * (1 - zoom[..., None])
    end = start + zoom[..., None]
    common = (end.min(axis=0) - start.max(axis=0)).clip(0).prod(axis=1)
    return round(float((common / zoom.min(axis=0) ** dimensions).mean()), 3)


def _times(values: Sequence[int] | int) -> str:
    return "x".join(str(int(v)) for v in values) if isinstance(values, (list, tuple, np.ndarray)) else str(values)


def _mm(values: Sequence[float]) -> str:
    return " x ".join(f"{float(v):.4g}" for v in values)
