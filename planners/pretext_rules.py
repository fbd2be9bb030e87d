"""Decisions that pretraining needs beyond nnU-Net's plan; every rule records its reason.

The rules read a finished nnU-Net plan, made from the data or taken from a labelled data set. They add hybrid configurations and
Primus to the convolutional configurations, and nnssl's own section for each of them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import ANISO_THRESHOLD

from nnssl.methods import METHODS
from nnssl.networks.backbone import measurable_network
from nnssl.plan import (
    AnatomyChoices,
    ContextChoices,
    Decision,
    DenseSampling,
    PretextConfiguration,
    TokenGrid,
    TransformerSize,
)
from planners.anatomy_rules import decide_anatomy
from planners.context_rules import decide_context
from planners.dense_rules import decide_dense
from planners.fingerprint import Fingerprint
from planners.network_reasons import explain_data_set, explain_network
from planners.presets import Preset
from planners.primus_rules import decide_primus
from planners.schedule_rules import decide_schedule, decide_teacher
from planners.token_rules import decide_tokens, decide_transformer, hybrid_architecture
from planners.view_rules import decide_crop, decide_flips, decide_intensity, decide_rotation


class PretextRules:
    """Rules that add configurations to a plan and decide nnssl's section of every configuration.

    Args:
        fingerprint: Measurements of the usable cases.
        preset: Memory target.
        nnunet: Content of the plans file, to which configurations are added.
        budgets: Number of feature values that fit into memory, by configuration; a missing number is derived from the plan's
            batch size.
        like: Plans file that this plan was built around; None for a plan from the data.
        spacing_given: Whether the user set the spacing.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        preset: Preset,
        nnunet: dict[str, Any],
        budgets: dict[str, float],
        like: Path | None,
        spacing_given: bool,
    ) -> None:
        self.preset = preset
        self.nnunet = nnunet
        self.channels = len(fingerprint.channel_names)
        self.budgets = budgets
        self.like = like
        self.plans_name = nnunet["plans_name"]
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
        self._record(
            "data set",
            *explain_data_set(
                self.nnunet, self.spacings_mm, self.modalities, self.preset, self.like, self.spacing_given
            ),
        )
        for name in [name for name in ("3d_fullres", "2d") if name in self.nnunet["configurations"]]:
            base = self.nnunet["configurations"][name]
            self._record(name, *explain_network(base, self.preset, self.like))
            features = self._feature_sizes(base["architecture"], base["patch_size"])
            budget = self.budgets.get(name, sum(features) * base["batch_size"])
            views = self._decide_views(name, base)
            views |= {
                "dense": self._decide_dense(name, base),
                "context": self._decide_context(name, base, views),
                "anatomy": self._decide_anatomy(name, base, views),
            }
            hybrid = f"{name}_hybrid"
            # no method reads the tokens of a U-Net for slices
            tokens, reasons = decide_tokens(base["architecture"], base["patch_size"], base["spacing"])
            self._record(name if len(views["patch_size"]) == 3 else hybrid, *reasons)
            self._decide_run(name, views, tokens if len(views["patch_size"]) == 3 else None, None, features, budget)
            if tokens is not None:
                size, reasons = decide_transformer(tokens, self.preset)
                self._record(hybrid, ("views", f"same as {name}", "the patches are the same"), *reasons)
                self._add_hybrid(name, hybrid, base, tokens, size, budget)
                self._decide_run(hybrid, views, tokens, size, features, budget)
            if len(views["patch_size"]) == 3:
                self._add_primus(name, base, views, budget)

    def _record(self, configuration: str, *reasons: tuple[str, str, str]) -> None:
        self.decisions += [Decision(configuration, *each) for each in reasons]

    # nnssl's own configurations

    def _add_hybrid(
        self, name: str, hybrid: str, base: dict[str, Any], tokens: TokenGrid, size: TransformerSize, budget: float
    ) -> None:
        configuration: dict[str, Any] = {
            "inherits_from": name,
            "architecture": hybrid_architecture(base["architecture"], tokens, size),
        }
        network = measurable_network(configuration["architecture"], self.channels)
        cost = network.compute_conv_feature_map_size(tuple(base["patch_size"]))
        configuration["batch_size"] = max(2, min(base["batch_size"], int(budget // cost)))
        self.nnunet["configurations"][hybrid] = configuration
        backbone = configuration["architecture"]["network_class_name"].rsplit(".", 1)[-1]
        fits = f"the U-Net of {name} with a transformer on stage {tokens.stage}; its weights also fit {name}"
        memory = f"at most that of {name}; the transformer's memory is included"
        self._record(hybrid, ("backbone", backbone, fits))
        self._record(hybrid, ("batch size (fine-tuning)", str(configuration["batch_size"]), memory))

    def _add_primus(self, name: str, base: dict[str, Any], views: dict[str, Any], budget: float) -> None:
        primus = f"{name}_primus"
        chosen, decisions = decide_primus(
            base["patch_size"], base["spacing"], self.channels, budget, base["batch_size"], self.preset
        )
        self._record(primus, *decisions)
        if chosen is None:
            return
        self.nnunet["configurations"][primus] = {
            "inherits_from": name,
            "patch_size": list(chosen.patch),
            "batch_size": chosen.batch,
            "architecture": chosen.architecture,
        }
        if chosen.patch == views["patch_size"]:
            self._record(primus, ("views", f"same as {name}", "the patches are the same"))
        else:
            crop, overlap, reasons = decide_crop(chosen.patch)
            self._record(primus, *reasons)
            views = {**views, "patch_size": chosen.patch, "crop_fraction": crop, "crop_overlap": overlap}
        self._decide_run(primus, views, chosen.tokens, chosen.size, (chosen.values, 0.0), budget)

    def _feature_sizes(self, architecture: dict[str, Any], patch: Sequence[int]) -> tuple[float, float]:
        network = measurable_network(architecture, self.channels)
        size = tuple(patch)
        return (
            float(network.encoder.compute_conv_feature_map_size(size)),
            float(network.decoder.compute_conv_feature_map_size(size)),
        )

    # values that pretext methods read

    def _decide_views(self, name: str, base: dict[str, Any]) -> dict[str, Any]:
        """Return the fields on views, which a configuration shares with its hybrid."""
        patch = tuple(int(n) for n in base["patch_size"])
        spacing = tuple(float(mm) for mm in base["spacing"])
        thick = int(np.argmax(spacing)) if len(spacing) == 3 and max(spacing) / min(spacing) > ANISO_THRESHOLD else None
        folder = self._case_folder(spacing)
        crop, overlap, of_crop = decide_crop(patch)
        rotation, of_rotation = decide_rotation(len(patch), thick)
        flips, of_flips = decide_flips(len(patch))
        intensity, of_intensity = decide_intensity(self.is_ct)
        self._record(name, *of_crop, *of_rotation, *of_flips, *of_intensity)
        return {
            "case_folder": folder,
            "patch_size": patch,
            "spacing_mm": spacing,
            "thick_axis": thick,
            "crop_fraction": crop,
            "crop_overlap": overlap,
            "rotation_deg": rotation,
            "flip_axes": flips,
            "intensity_views": intensity,
        }

    def _decide_dense(self, name: str, base: dict[str, Any]) -> DenseSampling:
        features = base["architecture"]["arch_kwargs"]["features_per_stage"]
        sampling, decisions = decide_dense(features, base["patch_size"], self.preset)
        self._record(name, *decisions)
        return sampling

    def _decide_context(self, name: str, base: dict[str, Any], views: dict[str, Any]) -> ContextChoices:
        chosen, decisions = decide_context(
            base["architecture"], views["patch_size"], views["spacing_mm"], views["thick_axis"]
        )
        self._record(name, *decisions)
        return chosen

    def _decide_anatomy(self, name: str, base: dict[str, Any], views: dict[str, Any]) -> AnatomyChoices:
        scan_mm = np.median(self.shapes * self.spacings_mm, axis=0)[-len(views["patch_size"]) :]
        chosen, decisions = decide_anatomy(base["architecture"], views["patch_size"], views["spacing_mm"], scan_mm)
        if len(views["patch_size"]) == 3:  # no method matches places in slices
            self._record(name, *decisions)
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
        stages = list(dict.fromkeys(found))  # several methods may share a stage
        schedules = {}
        for stage in stages:
            schedules[stage.name], reasons = decide_schedule(
                stage, features, budget, tokens, size, patches, self.preset
            )
            self._record(name, *reasons)
        # a teacher runs the encoder on its student's input, without a graph
        taught = [
            schedules[stage.name]
            for stage in stages
            if stage.encoder_graphs and stage.encoder_passes and not stage.reads_tokens
        ]
        queue, momentum, reasons = decide_teacher(patches, taught)
        self._record(name, *reasons)
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

    def _distinct_patches(self, patch: Sequence[int], spacing: Sequence[float]) -> int:
        shapes = self.shapes * self.spacings_mm
        if len(patch) == 2:
            in_plane = shapes[:, 1:] / np.array(spacing)
            per_slice = np.prod(np.ceil(in_plane / np.array(patch) - 1e-6).clip(1), axis=1)
            return int((per_slice * self.shapes[:, 0]).sum())
        return int(np.prod(np.ceil(shapes / np.array(spacing) / np.array(patch) - 1e-6).clip(1), axis=1).sum())
