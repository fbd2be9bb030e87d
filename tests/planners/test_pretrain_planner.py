"""The planner on synthetic fingerprints of several modalities and geometries, without images."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.data.raw import RawCase, RawDataset, SetAside
from nnssl.environment import variables
from nnssl.errors import ArgumentError, UserError
from nnssl.networks.backbone import build_network
from nnssl.networks.primus_positions import architecture_of_patch
from nnssl.paths import resolve_folders
from nnssl.plan import read_plan
from nnssl.views.overlap import common_share
from nnssl.views.spatial import AffineRange, draw_affine
from planners.case_record import CaseRecord, IntensityStatistics
from planners.fingerprint import Fingerprint
from planners.presets import PRESETS, find_preset, preset_for_gpu
from planners.pretrain_planner import plan_pretraining
from planners.reasons import format_decisions
from planners.view_rules import mean_overlap

STATISTICS = IntensityStatistics(1.0, 1.0, 1.0, 0.0, 2.0, 0.1, 1.9)
KINDS = {
    # name: (shapes, spacings, channel names), like hippocampus, ACDC, abdominal CT
    "iso": ([(36, 50, 35), (40, 52, 33)], [(1.0, 1.0, 1.0)] * 2, ("MRI",)),
    "thick": ([(9, 256, 216), (10, 232, 200)], [(10.0, 1.5, 1.5), (10.0, 1.5, 1.5)], ("MRI",)),
    "ct": ([(149, 257, 257), (90, 257, 257)], [(3.0, 1.3, 1.3), (5.0, 1.0, 1.0)], ("CT",)),
    "two_channels": ([(40, 64, 56), (40, 60, 56)], [(2.0, 1.0, 1.0)] * 2, ("T1", "T2")),
}


def make_inputs(kind: str, number: int = 12, dataset_id: int = 501) -> tuple[RawDataset, Fingerprint]:
    shapes, spacings, channels = KINDS[kind]
    name = f"Dataset{dataset_id}_Toy"
    records, cases = [], []
    for i in range(number):
        shape, spacing = shapes[i % 2], spacings[i % 2]
        records.append(
            CaseRecord(f"case_{i:03}", shape, spacing, "LPS", len(channels), shape, 1.0, 0.5,
                       (STATISTICS,) * len(channels), (0.0,) * len(channels), str(i))
        )  # fmt: skip
        cases.append(RawCase(f"case_{i:03}", tuple(Path(f"/x/{i}_{c:04}.nii.gz") for c in range(len(channels)))))
    dataset_json = {
        "channel_names": {str(c): n for c, n in enumerate(channels)},
        "labels": {"background": 0, "foreground": 1},
        "numTraining": number,
        "file_ending": ".nii.gz",
    }
    dataset = RawDataset(name, Path("/x"), ".nii.gz", channels, tuple(cases), "SimpleITKIO", dataset_json, ())
    fingerprint = Fingerprint(
        1,
        name,
        "digest",
        channels,
        channels,
        tuple(records),
        (),
        (),
        {str(c): STATISTICS for c in range(len(channels))},
    )
    return dataset, fingerprint


def make_plan(kind: str, preset: str = "cpu", **arguments):
    dataset, fingerprint = make_inputs(kind)
    return plan_pretraining(dataset, fingerprint, resolve_folders(), preset, **arguments)


@pytest.fixture(scope="module")
def cpu_plans(tmp_path_factory):
    """Return the plans of all kinds for the preset cpu, which are made once."""
    folder = tmp_path_factory.mktemp("plans")
    with variables(**{f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}):
        return {kind: make_plan(kind) for kind in sorted(KINDS)}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_stock_nnunet_builds_every_configuration(kind, cpu_plans):
    plan = cpu_plans[kind]
    manager = PlansManager(json.loads(json.dumps(plan.nnunet)))
    channels = len(KINDS[kind][2])
    for name, pretext in plan.pretext.configurations.items():
        configuration = manager.get_configuration(name)
        assert tuple(configuration.patch_size) == pretext.patch_size
        network = nnUNetTrainer.build_network_architecture(manager, configuration, channels, 3, True)
        network.train()
        outputs = network(torch.zeros(1, channels, *pretext.patch_size))
        assert outputs[0].shape == (1, 3, *pretext.patch_size)
        assert pretext.stages
        for stage in pretext.stages.values():
            patch, tokens = stage.schedule.patch_size, stage.tokens
            own = architecture_of_patch(configuration.configuration["architecture"], patch)
            with torch.device("meta"), torch.no_grad():
                network = build_network(own, channels, 3, seed=0).train()
                if tokens is None or tokens.stage is not None:
                    features = network.encoder(torch.zeros(2, channels, *patch))
                    assert network.decoder(features)[0].shape == (2, 3, *patch)
            if tokens is not None and tokens.stage is None:
                assert network.grid == tokens.grid
            elif tokens is not None:
                assert tuple(features[tokens.stage].shape[2:]) == tokens.grid
    folders = [manager.get_configuration(name).data_identifier for name in ("2d", "3d_fullres")]
    assert all(folder.startswith("nnsslPlans_") for folder in folders)


def test_hybrid_weights_fit_the_plain_network_of_the_same_plan(cpu_plans):
    manager = PlansManager(json.loads(json.dumps(cpu_plans["iso"].nnunet)))
    build = nnUNetTrainer.build_network_architecture
    hybrid = build(manager, manager.get_configuration("3d_fullres_hybrid"), 1, 3, True).state_dict()
    plain = build(manager, manager.get_configuration("3d_fullres"), 1, 3, True).state_dict()
    assert {key: value.shape for key, value in plain.items()}.items() <= {k: v.shape for k, v in hybrid.items()}.items()


def test_same_data_gives_the_same_bytes_and_leaves_the_environment(nnunet_folders, monkeypatch):
    path = nnunet_folders / "preprocessed" / "Dataset501_Toy" / "nnsslPlans.json"
    make_plan("thick")
    first = path.read_bytes()
    path.unlink()
    raw = list((nnunet_folders / "raw").iterdir())
    import os

    before = dict(os.environ)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002  nnU-Net uses the global generator
    make_plan("thick")
    assert path.read_bytes() == first
    assert dict(os.environ) == before
    assert list((nnunet_folders / "raw").iterdir()) == raw


def test_thick_slices_are_treated_apart(cpu_plans):
    plan = cpu_plans["thick"]
    three = plan.configuration("3d_fullres")
    assert three.thick_axis == 0
    assert three.rotation_deg == (180.0, 0.0, 0.0)
    assert three.flip_axes == (1, 2)
    said = {(d.configuration, d.what): d for d in plan.pretext.decisions}
    assert said["data set", "slice axis"].value == "treated separately"
    assert "10 mm and 1.5 mm differ" in said["data set", "slice axis"].reason
    assert "1x2x2" in said["3d_fullres", "strides"].value
    block = plan.configuration("3d_fullres_hybrid").for_stage("reprec.generative").tokens
    assert block.size_vox[0] < block.size_vox[1]
    # the 3D configuration is coarser, so that steps are computed in time; so both have cases of their own
    assert "coarser than the 10 x 1.5 x 1.5 mm of the data" in said["data set", "spacing"].reason
    assert plan.configuration("2d").case_folder != three.case_folder


def test_isotropic_data_is_not(cpu_plans):
    plan = cpu_plans["iso"]
    three = plan.configuration("3d_fullres")
    assert three.thick_axis is None
    assert three.rotation_deg == (30.0, 30.0, 30.0)
    assert plan.configuration("2d").rotation_deg == (180.0,)


def test_modality_decides_normalisation_and_views(cpu_plans):
    ct = cpu_plans["ct"]
    assert ct.nnunet["configurations"]["3d_fullres"]["normalization_schemes"] == ["CTNormalization"]
    assert "window" in ct.configuration("3d_fullres").intensity_views
    assert "inversion" not in ct.configuration("3d_fullres").intensity_views
    # slices of 3 and of 5 mm: the 2D configuration keeps them, the 3D one resamples them
    assert ct.configuration("2d").case_folder != ct.configuration("3d_fullres").case_folder
    mr = cpu_plans["iso"]
    assert mr.nnunet["configurations"]["3d_fullres"]["normalization_schemes"] == ["ZScoreNormalization"]
    assert {"inversion", "bias_field", "gamma"} <= set(mr.configuration("3d_fullres").intensity_views)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_tokens_are_within_bounds_and_blocks_within_the_grid(kind, cpu_plans):
    for name, configuration in cpu_plans[kind].pretext.configurations.items():
        for stage, plan in configuration.stages.items():
            tokens = plan.tokens
            if stage not in ("reprec.generative", "alice.alignment"):
                assert tokens is None or name.endswith("primus")
                continue
            assert 64 <= np.prod(tokens.grid) <= (8000 if name.endswith("primus") else 2000)
            assert all(1 <= block <= max(1, n // 2) for block, n in zip(tokens.mask_block, tokens.grid, strict=True))
            expected = [n * mm for n, mm in zip(tokens.size_vox, configuration.spacing_mm, strict=True)]
            assert tokens.size_mm == pytest.approx(expected)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_nothing_is_decided_twice(kind, cpu_plans):
    """This includes stages that two methods share, such as SAM's."""
    decided = [(each.configuration, each.what) for each in cpu_plans[kind].pretext.decisions]
    assert len(set(decided)) == len(decided)


