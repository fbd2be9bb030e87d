"""The plan: a valid nnU-Net plans file with an additional section, ``pretext``.

Stock nnU-Net reads everything outside ``pretext``, which holds the decisions of nnssl. Axes are in the order of the
preprocessed arrays (after ``transpose_forward``): z, y, x, or y, x in 2D. Names of lengths end in ``_mm`` or ``_vox``.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from nnssl.errors import UserError
from nnssl.files import read_json, write_json
from nnssl.paths import Folders
from nnssl.schema import STRICT, parse
from nnssl.sizes import length_in_patches

SCHEMA_VERSION = 8
PLANS_NAME = "nnsslPlans"
LEAST_PATCHES = 1.5
"""Smallest length of the median scan, in patches, at which embeddings pair scans. A scan hardly longer than a patch contains no
other part of the body that a place could be confused with."""


@dataclass(frozen=True)
class Decision:
    """A decision of the planner and its reason."""

    __pydantic_config__: ClassVar = STRICT

    configuration: str
    """Name of the configuration, or ``"data set"`` for decisions that all configurations share."""
    what: str
    value: str
    reason: str


Reasons = list[tuple[str, str, str]]
"""Subject, value and reason of each decision of a rule."""


@dataclass(frozen=True)
class TokenGrid:
    """Division of a patch into tokens."""

    __pydantic_config__: ClassVar = STRICT

    stage: int | None
    """Encoder stage of a U-Net whose feature map gives the tokens, one per position; 0 is full resolution. None for Primus, which
    makes tokens directly from voxels."""
    grid: tuple[int, ...]
    """Number of tokens per axis in the patch of the stage."""
    size_vox: tuple[int, ...]
    size_mm: tuple[float, ...]
    width: int
    """Number of channels of a token at the output of the encoder."""
    mask_block: tuple[int, ...]
    """Number of tokens per axis that are masked together."""

    def of_patch(self, patch_size: Sequence[int]) -> "TokenGrid":
        """Return the grid of tokens of this size in another patch."""
        grid = tuple(math.ceil(n / size) for n, size in zip(patch_size, self.size_vox, strict=True))
        block = tuple(max(1, min(n, count // 2)) for n, count in zip(self.mask_block, grid, strict=True))
        return replace(self, grid=grid, mask_block=block)


@dataclass(frozen=True)
class TransformerSize:
    """Size of the transformer of a hybrid network or of Primus."""

    __pydantic_config__: ClassVar = STRICT

    width: int
    depth: int
    heads: int
    decoder_depth: int
    """Number of blocks of the token decoder that a generative stage adds."""


@dataclass(frozen=True)
class StageSchedule:
    """Patch, batch size and length of a pretext stage, which its training settings take over."""

    __pydantic_config__: ClassVar = STRICT

    patch_size: tuple[int, ...]
    """Number of voxels of a patch per axis."""
    batch_size: int
    """Patches per step over all processes; the method makes its views from each patch."""
    pieces: int
    """Number of pieces in which a batch passes the network; the gradient is that of the whole batch."""
    checkpointing: bool
    """Whether the network's stages keep only their inputs and are computed again in the backward pass."""
    epochs: int
    iterations_per_epoch: int
    warmup_epochs: int


@dataclass(frozen=True)
class StageCost:
    """What a step of a pretext stage costs, as estimated by the planner."""

    __pydantic_config__: ClassVar = STRICT

    memory_gb: float
    """Largest memory of a step in GB (1e9 bytes), with weights and the optimizer's state."""
    multiply_adds: float
    """Multiply-adds of the network in a step, forward and backward."""


@dataclass(frozen=True)
class DenseSampling:
    """Features that describe a point, and numbers of points of an image that a step can compare."""

    __pydantic_config__: ClassVar = STRICT

    features: Literal["single", "pyramid"]
    """``single``: the last decoder stage; ``pyramid``: all decoder stages and the bottleneck, side by side."""
    channels: int
    """Number of features of a point."""
    contrast_points_per_image: int
    """Pairs of points per image if every point of a step is compared with every other."""
    correlation_points_per_image: int
    """Pairs of points per image if only correlations of dimensions are computed."""


@dataclass(frozen=True)
class ContextChoices:
    """Turns of a crop that keep its voxel grid, and the size of the attention that receives the turn as a code."""

    __pydantic_config__: ClassVar = STRICT

    turn_plane: tuple[int, int]
    """Axes of the plane in which crops are turned."""
    quarter_turns: bool
    """Whether quarter turns keep the grid; if not, only half turns are used."""
    attention_rank: int


