"""The plan: a valid nnU-Net plans file with one more section, ``pretext``.

Stock nnU-Net reads everything outside ``pretext``; nnssl reads its own decisions from it. Axes are in the order of the
preprocessed arrays (after ``transpose_forward``): z, y, x, or y, x in 2D. Lengths in mm carry ``_mm``, in voxels ``_vox``.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from nnssl.errors import UserError
from nnssl.files import read_json, write_json
from nnssl.paths import Folders
from nnssl.schema import STRICT, parse

SCHEMA_VERSION = 5
PLANS_NAME = "nnsslPlans"


@dataclass(frozen=True)
class Decision:
    """One choice of the planner and why it was made."""

    __pydantic_config__: ClassVar = STRICT

    configuration: str
    """Name of the configuration, or ``"data set"`` for what all of them share."""
    what: str
    value: str
    reason: str


Reasons = list[tuple[str, str, str]]
"""(what, value, reason) of each decision that a rule makes."""


@dataclass(frozen=True)
class TokenGrid:
    """How a patch is cut into tokens."""

    __pydantic_config__: ClassVar = STRICT

    stage: int | None
    """Encoder stage of a U-Net whose feature map gives the tokens; 0 is full resolution. One position is one token. None where
    voxels become tokens at once (Primus)."""
    grid: tuple[int, ...]
    """Tokens per axis for the plan's patch."""
    size_vox: tuple[int, ...]
    size_mm: tuple[float, ...]
    width: int
    """Channels of a token as the encoder gives it."""
    mask_block: tuple[int, ...]
    """Tokens per axis that are masked together."""


@dataclass(frozen=True)
class TransformerSize:
    """Size of the transformer of a hybrid network or of Primus."""

    __pydantic_config__: ClassVar = STRICT

    width: int
    depth: int
    heads: int
    decoder_depth: int
    """Blocks of the token decoder that a generative stage puts on it."""


@dataclass(frozen=True)
class StageSchedule:
    """How long one pretext stage runs and on how many patches at once."""

    __pydantic_config__: ClassVar = STRICT

    batch_size: int
    """Patches per step over all processes; each gives as many views as the method makes."""
    epochs: int
    iterations_per_epoch: int
    warmup_epochs: int


@dataclass(frozen=True)
class DenseSampling:
    """Which features describe a point, and how many points a step can compare."""

    __pydantic_config__: ClassVar = STRICT

    features: Literal["single", "pyramid"]
    """``single``: the last decoder stage; ``pyramid``: all decoder stages and the bottleneck, side by side."""
    channels: int
    """Features of a point."""
    contrast_points: int
    """Pairs of points in a step where every point is compared with every other."""
    correlation_points: int
    """Pairs of points in a step where only correlations of dimensions are made."""


@dataclass(frozen=True)
class ContextChoices:
    """How crops may be turned without leaving their grid, and how large the attention is that is told of it."""

    __pydantic_config__: ClassVar = STRICT

    turn_plane: tuple[int, int]
    """Axes of the plane."""
    quarter_turns: bool
    """False where only half turns keep the grid."""
    attention_rank: int


@dataclass(frozen=True)
class AnatomyChoices:
    """Which stages of the encoder have the resolution of anatomical embeddings, and whether there is a use for them."""

    __pydantic_config__: ClassVar = STRICT

    fine_stage: int
    """Of those that say where exactly."""
    coarse_stage: int
    """Of those that say in which part of the body."""
    partners: Literal["sam", "body_box"]
    """What pairs the places of different scans: embeddings, or the place in the body's box where scans are hardly larger than a
    patch."""