def test_the_order_of_axes_changes_nothing_but_the_order(cpu_plans, nnunet_folders, monkeypatch):
    """Thick slices along x, as in some sagittal scans, give the same plan as thick slices along z."""
    shapes, spacings, channels = KINDS["thick"]
    sagittal = ([shape[1:] + shape[:1] for shape in shapes], [mm[1:] + mm[:1] for mm in spacings], channels)
    monkeypatch.setitem(KINDS, "sagittal", sagittal)
    along_z, along_x = cpu_plans["thick"], make_plan("sagittal")
    assert along_x.nnunet["transpose_forward"] == [2, 0, 1]
    assert along_x.pretext.configurations == along_z.pretext.configurations
    assert along_x.nnunet["configurations"] == along_z.nnunet["configurations"]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_patches_are_counted_in_scans_at_the_plans_spacing(kind, cpu_plans):
    shapes, spacings, _ = KINDS[kind]
    said = {(d.configuration, d.what): d.reason for d in cpu_plans[kind].pretext.decisions}
    for name in ("3d_fullres", "2d"):
        configuration = cpu_plans[kind].configuration(name)
        axes = len(configuration.patch_size)
        patches = 0
        for case in range(12):
            in_case = 1
            for length, mm, planned_mm, side in zip(
                shapes[case % 2][-axes:],
                spacings[case % 2][-axes:],
                configuration.spacing_mm,
                configuration.for_stage("pix2rep.dense").patch_size,
                strict=True,
            ):
                in_case *= max(1, math.ceil(length * mm / planned_mm / side - 1e-6))
            patches += in_case * (shapes[case % 2][0] if axes == 2 else 1)
        assert f"one pass over the {patches:,} distinct patches" in said[name, "length (pix2rep.dense)"]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_schedules_and_teachers_follow_from_their_stages(kind, cpu_plans):
    """The length of a stage determines the momentum of its teacher."""
    plan = cpu_plans[kind]
    said = {(d.configuration, d.what) for d in plan.pretext.decisions}
    for name, configuration in plan.pretext.configurations.items():
        for stage, planned in configuration.stages.items():
            steps = planned.schedule.epochs * planned.schedule.iterations_per_epoch
            assert planned.teacher_momentum == pytest.approx(min(0.999, 1 - 20 / steps))
            assert ((name, f"queue ({stage})") in said) == (stage in ("reprec.contrastive", "pcrl.contexts"))
    assert set(plan.configuration("3d_fullres_primus").stages) == {"alice.alignment", "mae.recovery"}
    assert set(plan.configuration("3d_fullres_hybrid").stages) == {"reprec.contrastive", "reprec.generative"}
    assert "sam.embedding" in plan.configuration("3d_fullres").stages
    assert not {"alice.alignment", "sam.embedding"} & set(plan.configuration("2d").stages)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_embeddings_pair_scans_that_are_longer_than_a_patch_in_mm(kind, cpu_plans):
    shapes, spacings, _ = KINDS[kind]
    scan_mm = np.median([np.multiply(shapes[i], spacings[i]) for i in (0, 1)], axis=0)
    plan = cpu_plans[kind]
    for name in ("3d_fullres", "3d_fullres_primus"):
        if name not in plan.pretext.configurations:
            continue
        configuration = plan.configuration(name).for_stage("alice.alignment")
        patch_mm = np.multiply(configuration.patch_size, configuration.spacing_mm)
        assert configuration.anatomy.partners == ("sam" if (scan_mm / patch_mm).max() >= 1.5 else "body_box")
        assert configuration.anatomy.scan_mm == pytest.approx(scan_mm)