@dataclass(frozen=True)
class AnatomyChoices:
    """Encoder stages of the anatomical embeddings, and whether embeddings or body boxes pair the scans of a stage."""

    __pydantic_config__: ClassVar = STRICT

    fine_stage: int
    """Encoder stage of the fine embedding, which localises precisely."""
    coarse_stage: int
    """Encoder stage of the coarse embedding, which finds the part of the body."""
    partners: Literal["sam", "body_box"]
    """How positions in different scans are paired: by embeddings, or by the position in the body's box if scans are hardly larger
    than the stage's patch."""
    scan_mm: tuple[float, ...]
    """Size of the median scan."""

    def of_patch(self, patch_size: Sequence[int], spacing_mm: Sequence[float]) -> "AnatomyChoices":
        """Return the choice for another patch; the encoder stages remain."""
        longest = max(length_in_patches(self.scan_mm, patch_size, spacing_mm))
        return replace(self, partners="sam" if longest >= LEAST_PATCHES else "body_box")


@dataclass(frozen=True)
class DataChoices:
    """Settings that depend on the data only, so that all stages of a configuration share them."""

    __pydantic_config__: ClassVar = STRICT

    case_folder: str
    """Name of the folder of preprocessed cases, below the data set's folder in ``nnUNet_preprocessed``."""
    spacing_mm: tuple[float, ...]
    thick_axis: int | None
    """Axis with thick slices, which is treated differently; None if there is none."""
    rotation_deg: tuple[float, ...]
    """Largest rotation about each axis, one angle in 2D; 0 if rotation is not allowed."""
    flip_axes: tuple[int, ...]
    intensity_views: tuple[str, ...]
    """Names of the intensity changes that are suitable for the modality."""
    transformer: TransformerSize | None
    """None for a U-Net without a transformer."""

    @property
    def transformer_size(self) -> TransformerSize:
        """The size of the transformer, for stages that need one.

        Raises:
            UserError: If the network of the configuration has no transformer.
        """
        if self.transformer is None:
            raise UserError(
                f"the configuration at {self.spacing_mm} mm has no transformer; choose another configuration"
            )
        return self.transformer


@dataclass(frozen=True)
class PatchChoices:
    """Settings that depend on the patch of a stage."""

    __pydantic_config__: ClassVar = STRICT

    crop_fraction: tuple[float, float]
    """Smallest and largest share of the patch's volume (area in 2D) that a random crop covers."""
    crop_overlap: float
    """Average overlap of two crops, as a share of the smaller one."""
    tokens: TokenGrid | None
    """None if no encoder stage has enough positions, or if the stage uses no tokens."""
    dense: DenseSampling
    context: ContextChoices
    anatomy: AnatomyChoices
    queue_length: int
    """Number of keys in the queue of momentum contrast."""
    teacher_momentum: float

    @property
    def token_grid(self) -> TokenGrid:
        """The token grid, for stages that need one.

        Raises:
            UserError: If the stage has no token grid.
        """
        if self.tokens is None:
            raise UserError("the plan has no token grid for this stage; choose another configuration")
        return self.tokens


@dataclass(frozen=True)
class StagePlan(PatchChoices):
    """The plan of one pretext stage."""

    schedule: StageSchedule
    distinct_patches: int
    """Number of patches of this size that cover all cases without overlap."""
    cost: StageCost


@dataclass(frozen=True)
class StageConfiguration(DataChoices, PatchChoices):
    """Settings that a pretext stage reads: those of its configuration and those of its own patch."""

    patch_size: tuple[int, ...]


@dataclass(frozen=True)
class PretextConfiguration(DataChoices):
    """Settings of the pretext stages for one configuration of the plan."""

    patch_size: tuple[int, ...]
    """Patch of fine-tuning; every stage has one of its own."""
    has_feature_maps: bool
    """Whether the network has feature maps of several resolutions: true for a U-Net, false for Primus."""
    stages: dict[str, StagePlan]
    """Plan of each stage, by its name ``method.stage``."""

    def stage(self, name: str) -> StagePlan:
        """Return the plan of a stage.

        Raises:
            UserError: If the configuration has no plan for the stage.
        """
        if name not in self.stages:
            raise UserError(
                f"The plan has no schedule for {name} with this configuration. If the plan is older than the method, plan "
                "again with the same nnssl_plan_and_preprocess command, which keeps existing weights. Otherwise the planner "
                "left the stage out; the plan's decisions name the reason"
            )
        return self.stages[name]

    def for_stage(self, name: str, patch_size: Sequence[int] = ()) -> StageConfiguration:
        """Return the settings that a stage reads.

        Args:
            name: Name of the stage, ``method.stage``.
            patch_size: Patch that the user chose in place of the plan's; empty for the plan's.

        Raises:
            UserError: As ``stage``, or if the patch has another number of axes than the plan's.
        """
        planned = self.stage(name)
        patch = tuple(patch_size) or planned.schedule.patch_size
        if len(patch) != len(self.patch_size):
            raise UserError(f"patch_size must have {len(self.patch_size)} axes, got {patch}")
        shared = {field.name: getattr(self, field.name) for field in fields(DataChoices)}
        own = {field.name: getattr(planned, field.name) for field in fields(PatchChoices)}
        if patch != planned.schedule.patch_size:
            own["tokens"] = planned.tokens and planned.tokens.of_patch(patch)
            own["anatomy"] = planned.anatomy.of_patch(patch, self.spacing_mm)
        return StageConfiguration(**shared, **own, patch_size=patch)