@dataclass(frozen=True)
class PretextConfiguration:
    """What the pretext methods take from the data for one configuration of the plan."""

    __pydantic_config__: ClassVar = STRICT

    case_folder: str
    """Folder of the preprocessed cases, below the data set's folder in ``nnUNet_preprocessed``."""
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    thick_axis: int | None
    """Axis treated apart because its slices are thick, None if there is none."""
    crop_fraction: tuple[float, float]
    """Least and largest share of the patch's volume (area in 2D) that a random crop covers."""
    crop_overlap: float
    """Share of the smaller of two crops that both crops have in common on average."""
    rotation_deg: tuple[float, ...]
    """Largest rotation about each axis; a single angle in 2D. 0 where rotation is not allowed."""
    flip_axes: tuple[int, ...]
    intensity_views: tuple[str, ...]
    """Names of the intensity changes that suit the modality."""
    tokens: TokenGrid | None
    """None where no stage of the encoder has enough positions, and where no method looks at tokens."""
    transformer: TransformerSize | None
    """None for a U-Net without one."""
    dense: DenseSampling
    context: ContextChoices
    anatomy: AnatomyChoices
    queue_length: int
    """Keys that a momentum-contrast queue holds."""
    teacher_momentum: float
    schedules: dict[str, StageSchedule]
    """By stage, named ``method.stage``."""

    @property
    def has_feature_maps(self) -> bool:
        """Whether the network is a U-Net: one whose voxels become tokens at once has no maps of several resolutions."""
        return self.tokens is None or self.tokens.stage is not None

    @property
    def token_grid(self) -> TokenGrid:
        """The tokens, for a stage that cannot do without them.

        Raises:
            UserError: If the configuration has none.
        """
        if self.tokens is None:
            raise UserError(f"the configuration with patch {self.patch_size} has no token grid; choose another with -c")
        return self.tokens

    @property
    def transformer_size(self) -> TransformerSize:
        """The size of the transformer, for a stage that cannot do without one.

        Raises:
            UserError: If the network of the configuration has no transformer.
        """
        if self.transformer is None:
            raise UserError(
                f"the configuration with patch {self.patch_size} has no transformer; choose another with -c"
            )
        return self.transformer


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
    """Plans file of nnU-Net that this plan was built around, None for a plan from the data alone."""
    modalities: tuple[str, ...]
    """Per channel: ``CT`` or what the data set calls it."""
    num_cases: int
    """Usable cases."""
    configurations: dict[str, PretextConfiguration]
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class Plan:
    """A plans file as nnU-Net sees it and nnssl's section of it."""

    nnunet: dict[str, Any]
    """The whole file, ``pretext`` included."""
    pretext: Pretext

    @property
    def dataset_name(self) -> str:
        """Name of the data set, ``DatasetXXX_Name``."""
        return self.nnunet["dataset_name"]

    @property
    def name(self) -> str:
        """Identifier of the plan: its file name without ``.json``."""
        return self.nnunet["plans_name"]

    def configuration(self, name: str) -> PretextConfiguration:
        """Return nnssl's section of one configuration.

        Raises:
            UserError: the plan has no such configuration; names those it has.
        """
        if name not in self.pretext.configurations:
            known = ", ".join(sorted(self.pretext.configurations))
            raise UserError(f"plan {self.name} of {self.dataset_name} has no configuration {name!r}; it has {known}")
        return self.pretext.configurations[name]


def plan_path(folders: Folders, dataset_name: str, plans_name: str) -> Path:
    """Return where the plans file of a data set lies, nnU-Net's or nnssl's."""
    return folders.preprocessed / dataset_name / f"{plans_name}.json"


def existing_plan(folders: Folders, dataset_name: str, plans_name: str) -> Path:
    """Return the plans file of a data set.

    Raises:
        UserError: there is no such plan; names the command that makes it.
    """
    path = plan_path(folders, dataset_name, plans_name)
    if not path.exists():
        named = "" if plans_name == PLANS_NAME else f" -p {plans_name}"
        raise UserError(f"{path}: there is no such plan; run nnssl_plan_and_preprocess -d {dataset_name}{named}")
    return path


def plan_from_dict(content: Any, source: str) -> Plan:
    """Check the content of a plans file and return it as a Plan.

    Args:
        content: the parsed JSON.
        source: path or name, for the error message.

    Raises:
        UserError: there is no ``pretext`` section (a plain nnU-Net plan), it is of another schema version, or a key is
            wrong.
    """
    if not isinstance(content, dict) or "pretext" not in content:
        raise UserError(f"{source}: has no 'pretext' section, so it is no plan of nnssl; run nnssl_plan_and_preprocess")
    pretext = parse(Pretext, content["pretext"], f"{source}: pretext", "run nnssl_plan_and_preprocess again")
    return Plan(nnunet=content, pretext=pretext)


def read_plan(path: Path) -> Plan:
    """Read a plans file of nnssl; raises UserError as ``plan_from_dict`` does.

    Example:
        >>> folder = nnssl.resolve_folders().preprocessed / "Dataset501_Scans"
        >>> plan = nnssl.read_plan(folder / "nnsslPlans.json")
        >>> plan.name, plan.pretext.num_cases
        ('nnsslPlans', 4)
    """
    return plan_from_dict(read_json(path, "plan"), str(path))


def write_plan(path: Path, nnunet: dict[str, Any], pretext: Pretext) -> Plan:
    """Write a plans file: nnU-Net's content with nnssl's section, atomically, and return it as read back."""
    content = {**nnunet, "pretext": asdict(pretext)}
    write_json(path, content)
    return read_plan(path)