def test_memory_target_decides_encoder_width_and_batch(nnunet_folders):
    cpu, small, large = (make_plan("ct", preset) for preset in ("cpu", "8gb", "24gb"))

    def network(plan):
        return plan.nnunet["configurations"]["3d_fullres"]["architecture"]

    assert network(cpu)["arch_kwargs"]["features_per_stage"][0] == 16
    assert network(small)["network_class_name"].endswith("PlainConvUNet")
    assert network(large)["network_class_name"].endswith("ResidualEncoderUNet")
    hybrid = large.nnunet["configurations"]["3d_fullres_hybrid"]["architecture"]["network_class_name"]
    assert hybrid == "nnssl.networks.hybrid.HybridResidualEncoderUNet"
    patches = [np.prod(plan.configuration("3d_fullres").patch_size) for plan in (cpu, small, large)]
    assert patches[0] < patches[1] < patches[2]
    assert large.configuration("3d_fullres_hybrid").transformer.width == 768
    assert small.configuration("3d_fullres_hybrid").transformer.width == 384


def test_every_decision_has_a_reason_and_the_table_shows_it(cpu_plans):
    plan = cpu_plans["thick"]
    assert all(d.reason and d.value for d in plan.pretext.decisions)
    table = "\n".join(format_decisions(plan, width=400))
    for decision in plan.pretext.decisions:
        assert decision.reason in table
    narrow = format_decisions(plan, width=90)
    assert max(map(len, narrow)) < max(map(len, format_decisions(plan, width=400)))