@dataclass(frozen=True)
class Pretext:
    """The ``pretext`` section of a plan."""

    __pydantic_config__: ClassVar = STRICT
    __schema_version__: ClassVar = SCHEMA_VERSION

    schema_version: int
    nnssl_version: str
    preset: str
    memory_target_gb: float
    like: str | None
    """nnU-Net plans file that this plan was built around; None for a plan from the data alone."""
    modalities: tuple[str, ...]
    """Modality of each channel: ``CT``, ``X-ray``, or the channel's name in the data set."""
    num_cases: int
    """Number of usable cases."""
    configurations: dict[str, PretextConfiguration]
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class Plan:
    """A plans file: the content that nnU-Net reads, and nnssl's section."""

    nnunet: dict[str, Any]
    """Content of the whole file, including ``pretext``."""
    pretext: Pretext

    @property
    def dataset_name(self) -> str:
        """Name of the data set, ``DatasetXXX_Name``."""
        return self.nnunet["dataset_name"]

    @property
    def name(self) -> str:
        """Name of the plan: its file name without ``.json``."""
        return self.nnunet["plans_name"]

    def configuration(self, name: str) -> PretextConfiguration:
        """Return nnssl's section of one configuration.

        Raises:
            UserError: If the plan has no such configuration. The message lists those that it has.
        """
        if name not in self.pretext.configurations:
            known = ", ".join(sorted(self.pretext.configurations))
            raise UserError(f"plan {self.name} of {self.dataset_name} has no configuration {name!r}; it has {known}")
        return self.pretext.configurations[name]


def plan_path(folders: Folders, dataset_name: str, plans_name: str) -> Path:
    """Return the path of a plans file of a data set, whether nnU-Net or nnssl wrote it."""
    return folders.preprocessed / dataset_name / f"{plans_name}.json"


def existing_plan(folders: Folders, dataset_name: str, plans_name: str) -> Path:
    """Return the path of an existing plans file of a data set.

    Raises:
        UserError: If there is no such plan. The message names the command that makes it.
    """
    path = plan_path(folders, dataset_name, plans_name)
    if not path.exists():
        named = "" if plans_name == PLANS_NAME else f" -p {plans_name}"
        raise UserError(f"{path}: there is no such plan; run nnssl_plan_and_preprocess -d {dataset_name}{named}")
    return path


def plan_from_dict(content: Any, source: str) -> Plan:
    """Check the content of a plans file and return it as a ``Plan``.

    Args:
        content: Parsed JSON.
        source: Path or name, for the error message.

    Raises:
        UserError: If the section ``pretext`` is missing (a plain nnU-Net plan), has another schema version or a wrong key.
    """
    if not isinstance(content, dict) or "pretext" not in content:
        raise UserError(
            f"{source}: has no section 'pretext', so it is not a plan of nnssl; run nnssl_plan_and_preprocess"
        )
    pretext = parse(Pretext, content["pretext"], f"{source}: pretext", "run nnssl_plan_and_preprocess again")
    return Plan(nnunet=content, pretext=pretext)


def read_plan(path: Path) -> Plan:
    """Read a plans file of nnssl. Raises ``UserError`` as ``plan_from_dict`` does.

    Examples:
        >>> folder = nnssl.resolve_folders().preprocessed / "Dataset501_Scans"
        >>> plan = nnssl.read_plan(folder / "nnsslPlans.json")
        >>> plan.name, plan.pretext.num_cases
        ('nnsslPlans', 6)
    """
    return plan_from_dict(read_json(path, "plan"), str(path))


def write_plan(path: Path, nnunet: dict[str, Any], pretext: Pretext) -> Plan:
    """Write a plans file atomically, nnU-Net's content with nnssl's section, and return the plan as it is read back."""
    content = {**nnunet, "pretext": asdict(pretext)}
    write_json(path, content)
    return read_plan(path)
