"""Planner rules for one pretext stage: its step, what depends on its patch, and its length."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nnssl.methods import Stage
from nnssl.networks.backbone import encoder_strides
from nnssl.plan import PatchChoices, Reasons, StageConfiguration, StagePlan, StageSchedule, TokenGrid, TransformerSize
from planners.anatomy_rules import decide_anatomy
from planners.context_rules import decide_context
from planners.dense_rules import bytes_of_points, decide_dense
from planners.patch_rules import (
    TIME,
    USEFUL,
    ChosenStep,
    Step,
    chain_of_steps,
    choose_step,
    explain_step,
    patches_of_scan,
    plane_of_equal_sides,
)
from planners.presets import Preset
from planners.schedule_rules import decide_length, decide_teacher
from planners.step_rules import NetworkCost, cost_of_step
from planners.token_rules import FINE_TUNING_MAX, TOKENS_MIN, decide_tokens
from planners.view_rules import decide_crop


@dataclass(frozen=True)
class Frame:
    """The network of a configuration and the patches that it accepts.

    Attributes:
        unet: Architecture of the U-Net, also for a hybrid and for Primus, whose settings are derived from it.
        largest: Patch of fine-tuning in voxels.
        spacing_mm: Spacing of the patch in mm.
        cost: Cost of a pass through the network.
        tokens: Tokens of the largest patch, if the network has a transformer.
    """

    unet: dict[str, Any]
    largest: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    cost: NetworkCost
    tokens: TokenGrid | None = None

    @property
    def is_primus(self) -> bool:
        """Whether the network makes tokens directly from voxels."""
        return self.tokens is not None and self.tokens.stage is None

    @property
    def features(self) -> tuple[int, ...]:
        """Number of features in each stage of the U-Net, full resolution first."""
        return tuple(self.unet["arch_kwargs"]["features_per_stage"])

    @property
    def multiple(self) -> tuple[int, ...]:
        """Number of voxels per axis of which every patch is a multiple: a token of Primus, else the total stride."""
        if self.is_primus and self.tokens is not None:
            return self.tokens.size_vox
        return tuple(int(n) for n in np.prod(np.array(encoder_strides(self.unet)), axis=0))

    def most(self, scan_mm: Sequence[float]) -> tuple[int, ...]:
        """Return the largest patch of a stage: as much of the median scan as strides or tokens allow."""
        voxels = [round(mm / spacing) for mm, spacing in zip(scan_mm, self.spacing_mm, strict=True)]
        fitting = [n // unit * unit for n, unit in zip(voxels, self.multiple, strict=True)]
        return tuple(max(n, own) for n, own in zip(fitting, self.largest, strict=True))


class StageRules:
    """Rules that plan the stages of one configuration.

    Args:
        name: Name of the configuration.
        frame: Network and patches.
        shared: Settings that all stages share, without the transformer.
        transformer: Size of the network's transformer; None for a U-Net.
        preset: Memory target.
        shapes: Number of voxels of every case (z, y, x).
        spacings_mm: Spacing of every case in mm.
        length: Length of the stages, a key of ``planners.presets.LENGTHS``.
    """

    def __init__(
        self,
        name: str,
        frame: Frame,
        shared: dict[str, Any],
        transformer: TransformerSize | None,
        preset: Preset,
        shapes: Int[np.ndarray, "case 3"],
        spacings_mm: Float[np.ndarray, "case 3"],
        length: str,
    ) -> None:
        self.name = name
        self.frame = frame
        self.shared = shared
        self.transformer = transformer
        self.preset = preset
        self.scans_mm = shapes * spacings_mm
        self.slices = shapes[:, 0]
        self.median_mm = tuple(float(mm) for mm in np.median(self.scans_mm, axis=0))
        self.length = length
        self.axes = len(frame.spacing_mm)
        seen_mm = self.median_mm[-self.axes :]
        most = frame.most(seen_mm)
        self.patches = patches_of_scan(seen_mm, frame.spacing_mm, frame.multiple, most)
        self.plane = plane_of_equal_sides(frame.spacing_mm, frame.multiple, most, shared["thick_axis"])
        self.equal_patches = patches_of_scan(seen_mm, frame.spacing_mm, frame.multiple, most, self.plane)
        self.slow_stages: list[str] = []
        self._grids: dict[tuple[str, tuple[int, ...]], tuple[TokenGrid | None, Reasons]] = {}

    def smallest_patch(self, stages: list[Stage]) -> tuple[int, ...]:
        """Return the smallest patch that some stages would have without tokens; that of fine-tuning if none fits."""
        chosen = [self._choose(replace(stage, reads_tokens=False)) for stage in stages]
        patches = [each.step.patch for each in chosen if each is not None]
        return min(patches, key=lambda patch: float(np.prod(patch)), default=self.frame.largest)

    def decide(self, stage: Stage) -> tuple[StagePlan | None, Reasons]:
        """Return the plan of a stage, or None if the stage is left out; and what, value and reason of every decision."""
        chosen = self._choose(stage)
        if chosen is None:
            return None, [(stage.name, "left out", self._why_left_out(stage))]
        step = chosen.step
        # Equal sides grow in large steps; they must not make the spacing of all stages coarser.
        finest = self._choose_from(stage, self.patches) if stage.needs.equal_sides else chosen
        if finest is not None and finest.limit == TIME and finest.step.spent_on == USEFUL:
            self.slow_stages.append(stage.name)
        patches = self.distinct_patches(step.patch)
        (epochs, iterations, warmup), of_length = decide_length(stage, step.batch, patches, self.length)
        schedule = StageSchedule(
            patch_size=step.patch,
            batch_size=step.batch,
            pieces=chosen.pieces,
            checkpointing=chosen.checkpointing,
            epochs=epochs,
            iterations_per_epoch=iterations,
            warmup_epochs=warmup,
        )
        crop, overlap, of_crop = decide_crop(step.patch)
        tokens, of_tokens = self._tokens(stage, step.patch)
        memory = self.preset.pretext_memory_gb
        least_points = self._least_points_gb(stage, step.batch)
        dense, of_dense = decide_dense(
            self.frame.features, step.patch, step.batch, memory, memory - chosen.cost.memory_gb + least_points
        )
        points = bytes_of_points(stage.points, dense, step.batch) / 1e9
        cost = replace(chosen.cost, memory_gb=round(chosen.cost.memory_gb - least_points + points, 3))
        spacing, thick = self.frame.spacing_mm, self.shared["thick_axis"]
        context, of_context = decide_context(self.frame.unet, step.patch, spacing, thick)
        anatomy, of_anatomy = decide_anatomy(self.frame.unet, step.patch, spacing, self.median_mm[-self.axes :])
        queue, momentum, of_teacher = decide_teacher(stage, step.batch, epochs * iterations, patches)
        plan = StagePlan(
            crop_fraction=crop,
            crop_overlap=overlap,
            tokens=tokens,
            dense=dense,
            context=context,
            anatomy=anatomy,
            queue_length=queue,
            teacher_momentum=momentum,
            schedule=schedule,
            distinct_patches=patches,
            cost=cost,
        )
        read = self._settings_read(stage, plan)
        plane = self.plane if stage.needs.equal_sides else None
        reasons = explain_step(stage, replace(chosen, cost=cost), spacing, memory, plane) + of_length
        reasons += of_tokens if stage.reads_tokens else []
        for keys, of_choice in (
            (("crop_fraction",), of_crop),
            (("points_per_image",), of_dense),
            (("turn_plane",), of_context),
            (("fine_stage", "partners"), of_anatomy),
            (("queue_length", "teacher_momentum"), of_teacher),
        ):
            if any(key in read for key in keys):
                reasons += [(_for_stage(what, stage), value, reason) for what, value, reason in of_choice]
        return plan, reasons

    def distinct_patches(self, patch: tuple[int, ...]) -> int:
        """Return the number of patches that cover all cases without overlap."""
        counts = np.ceil(
            self.scans_mm[:, -self.axes :] / np.array(self.frame.spacing_mm) / np.array(patch) - 1e-6
        ).clip(1)
        per_case = counts.prod(axis=1) * (self.slices if self.axes == 2 else 1)
        return int(per_case.sum())

    def _choose(self, stage: Stage) -> ChosenStep | None:
        if not stage.needs.equal_sides or self.plane is None:
            return self._choose_from(stage, self.patches)
        equal = self._choose_from(stage, self.equal_patches)
        if equal is not None and self._fits(equal):
            return equal
        # Strides that differ can make even the least patch of equal sides too large.
        other = self._choose_from(stage, self.patches)
        smaller = equal is None or (other is not None and np.prod(other.step.patch) < np.prod(equal.step.patch))
        return other if smaller else equal

    def _fits(self, chosen: ChosenStep) -> bool:
        """Return whether a step fits at once and in time."""
        most = self.preset.step_multiply_adds
        in_time = most is None or chosen.cost.multiply_adds <= most
        return in_time and chosen.pieces == 1 and not chosen.checkpointing

    def _choose_from(self, stage: Stage, patches: list[tuple[int, ...]]) -> ChosenStep | None:
        if stage.reads_tokens or self.frame.is_primus:
            patches = [patch for patch in patches if self._tokens(stage, patch)[0] is not None]
        if not patches:
            return None
        steps = chain_of_steps(stage, patches, self.frame.spacing_mm, self.median_mm, len(self.scans_mm))

        def cost(step: Step, pieces: int, checkpointing: bool) -> Any:
            return cost_of_step(
                stage,
                self.frame.cost,
                int(np.prod(step.patch)),
                step.batch,
                self._tokens(stage, step.patch)[0] if stage.reads_tokens or stage.masks_tokens else None,
                self.transformer,
                self._least_points_gb(stage, step.batch) * 1e9,
                self.preset.on_gpu,
                pieces,
                checkpointing,
            )

        return choose_step(steps, cost, self.preset.pretext_memory_gb, self.preset.step_multiply_adds)

    def _why_left_out(self, stage: Stage) -> str:
        of_tokens = stage.reads_tokens or self.frame.is_primus
        if of_tokens and not any(self._tokens(stage, patch)[0] is not None for patch in self.patches):
            return f"no patch has at least {TOKENS_MIN} tokens; use another method"
        return (
            f"not even {stage.needs.useful_batch} patches of {self.patches[0]} voxels, one at a time, fit into "
            f"{self.preset.pretext_memory_gb:g} GB; use a larger preset or a coarser spacing"
        )

    def _tokens(self, stage: Stage, patch: tuple[int, ...]) -> tuple[TokenGrid | None, Reasons]:
        planned = self.frame.tokens
        if planned is not None and self.frame.is_primus:
            grid = planned.of_patch(patch)
            return (grid if TOKENS_MIN <= np.prod(grid.grid) <= FINE_TUNING_MAX else None), []
        if not stage.reads_tokens:
            return None, []
        key = (stage.name, patch)
        if key not in self._grids:
            fixed = planned.stage if planned else None
            self._grids[key] = decide_tokens(self.frame.unet, patch, self.frame.spacing_mm, fixed_stage=fixed)
        return self._grids[key]

    def _least_points_gb(self, stage: Stage, batch: int) -> float:
        least, _ = decide_dense(self.frame.features, self.frame.largest, batch, 0.0, 0.0)
        return bytes_of_points(stage.points, least, batch) / 1e9

    def _settings_read(self, stage: Stage, plan: StagePlan) -> set[str]:
        own = {each.name: getattr(plan, each.name) for each in fields(PatchChoices)}
        configuration = StageConfiguration(
            **self.shared, transformer=self.transformer, **own, patch_size=plan.schedule.patch_size
        )
        return set(stage.load().from_plan(configuration))


def _for_stage(what: str, stage: Stage) -> str:
    return what if stage.name in what else f"{what} ({stage.name})"