def test_like_takes_over_the_plan_of_the_labelled_data(nnunet_folders):
    make_plan("ct", plans_name="nnUNetPlans")
    like = nnunet_folders / "preprocessed" / "Dataset501_Toy" / "nnUNetPlans.json"
    source = json.loads(like.read_text())
    source.pop("pretext")
    source["dataset_name"] = "Dataset004_Other"
    for name in [n for n in source["configurations"] if n.endswith("hybrid")]:
        source["configurations"].pop(name)
    other = nnunet_folders / "preprocessed" / "Dataset004_Other" / "nnUNetPlans.json"
    other.parent.mkdir()
    other.write_text(json.dumps(source))
    plan = make_plan("iso", like=other)
    assert plan.dataset_name == "Dataset501_Toy"
    assert plan.pretext.like == "Dataset004_Other/nnUNetPlans.json"
    for name in ("2d", "3d_fullres"):
        taken, original = plan.nnunet["configurations"][name], source["configurations"][name]
        for key in ("architecture", "patch_size", "spacing", "batch_size", "normalization_schemes"):
            assert taken[key] == original[key]
        assert taken["data_identifier"] == f"nnsslPlans_{name}"
    assert (
        plan.nnunet["foreground_intensity_properties_per_channel"]
        == source["foreground_intensity_properties_per_channel"]
    )
    with pytest.raises(UserError, match=r"expects 1 channel\(s\), but Dataset501_Toy has 2"):
        make_plan("two_channels", like=other)
    for left, gone in (("3d_fullres", "2d"), ("2d", "3d_fullres")):
        configurations = {key: value for key, value in source["configurations"].items() if not key.startswith(gone)}
        other.write_text(json.dumps({**source, "configurations": configurations}))
        kept = set(make_plan("iso", like=other).pretext.configurations)
        assert left in kept
        assert gone not in kept


