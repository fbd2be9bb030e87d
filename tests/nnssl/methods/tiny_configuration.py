"""What a plan says of the tiny networks of ``tests.nnssl.networks.test_hybrid``: thick slices, sides that all differ."""

from dataclasses import fields

from nnssl.methods import METHODS
from nnssl.plan import (
    AnatomyChoices,
    ContextChoices,
    DataChoices,
    DenseSampling,
    PatchChoices,
    PretextConfiguration,
    StageConfiguration,
    StageCost,
    StagePlan,
    StageSchedule,
    TokenGrid,
    TransformerSize,
)
from tests.nnssl.networks.test_hybrid import PATCHES


def make_configuration(dim: int) -> StageConfiguration:
    """Return the settings that every stage reads."""
    patch = PATCHES[dim]
    spacing = (6.0, 1.0, 1.5)[-dim:]
    stride = {2: (2, 2), 3: (1, 2, 2)}[dim]
    grid = tuple(n // s for n, s in zip(patch, stride, strict=True))
    return StageConfiguration(
        case_folder="cases",
        patch_size=patch,
        spacing_mm=spacing,
        thick_axis=0 if dim == 3 else None,
        crop_fraction=(0.5, 1.0),
        crop_overlap=0.7,
        rotation_deg=(180.0, 0.0, 0.0)[: 1 if dim == 2 else 3],
        flip_axes=(dim - 2, dim - 1),
        intensity_views=("contrast", "brightness", "gamma", "inversion"),
        tokens=TokenGrid(
            stage=1,
            grid=grid,
            size_vox=stride,
            size_mm=tuple(s * mm for s, mm in zip(stride, spacing, strict=True)),
            width=8,
            mask_block=(1, 2, 2)[-dim:],
        ),
        transformer=TransformerSize(width=16, depth=2, heads=2, decoder_depth=1),
        dense=DenseSampling(
            features="pyramid", channels=24, contrast_points_per_image=16, correlation_points_per_image=16
        ),
        context=ContextChoices(turn_plane=(dim - 2, dim - 1), quarter_turns=False, attention_rank=8),
        anatomy=AnatomyChoices(
            fine_stage=1,
            coarse_stage=2,
            partners="sam",
            scan_mm=tuple(2 * n * mm for n, mm in zip(patch, spacing, strict=True)),
        ),
        queue_length=10,
        teacher_momentum=0.9,
    )


STAGES = tuple(dict.fromkeys(stage.name for method in METHODS.values() for stage in method.stages))


def planned(configuration: StageConfiguration, stages: tuple[str, ...] = STAGES) -> PretextConfiguration:
    """Return a plan whose stages read these settings."""
    schedule = StageSchedule(
        patch_size=configuration.patch_size,
        batch_size=4,
        pieces=1,
        checkpointing=False,
        epochs=50,
        iterations_per_epoch=10,
        warmup_epochs=2,
    )
    shared = {field.name: getattr(configuration, field.name) for field in fields(DataChoices)}
    own = {field.name: getattr(configuration, field.name) for field in fields(PatchChoices)}
    stage = StagePlan(**own, schedule=schedule, distinct_patches=20, cost=StageCost(0.1, 1e9))
    return PretextConfiguration(
        **shared,
        patch_size=configuration.patch_size,
        has_feature_maps=configuration.tokens is None or configuration.tokens.stage is not None,
        stages=dict.fromkeys(stages, stage),
    )
