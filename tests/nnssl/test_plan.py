import json
from dataclasses import asdict, replace

import pytest

from nnssl.errors import UserError
from nnssl.plan import (
    SCHEMA_VERSION,
    AnatomyChoices,
    ContextChoices,
    Decision,
    DenseSampling,
    Pretext,
    PretextConfiguration,
    StageCost,
    StagePlan,
    StageSchedule,
    TokenGrid,
    TransformerSize,
    read_plan,
    write_plan,
)

TOKENS = TokenGrid(
    stage=1, grid=(8, 12, 10), size_vox=(2, 2, 2), size_mm=(6.0, 2.0, 3.0), width=8, mask_block=(1, 2, 2)
)


def make_pretext() -> Pretext:
    stage = StagePlan(
        crop_fraction=(0.2, 1.0),
        crop_overlap=0.6,
        tokens=TOKENS,
        dense=DenseSampling(
            features="pyramid", channels=24, contrast_points_per_image=125, correlation_points_per_image=512
        ),
        context=ContextChoices(turn_plane=(1, 2), quarter_turns=False, attention_rank=16),
        anatomy=AnatomyChoices(fine_stage=1, coarse_stage=2, partners="sam", scan_mm=(192.0, 96.0, 60.0)),
        queue_length=64,
        teacher_momentum=0.99,
        schedule=StageSchedule((16, 24, 20), 2, 1, False, 3, 4, 0),
        distinct_patches=9,
        cost=StageCost(0.25, 3e9),
    )
    configuration = PretextConfiguration(
        case_folder="nnsslPlans_cases_3d",
        patch_size=(32, 24, 20),
        has_feature_maps=True,
        spacing_mm=(3.0, 1.0, 1.5),
        thick_axis=None,
        rotation_deg=(30.0, 30.0, 30.0),
        flip_axes=(1, 2),
        intensity_views=("contrast",),
        transformer=TransformerSize(width=16, depth=1, heads=2, decoder_depth=1),
        stages={"reprec.contrastive": stage},
    )
    return Pretext(
        schema_version=SCHEMA_VERSION,
        nnssl_version="0",
        preset="cpu",
        memory_target_gb=0.5,
        like=None,
        modalities=("MRI",),
        num_cases=3,
        configurations={"3d_fullres_hybrid": configuration},
        decisions=(Decision("data set", "spacing", "1 mm", "median"),),
    )


def stage_in(pretext: dict) -> dict:
    return pretext["configurations"]["3d_fullres_hybrid"]["stages"]["reprec.contrastive"]


NNUNET = {"dataset_name": "Dataset501_Toy", "plans_name": "nnsslPlans", "configurations": {}}


def test_round_trip(tmp_path):
    path = tmp_path / "nnsslPlans.json"
    written = write_plan(path, NNUNET, make_pretext())
    assert written.pretext == make_pretext()
    assert read_plan(path) == written
    assert (written.dataset_name, written.name) == ("Dataset501_Toy", "nnsslPlans")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["configurations"]["3d_fullres_hybrid"].update(colour=1), "3d_fullres_hybrid.colour"),
        (lambda p: stage_in(p).pop("queue_length"), "queue_length"),
        (lambda p: stage_in(p).update(queue_length="64"), "queue_length"),
        (lambda p: stage_in(p)["tokens"].update(grid=[1.5]), "tokens.grid"),
        (lambda p: p.update(schema_version=99), f"schema_version must be {SCHEMA_VERSION}, got 99"),
        (lambda p: p.update(schema_version=SCHEMA_VERSION - 1), f"got {SCHEMA_VERSION - 1}; run nnssl_plan"),
        (lambda p: p.pop("schema_version"), f"schema_version must be {SCHEMA_VERSION}, got None"),
    ],
)
def test_wrong_key_is_an_error_that_names_file_and_key(tmp_path, change, message):
    path = tmp_path / "nnsslPlans.json"
    pretext = json.loads(json.dumps(asdict(make_pretext())))
    change(pretext)
    path.write_text(json.dumps({**NNUNET, "pretext": pretext}))
    with pytest.raises(UserError) as error:
        read_plan(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_plain_nnunet_plan_and_broken_file_are_refused(tmp_path):
    path = tmp_path / "nnUNetPlans.json"
    path.write_text(json.dumps(NNUNET))
    with pytest.raises(UserError, match="has no section 'pretext'"):
        read_plan(path)
    path.write_text('{"dataset_name": ')
    with pytest.raises(UserError, match="cannot be read as a plan"):
        read_plan(path)
    with pytest.raises(UserError, match="there is no such plan"):
        read_plan(tmp_path / "none.json")


def test_a_stage_reads_the_settings_of_its_configuration_and_of_its_own_patch():
    (hybrid,) = make_pretext().configurations.values()
    own = hybrid.for_stage("reprec.contrastive")
    assert (own.patch_size, own.tokens, own.queue_length) == ((16, 24, 20), TOKENS, 64)
    assert (own.case_folder, own.transformer, own.flip_axes) == (hybrid.case_folder, hybrid.transformer, (1, 2))
    other = hybrid.for_stage("reprec.contrastive", (8, 25, 2))
    assert other.patch_size == (8, 25, 2)
    assert (other.token_grid.grid, other.token_grid.mask_block) == ((4, 13, 1), (1, 2, 1))
    assert own.anatomy.partners == "sam"
    assert hybrid.for_stage("reprec.contrastive", (48, 96, 40)).anatomy.partners == "body_box"  # 1.3 x 1 x 1 patches
    assert hybrid.for_stage("reprec.contrastive", (42, 96, 40)).anatomy.partners == "sam"  # 1.52 patches along z
    with pytest.raises(UserError, match=r"patch_size must have 3 axes, got \(8, 25\)"):
        hybrid.for_stage("reprec.contrastive", (8, 25))
    with pytest.raises(UserError, match="The plan has no schedule for alice.alignment"):
        hybrid.for_stage("alice.alignment")


def test_what_a_stage_cannot_do_without_is_there_or_an_error():
    (hybrid,) = make_pretext().configurations.values()
    own = hybrid.for_stage("reprec.contrastive")
    assert (own.token_grid, own.transformer_size) == (own.tokens, hybrid.transformer)
    plain = replace(own, tokens=None, transformer=None)
    with pytest.raises(UserError, match="has no token grid"):
        plain.token_grid  # noqa: B018
    with pytest.raises(UserError, match="has no transformer"):
        plain.transformer_size  # noqa: B018


def test_unknown_configuration_names_the_known_ones(tmp_path):
    plan = write_plan(tmp_path / "nnsslPlans.json", NNUNET, make_pretext())
    with pytest.raises(UserError, match="no configuration '2d'; it has 3d_fullres_hybrid"):
        plan.configuration("2d")