def test_a_data_set_of_which_much_cannot_be_used_is_not_planned(nnunet_folders):
    dataset, fingerprint = make_inputs("iso")
    aside = tuple(SetAside(f"bad_{n}", f"bad_{n}_0000.nii.gz", "is constant") for n in range(2))
    with pytest.raises(UserError, match="2 of 14 cases cannot be used"):
        plan_pretraining(dataset, replace(fingerprint, set_aside=aside), resolve_folders(), "cpu")
    assert not list((nnunet_folders / "preprocessed").iterdir())


def test_labelled_fingerprint_of_nnunet_is_not_overwritten(nnunet_folders):
    folder = nnunet_folders / "preprocessed" / "Dataset501_Toy"
    folder.mkdir()
    (folder / "dataset_fingerprint.json").write_text('{"of": "nnU-Net"}')
    dataset, fingerprint = make_inputs("iso")
    labelled = nnunet_folders / "raw" / dataset.name
    (labelled / "labelsTr").mkdir(parents=True)
    plan_pretraining(replace(dataset, folder=labelled), fingerprint, resolve_folders(), "cpu")
    assert (folder / "dataset_fingerprint.json").read_text() == '{"of": "nnU-Net"}'
    # without labels, nnssl writes this file and updates it with the images
    make_plan("iso")
    assert len(json.loads((folder / "dataset_fingerprint.json").read_text())["spacings"]) == len(fingerprint.cases)


def test_overlap_agrees_with_the_crops_that_are_drawn():
    """Compare the planner's estimate with the overlap measured by the geometry of the views."""
    ranges = AffineRange(crop_fraction=(0.2, 1.0), rotation_deg=(0.0, 0.0, 0.0), flip_axes=())
    generators = [torch.Generator().manual_seed(i) for i in range(400)]
    first, second = (draw_affine(generators, ranges, (32, 48, 40), (1.0, 1.0, 1.0)) for _ in range(2))
    assert mean_overlap(0.2, 3) == pytest.approx(float(common_share(first, second).mean()), abs=0.06)


def test_presets():
    assert preset_for_gpu(None)[0] == "8gb"
    assert preset_for_gpu(11.0)[0] == "8gb"
    assert preset_for_gpu(23.7)[0] == "24gb"
    assert preset_for_gpu(139.0)[0] == "80gb"
    assert preset_for_gpu(4.0)[0] == "8gb"
    assert set(PRESETS) == {"cpu", "8gb", "24gb", "40gb", "80gb"}
    with pytest.raises(ArgumentError, match="^preset must be one of cpu, 8gb, 24gb, 40gb, 80gb, got 1tb$"):
        find_preset("1tb")


def test_command_and_planner_know_the_same_presets():
    from nnssl.cli.plan_and_preprocess import PRESET_NAMES

    assert tuple(PRESETS) == PRESET_NAMES


def test_plan_file_is_read_back(nnunet_folders):
    plan = make_plan("two_channels")
    assert read_plan(nnunet_folders / "preprocessed" / "Dataset501_Toy" / "nnsslPlans.json") == plan
