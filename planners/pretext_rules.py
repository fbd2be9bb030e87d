"""Decisions that pretraining needs beyond nnU-Net's plan; every rule records its reason.

The rules read a finished nnU-Net plan, made from the data or taken from a labelled data set. They add hybrid configurations and
Primus to the convolutional configurations, and nnssl's own section for each of them.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import ANISO_THRESHOLD

from nnssl.methods import METHODS, Stage
from nnssl.networks.backbone import measurable_network
from nnssl.plan import Decision, PretextConfiguration, TransformerSize
from planners.fingerprint import Fingerprint
from planners.modality_rules import name_modality
from planners.network_reasons import explain_data_set, explain_network
from planners.presets import Preset
from planners.primus_rules import decide_primus
from planners.stage_rules import Frame, StageRules
from planners.step_rules import NetworkCost, measure_network
from planners.token_rules import decide_tokens, decide_transformer, hybrid_architecture
from planners.view_rules import decide_flips, decide_intensity, decide_rotation


class PretextRules:
    """Rules that add configurations to a plan and decide nnssl's section of every configuration.

    Args:
        fingerprint: Measurements of the usable cases.
        preset: Memory target.
        nnunet: Content of the plans file, to which configurations are added.
        budgets: Number of feature values that fit into memory in fine-tuning, by configuration; a missing number is derived from
            the plan's batch size.
        like: Plans file that this plan was built around; None for a plan from the data.
        spacing_reasons: Reason for every spacing that was not chosen from the data, by configuration.
        length: Length of the pretext stages, a key of ``planners.presets.LENGTHS``.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        preset: Preset,
        nnunet: dict[str, Any],
        budgets: dict[str, float],
        like: Path | None,
        spacing_reasons: dict[str, str],
        length: str,
    ) -> None:
        self.preset = preset
        self.nnunet = nnunet
        self.channels = len(fingerprint.channel_names)
        self.budgets = budgets
        self.like = like
        self.plans_name = nnunet["plans_name"]
        self.spacing_reasons = spacing_reasons
        self.length = length
        self.single_slices = all(case.shape[0] == 1 for case in fingerprint.cases)
        # a fingerprint that was stored by an older version has the names of X-ray channels
        self.modalities = tuple(name_modality(each, self.single_slices) for each in fingerprint.modalities)
        forward = list(nnunet["transpose_forward"])
        self.spacings_mm = np.array([case.spacing_mm for case in fingerprint.cases])[:, forward]
        self.shapes = np.array([case.shape_after_crop for case in fingerprint.cases])[:, forward]
        self.configurations: dict[str, PretextConfiguration] = {}
        self.decisions: list[Decision] = []
        self.slow: list[str] = []
        """Configurations with a stage of which not even the least step is computed in time."""

    def decide(self) -> None:
        """Fill ``configurations``, ``decisions`` and ``slow``."""
        self._record(
            "data set",
            *explain_data_set(
                self.nnunet,
                self.spacings_mm,
                self.modalities,
                self.preset,
                self.like,
                self.spacing_reasons,
                self.single_slices,
            ),
        )
        for name in [name for name in ("3d_fullres", "2d") if name in self.nnunet["configurations"]]:
            base = self.nnunet["configurations"][name]
            self._record(name, *explain_network(base, self.preset, self.like, self.spacing_reasons.get(name)))
            cost = measure_network(base["architecture"], tuple(base["patch_size"]), self.channels)
            voxels = float(np.prod(base["patch_size"]))
            used = (cost.encoder_values + cost.decoder_values) * voxels * base["batch_size"]
            budget = self.budgets.get(name, used)
            shared = self._decide_views(name, base)
            frame = Frame(base["architecture"], tuple(base["patch_size"]), tuple(base["spacing"]), cost)
            self._decide_stages(name, frame, shared, None)
            self._add_hybrid(name, frame, shared, budget)
            if len(frame.spacing_mm) == 3:
                self._add_primus(name, frame, shared, budget)

    def _record(self, configuration: str, *reasons: tuple[str, str, str]) -> None:
        self.decisions += [Decision(configuration, *each) for each in reasons]

    # nnssl's own configurations

    def _add_hybrid(self, name: str, base: Frame, shared: dict[str, Any], budget: float) -> None:
        hybrid = f"{name}_hybrid"
        rules = self._stage_rules(hybrid, base, shared, None)
        patch = rules.smallest_patch([stage for stage in self._stages(hybrid) if stage.reads_tokens])
        tokens, reasons = decide_tokens(base.unet, patch, base.spacing_mm, largest=base.largest)
        if tokens is None:
            self._record(hybrid, *reasons)
            return
        size, reasons = decide_transformer(tokens, self.preset)
        self._record(hybrid, ("views", f"same as {name}", "the images are the same"), *reasons)
        architecture = hybrid_architecture(base.unet, tokens, size)
        network = measurable_network(architecture, self.channels)
        cost = network.compute_conv_feature_map_size(base.largest)
        batch = max(2, min(self.nnunet["configurations"][name]["batch_size"], int(budget // cost)))
        self.nnunet["configurations"][hybrid] = {
            "inherits_from": name,
            "architecture": architecture,
            "batch_size": batch,
        }
        backbone = architecture["network_class_name"].rsplit(".", 1)[-1]
        fits = f"the U-Net of {name} with a transformer on stage {tokens.stage}; its weights also fit {name}"
        memory = f"at most that of {name}; the transformer's memory is included"
        self._record(hybrid, ("backbone", backbone, fits), ("batch size (fine-tuning)", str(batch), memory))
        parameters = sum(parameter.numel() for parameter in network.parameters())
        frame = replace(base, tokens=tokens, cost=replace(base.cost, parameters=parameters))
        self._decide_stages(hybrid, frame, shared, size)

    def _add_primus(self, name: str, base: Frame, shared: dict[str, Any], budget: float) -> None:
        primus = f"{name}_primus"
        largest_batch = self.nnunet["configurations"][name]["batch_size"]
        chosen, decisions = decide_primus(
            base.largest, base.spacing_mm, self.channels, budget, largest_batch, self.preset
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
        self._record(primus, ("views", f"same as {name}", "the images are the same"))
        voxels = float(np.prod(chosen.patch))
        cost = NetworkCost(
            encoder_values=chosen.values / voxels,
            decoder_values=0.0,
            encoder_multiply_adds=chosen.multiply_adds / voxels,
            decoder_multiply_adds=0.0,
            widest=0,
            parameters=chosen.parameters,
            channels=self.channels,
        )
        frame = Frame(base.unet, chosen.patch, base.spacing_mm, cost, chosen.tokens)
        self._decide_stages(primus, frame, shared, chosen.size)

    # values that pretext methods read

    def _decide_views(self, name: str, base: dict[str, Any]) -> dict[str, Any]:
        """Return the settings on views that depend on the data only, which a configuration shares with its hybrid."""
        spacing = tuple(float(mm) for mm in base["spacing"])
        thick = int(np.argmax(spacing)) if len(spacing) == 3 and max(spacing) / min(spacing) > ANISO_THRESHOLD else None
        rotation, of_rotation = decide_rotation(len(spacing), thick)
        flips, of_flips = decide_flips(len(spacing))
        intensity, of_intensity = decide_intensity(self.modalities)
        self._record(name, *of_rotation, *of_flips, *of_intensity)
        return {
            "case_folder": self._case_folder(spacing),
            "spacing_mm": spacing,
            "thick_axis": thick,
            "rotation_deg": rotation,
            "flip_axes": flips,
            "intensity_views": intensity,
        }

    def _stages(self, name: str) -> list[Stage]:
        """Return the stages that run in a configuration; several methods may share one."""
        found = (
            stage
            for method in METHODS.values()
            if name in method.configurations
            for stage in method.stages
            if stage.runs_in(name) == name
        )
        return list(dict.fromkeys(found))

    def _stage_rules(self, name: str, frame: Frame, shared: dict[str, Any], size: TransformerSize | None) -> StageRules:
        return StageRules(name, frame, shared, size, self.preset, self.shapes, self.spacings_mm, self.length)

    def _decide_stages(self, name: str, frame: Frame, shared: dict[str, Any], size: TransformerSize | None) -> None:
        rules = self._stage_rules(name, frame, shared, size)
        plans = {}
        for stage in self._stages(name):
            plan, reasons = rules.decide(stage)
            self._record(name, *reasons)
            if plan is not None:
                plans[stage.name] = plan
        slow = name.removesuffix("_hybrid").removesuffix("_primus")
        if rules.slow_stages and slow not in self.slow:
            self.slow.append(slow)
        self.configurations[name] = PretextConfiguration(
            **shared,
            transformer=size,
            patch_size=frame.largest,
            has_feature_maps=frame.tokens is None or frame.tokens.stage is not None,
            stages=plans,
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
