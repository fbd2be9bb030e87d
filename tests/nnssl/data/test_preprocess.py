import gzip
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnssl.data import jobs, preprocess
from nnssl.data.case_store import CaseStore, complete_cases, read_properties
from nnssl.data.contents import digest_files
from nnssl.data.preprocess import Job, draw_foreground, preprocess_dataset, preprocess_volume
from nnssl.data.raw import read_dataset
from nnssl.data.recipe import Recipe, digest_case, find_sources, plan_targets
from nnssl.errors import UserError
from nnssl.log import lines_to
from nnssl.paths import resolve_folders
from nnssl.plan import Plan, Pretext, PretextConfiguration
from planners.fingerprint import extract_fingerprint
from tests.waiting import has_ended, wait_until

NAME = "Dataset501_Phantoms"
RESAMPLING = "resample_data_or_seg_to_shape"
STATISTICS = {
    "mean": 90.0,
    "median": 80.0,
    "std": 60.0,
    "min": -30.0,
    "max": 400.0,
    "percentile_00_5": -20.0,
    "percentile_99_5": 260.0,
}


def silent(line: str) -> None:
    """Say nothing."""


def section(case_folder, patch_size, spacing_mm) -> PretextConfiguration:
    return PretextConfiguration(
        case_folder=case_folder,
        patch_size=patch_size,
        spacing_mm=spacing_mm,
        thick_axis=None,
        rotation_deg=(180.0,),
        flip_axes=(),
        intensity_views=(),
        transformer=None,
        has_feature_maps=True,
        stages={},
    )


def make_plan(
    spacings=None,
    folders=None,
    schemes=("ZScoreNormalization",),
    masks=(False,),
    transpose=(0, 1, 2),
    patch_size=(8, 16, 16),
) -> Plan:
    """A plan with what preprocessing reads of it; configurations are named by ``spacings``."""
    spacings = spacings or {"3d_fullres": [3.0, 0.8, 0.9]}
    folders = folders or {}
    configurations = {
        name: {
            "data_identifier": f"nnsslPlans_{name}",
            "preprocessor_name": "DefaultPreprocessor",
            "patch_size": list(patch_size[-len(spacing) :]),
            "spacing": list(spacing),
            "normalization_schemes": list(schemes),
            "use_mask_for_norm": list(masks),
            "resampling_fn_data": RESAMPLING,
            "resampling_fn_seg": RESAMPLING,
            "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
            "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
            "architecture": {},
        }
        for name, spacing in spacings.items()
    }
    nnunet = {
        "dataset_name": NAME,
        "plans_name": "nnsslPlans",
        "transpose_forward": list(transpose),
        "transpose_backward": list(np.argsort(transpose)),
        "image_reader_writer": "SimpleITKIO",
        "configurations": configurations,
        "foreground_intensity_properties_per_channel": {str(channel): STATISTICS for channel in range(len(schemes))},
    }
    sections = {
        name: section(folders.get(name, f"cases_{len(spacing)}d"), tuple(patch_size[-len(spacing) :]), tuple(spacing))
        for name, spacing in spacings.items()
    }
    pretext = Pretext(1, "0", "cpu", 1.0, None, ("MRI",), 3, sections, ())
    return Plan(nnunet, pretext)


def make_phantom(shape, seed, channels=1) -> np.ndarray:
    """An off-centre ellipsoid with texture and a hole of zeros, in a margin of zeros."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, extent) for extent in shape], indexing="ij"))
    centre = np.array([0.1, -0.2, 0.15]).reshape(3, 1, 1, 1)
    radius = np.sqrt(((grid - centre) ** 2 / np.array([0.7, 0.5, 0.6]).reshape(3, 1, 1, 1) ** 2).sum(axis=0))
    volume = np.stack([100 + 20 * channel + 30 * grid[0] + rng.normal(0, 8, shape) for channel in range(channels)])
    volume[:, (radius > 1) | (radius < 0.25)] = 0
    return volume.astype(np.float32)


def write_image(path, volume, spacing_mm) -> None:
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(spacing_mm[::-1])
    sitk.WriteImage(image, str(path))


class Scene:
    """A raw data set of phantoms, and preprocessing it."""

    def __init__(self, cases: int, channels: int = 1) -> None:
        self.folders = resolve_folders()
        self.images = self.folders.raw / NAME / "imagesTr"
        self.images.mkdir(parents=True)
        self.channels = channels
        for number in range(cases):
            self.write_case(number)
        self.plan = make_plan()
        self.measure()

    def write_case(self, number: int, seed: int = 0) -> None:
        volume = make_phantom((9 + number % 3, 25, 31 - number % 5), number + 100 * seed, self.channels)
        for channel in range(self.channels):
            path = self.images / f"case{number:02d}_{channel:04d}.nii.gz"
            write_image(path, volume[channel], (2.5 + number % 2, 0.9, 1.0))

    def measure(self) -> None:
        self.dataset = read_dataset(501, self.folders, ("MRI",) * self.channels)
        self.fingerprint = extract_fingerprint(self.dataset, 0)

    def run(self, plan=None, configurations=None, processes=1, dask=None, say=silent, restart=False):
        with lines_to(say):
            return preprocess_dataset(
                self.dataset,
                plan or self.plan,
                self.fingerprint.usable,
                self.folders,
                configurations,
                processes,
                dask,
                restart,
            )

    def folder(self, name="cases_3d") -> Path:
        return self.folders.preprocessed / NAME / name


@pytest.fixture
def scene(nnunet_folders) -> Scene:
    return Scene(3)


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


# voxels


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize(
    ("schemes", "masks"),
    [
        (("ZScoreNormalization",), (False,)),
        (("ZScoreNormalization", "CTNormalization"), (True, False)),
        (("CTNormalization", "RescaleTo01Normalization"), (False, False)),
        (("NoNormalization", "ZScoreNormalization"), (False, True)),
    ],
)
@pytest.mark.parametrize("spacing", [[4.0, 0.7, 1.1], [1.0, 1.2, 0.8], [0.7, 1.3]])
def test_voxels_are_those_of_nnunet(transpose, schemes, masks, spacing):
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plan = make_plan({"one": spacing}, schemes=schemes, masks=masks, transpose=transpose)
    volume = make_phantom((12, 29, 23), 5, len(schemes))
    volume[0, 3, 4, 5] = 1000.0
    before = volume.copy()
    spacing_mm = (3.0, 0.9, 1.4)
    manager = PlansManager(plan.nnunet)
    expected, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        volume, None, {"spacing": spacing_mm}, manager, manager.get_configuration("one"), {}
    )
    recipe = plan_targets(plan, Path(), None)[0].recipe
    inside = volume[0] > 0
    result, foreground, learnable, new_spacing_mm = preprocess_volume(volume, inside, ~inside, spacing_mm, recipe)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(volume, before)
    slices = [spacing_mm[transpose[0]]] if len(spacing) == 2 else []
    assert new_spacing_mm == (*slices, *spacing)
    assert foreground.shape == properties["shape_after_cropping_and_before_resampling"]
    cropped = inside.transpose(transpose)[tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])]
    np.testing.assert_array_equal(foreground, cropped)
    np.testing.assert_array_equal(learnable, ~cropped)


def test_a_volume_of_zeros_and_other_channels_are_refused():
    recipe = plan_targets(make_plan(), Path(), None)[0].recipe
    empty = np.zeros((1, 3, 4, 5), np.float32)
    with pytest.raises(ValueError, match="only zeros"):
        preprocess_volume(empty, empty[0] > 0, empty[0] > 0, (1.0, 1.0, 1.0), recipe)
    with pytest.raises(ValueError, match="has 2 channels, but the plan has 1"):
        preprocess_volume(np.ones((2, 3, 4, 5), np.float32), empty[0] > 0, empty[0] > 0, (1.0, 1.0, 1.0), recipe)


def test_stored_voxels_are_those_of_nnunet_rounded_to_half(nnunet_folders):
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    scene = Scene(2, channels=2)
    plan = make_plan(schemes=("ZScoreNormalization", "CTNormalization"), masks=(True, False), transpose=(1, 0, 2))
    assert scene.run(plan).done == 2
    manager = PlansManager(plan.nnunet)
    for case in scene.dataset.cases:
        expected, _, _ = DefaultPreprocessor(verbose=False).run_case(
            [str(image) for image in case.images], None, manager, manager.get_configuration("3d_fullres"), {}
        )
        stored = CaseStore(scene.folder()).case(case.name)
        assert stored.shape == expected.shape[1:]
        assert stored.spacing_mm == (3.0, 0.8, 0.9)
        np.testing.assert_allclose(stored.read_box((0, 0, 0), stored.shape), expected, rtol=2**-10, atol=1e-5)


# foreground coordinates


def test_foreground_points_lie_in_the_body_of_the_resampled_volume():
    inside = np.zeros((6, 20, 15), bool)
    inside[2:4, 5:17, 3] = True
    new_shape = (3, 50, 45)
    points = draw_foreground(inside, new_shape, 7)
    assert points.shape == (24, 3)
    assert set(points[:, 0]) == {1}
    assert points[:, 1].min() >= 12
    assert points[:, 1].max() <= 42
    assert set(points[:, 2]) == {9, 10, 11}  # one thick voxel becomes three


def test_foreground_points_are_spread_over_the_whole_body_and_reach_every_voxel():
    inside = np.zeros((10, 20, 30), bool)
    inside[:, :, 10:] = True
    points = draw_foreground(inside, inside.shape, 7)
    assert len(points) == len(np.unique(points, axis=0)) == inside.sum() == 4000
    points = draw_foreground(np.ones((20, 30, 40), bool), (20, 30, 40), 7)
    assert points.shape == (4000, 3)
    np.testing.assert_allclose(points.mean(axis=0), (9.5, 14.5, 19.5), rtol=0.05)
    assert points.min() == 0
    assert points.max(axis=0).tolist() == [19, 29, 39]
    first, second = points[:200].mean(axis=0), points[200:400].mean(axis=0)
    np.testing.assert_allclose(first, second, rtol=0.25)  # in random order, so the first ones are as good as any


def test_foreground_points_depend_on_the_seed_alone():
    inside = np.ones((20, 30, 40), bool)
    np.testing.assert_array_equal(draw_foreground(inside, (9, 9, 9), 1), draw_foreground(inside, (9, 9, 9), 1))
    assert not np.array_equal(draw_foreground(inside, (9, 9, 9), 1), draw_foreground(inside, (9, 9, 9), 2))
    assert draw_foreground(np.zeros((2, 2, 2), bool), (4, 4, 4), 1).shape == (0, 3)


def test_stored_foreground_is_body(scene):
    scene.run()
    for name in CaseStore(scene.folder()).names:
        case = CaseStore(scene.folder()).case(name)
        volume = case.read_box((0, 0, 0), case.shape)[0]
        assert np.mean(volume[tuple(case.foreground_vox.T)] > 0) > 0.85
        assert np.mean(volume > 0) < 0.6
        assert case.properties.foreground_share == pytest.approx(np.mean(volume > 0), abs=0.1)


# folders and recipes


def test_configurations_that_share_a_folder_are_preprocessed_once(scene):
    plan = make_plan(
        {"2d": [0.8, 0.9], "3d_fullres": [3.0, 0.8, 0.9], "3d_other": [3.0, 0.8, 0.9], "2d_thin": [0.5, 0.5]},
        {"2d": "shared", "3d_fullres": "shared", "3d_other": "shared", "2d_thin": "thin"},
    )
    report = scene.run(plan)
    assert report.folders == (scene.folder("shared"), scene.folder("thin"))
    assert (report.done, report.skipped) == (3, 0)
    for name in ("case00", "case01"):
        assert read_properties(scene.folder("shared"), name).spacing_mm == (3.0, 0.8, 0.9)
        thickness = 2.5 + int(name[-1]) % 2
        assert read_properties(scene.folder("thin"), name).spacing_mm == (thickness, 0.5, 0.5)
    # the 2D configuration alone means the same shared folder
    report = scene.run(plan, configurations=["2d"])
    assert (report.folders, report.done, report.skipped) == ((scene.folder("shared"),), 0, 3)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"spacing": [3.0, 0.8, 1.0]}, "spacing_mm"), ({"use_mask_for_norm": [True]}, "use_mask_for_norm")],
)
def test_configurations_that_disagree_cannot_share_a_folder(scene, change, word):
    plan = make_plan({"2d": [0.8, 0.9], "3d_fullres": [3.0, 0.8, 0.9]}, {"2d": "s", "3d_fullres": "s"})
    plan.nnunet["configurations"]["3d_fullres"].update(change)
    with pytest.raises(UserError, match=f"share s differ in {word};"):
        scene.run(plan)


def test_plans_that_cannot_be_followed_are_refused(scene):
    with pytest.raises(UserError, match="no configuration '3d_lowres'"):
        scene.run(configurations=["3d_lowres"])
    plan = make_plan()
    plan.nnunet["configurations"]["3d_fullres"]["preprocessor_name"] = "OwnPreprocessor"
    with pytest.raises(UserError, match="must be DefaultPreprocessor, .* got OwnPreprocessor"):
        scene.run(plan)
    for folder in ("nnsslPlans_3d_fullres", "../elsewhere"):
        with pytest.raises(UserError, match="case_folder"):
            scene.run(make_plan(folders={"3d_fullres": folder}))


def test_statistics_matter_only_to_schemes_that_read_them():
    for scheme, matters in (("ZScoreNormalization", False), ("CTNormalization", True), ("UnknownScheme", True)):
        recipes = []
        for mean in (90.0, 91.0):
            plan = make_plan(schemes=(scheme,))
            plan.nnunet["foreground_intensity_properties_per_channel"] = {"0": {**STATISTICS, "mean": mean}}
            recipes.append(plan_targets(plan, Path(), None)[0].recipe)
        assert (recipes[0] != recipes[1]) == matters


@pytest.mark.parametrize(
    "change",
    [
        {"transpose_forward": (1, 0, 2)},
        {"spacing_mm": (3.0, 0.8, 0.91)},
        {"normalization_schemes": ("NoNormalization",)},
        {"use_mask_for_norm": (True,)},
        {"intensity_statistics": (STATISTICS,)},
        {"resampling": "resample_torch_fornnunet"},
        {"resampling_settings": {"order": 1}},
    ],
)
def test_the_digest_covers_the_recipe(scene, change):
    recipe = plan_targets(make_plan(), Path(), None)[0].recipe
    assert set(Recipe.__dataclass_fields__) == set(recipe.__dict__)
    sources = find_sources(scene.dataset.cases[0], {})
    assert digest_case(recipe, "SimpleITKIO", sources) == digest_case(replace(recipe), "SimpleITKIO", sources)
    assert digest_case(recipe, "SimpleITKIO", sources) != digest_case(replace(recipe, **change), "SimpleITKIO", sources)
    assert digest_case(recipe, "SimpleITKIO", sources) != digest_case(recipe, "NibabelIO", sources)


# running again


def test_complete_cases_are_skipped(scene):
    assert (scene.run().done, scene.run().skipped) == (3, 3)
    before = {path.name: path.stat().st_mtime_ns for path in scene.folder().iterdir()}
    lines = []
    report = scene.run(say=lines.append)
    assert (report.done, report.skipped, report.set_aside) == (0, 3, ())
    assert lines == [f"preprocessing {NAME}: 0 cases to preprocess, 3 already done"]
    assert {path.name: path.stat().st_mtime_ns for path in scene.folder().iterdir()} == before


def test_another_patch_outdates_nothing_and_another_spacing_everything(scene):
    scene.run()
    assert scene.run(make_plan(patch_size=(6, 20, 20))).skipped == 3
    assert scene.run(make_plan({"3d_fullres": [3.0, 0.8, 1.0]})).done == 3


def test_a_changed_image_is_preprocessed_again(scene):
    scene.run()
    before = read_all(scene.folder())
    scene.write_case(1, seed=1)
    report = scene.run()
    assert (report.done, report.skipped) == (1, 2)
    after = read_all(scene.folder())
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"case01.b2nd", "case01.json"}  # its outline is the same
    case = scene.dataset.cases[1]
    digests = digest_files(case.images, NAME, scene.folders)
    assert find_sources(case, digests) == read_properties(scene.folder(), "case01").sources


def test_a_file_that_was_only_touched_is_read_but_not_preprocessed_again(scene):
    scene.run()
    os.utime(scene.images / "case02_0000.nii.gz", ns=(0, 0))
    assert (scene.run().done, scene.run().skipped) == (0, 3)


def test_a_replaced_image_of_the_same_size_and_time_is_preprocessed_again(scene):
    image = scene.images / "case02_0000.nii.gz"
    content = bytearray(gzip.decompress(image.read_bytes()))
    image.write_bytes(gzip.compress(content, 0, mtime=0))
    scene.run()
    before = image.stat()
    content[-2000:] = np.full(500, 3, np.float32).tobytes()
    image.write_bytes(gzip.compress(content, 0, mtime=0))
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (image.stat().st_size, image.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert (scene.run().done, scene.run().skipped) == (1, 3)


def test_cases_of_earlier_versions_are_compared_by_size_and_time(scene):
    scene.run()
    for name in ("case00", "case01", "case02"):  # as such a version wrote it
        path = scene.folder() / f"{name}.json"
        properties = read_properties(scene.folder(), name)
        sources = tuple(replace(source, digest="") for source in properties.sources)
        digest = digest_case(
            plan_targets(scene.plan, scene.folder().parent, None)[0].recipe, scene.dataset.reader, sources
        )
        content = asdict(replace(properties, sources=sources, digest=digest))
        for source in content["sources"]:
            del source["digest"]
        path.write_text(json.dumps(content))
    assert scene.run().skipped == 3
    os.utime(scene.images / "case02_0000.nii.gz", ns=(0, 0))
    assert scene.run().done == 1


def test_outdated_cases_leave_before_the_first_new_one_is_made(scene, monkeypatch):
    scene.run()

    def stop(job: Job):
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess, "preprocess_case", stop)
    with pytest.raises(KeyboardInterrupt):
        scene.run(make_plan({"3d_fullres": [3.0, 0.8, 1.0]}))
    assert complete_cases(scene.folder()) == []


def test_half_written_and_foreign_cases_and_leftovers_are_dealt_with(scene):
    scene.run()
    whole = read_all(scene.folder())
    (scene.folder() / "case02.json").unlink()
    (scene.folder() / "case00.json").write_text('{"schema_version": 0}')
    (scene.folder() / ".case02.json.4242.tmp").write_text("{")
    for ending in (".json", ".b2nd", "_foreground.npy"):
        (scene.folder() / f"gone{ending}").write_bytes(whole[f"case01{ending}"])
    lines = []
    report = scene.run(say=lines.append)
    assert (report.done, report.skipped) == (2, 1)
    assert read_all(scene.folder()) == whole
    assert any("deleting 1 cases that the data set no longer has (gone)" in line for line in lines)


def test_restart_makes_everything_again(scene):
    scene.run()
    whole = read_all(scene.folder())
    assert scene.run(restart=True).done == 3
    assert read_all(scene.folder()) == whole


def test_processes_change_nothing(scene):
    scene.run()
    whole = read_all(scene.folder())
    assert scene.run(restart=True, processes=2).done == 3
    assert read_all(scene.folder()) == whole


# what goes wrong


def test_a_broken_image_is_set_aside_with_its_reason(nnunet_folders):
    scene = Scene(11)
    scene.run()
    broken = scene.images / "case04_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:300])
    lines = []
    report = scene.run(say=lines.append)
    assert (report.done, report.skipped) == (0, 10)
    (entry,) = report.set_aside
    assert (entry.case, entry.file) == ("case04", str(broken))
    assert "truncated" in entry.reason
    assert any(line.startswith("set aside case04: ") for line in lines)
    assert "case04" not in complete_cases(scene.folder())
    (scene.images / "case07_0000.nii.gz").unlink()
    with pytest.raises(UserError, match=r"2 of 11 cases cannot be preprocessed \(first: case04"):
        scene.run()


def test_a_case_that_nnunet_cannot_take_is_set_aside(scene):
    assert scene.dataset.cases[0].name == "case00"
    volume = make_phantom((9, 25, 31), 0)
    volume *= 1e4
    write_image(scene.images / "case00_0000.nii.gz", volume[0], (2.5, 0.9, 1.0))
    lines = []
    with pytest.raises(UserError, match="1 of 3 cases"):
        scene.run(make_plan(schemes=("NoNormalization",)), say=lines.append)
    assert any("float16 cannot represent" in line for line in lines)
    assert complete_cases(scene.folder()) == ["case01", "case02"]


def test_lack_of_memory_is_said(scene, monkeypatch):
    def fill(*arguments):
        raise MemoryError

    monkeypatch.setattr(preprocess, "preprocess_volume", fill)
    with pytest.raises(UserError, match="case00_0000.nii.gz does not fit into memory; use fewer processes"):
        scene.run()


@pytest.mark.parametrize("error", [MemoryError(), IndexError("odd"), np.linalg.LinAlgError("singular")])
def test_a_case_that_cannot_be_done_does_not_end_the_others(error, nnunet_folders, monkeypatch):
    scene = Scene(11)
    real = preprocess.preprocess_volume
    errors = iter([None, error])

    def fail_once(*arguments):
        now = next(errors, None)
        if now is not None:
            raise now
        return real(*arguments)

    monkeypatch.setattr(preprocess, "preprocess_volume", fail_once)
    report = scene.run()
    assert report.done == 10
    (entry,) = report.set_aside
    assert entry.case == "case01"
    assert ("does not fit into memory" in entry.reason) == isinstance(error, MemoryError)
    assert str(error) in entry.reason
    assert len(complete_cases(scene.folder())) == 10


# numbers


def cropped(volume):
    """The box of voxels that are not 0."""
    places = np.argwhere(volume.any(axis=0))
    box = tuple(slice(low, high + 1) for low, high in zip(places.min(axis=0), places.max(axis=0), strict=True))
    return volume[(slice(None), *box)]


def expected_zscore(volume):
    """Standardisation of the box of voxels that are not 0, in extended precision."""
    values = cropped(volume).astype(np.longdouble)
    return ((values - values.mean()) / values.std()).astype(np.float64)


def normalised(volume, scheme="ZScoreNormalization", statistics=None):
    """Normalise a volume at its own spacing, so that nothing is resampled."""
    recipe = Recipe(
        (0, 1, 2), (2.5, 0.9, 1.0), (scheme,), (False,), (statistics or {},), "resample_data_or_seg_to_shape",
        {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    )  # fmt: skip
    all_voxels = np.ones(volume.shape[1:], bool)
    return preprocess.preprocess_volume(volume, all_voxels, all_voxels, (2.5, 0.9, 1.0), recipe).volume


@pytest.mark.parametrize("factor", [1e-5, 1.0, 1e11, 1e15, 1e19, -1e30])
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_standardisation_of_extreme_intensities(factor, offset):
    """In float32, squares of 1e19 and more are infinite, and the mean of values near 1e6 is inexact."""
    volume = ((make_phantom((9, 25, 31), 3) + offset) * factor).astype(np.float32)
    with np.errstate(all="raise", under="ignore"):
        found = normalised(volume)
    np.testing.assert_allclose(found, expected_zscore(volume), atol=1e-3)


@pytest.mark.parametrize("factor", [1.0, 1e19, 1e35])
def test_rescaling_of_extreme_intensities(factor):
    volume = make_phantom((9, 25, 31), 3).astype(np.float64) * factor
    volume -= volume.max() / 2
    found = normalised(volume.astype(np.float32), "RescaleTo01Normalization")
    np.testing.assert_allclose(found, (volume - volume.min()) / (volume.max() - volume.min()), atol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "change", "reason"),
    [
        ("ZScoreNormalization", lambda volume: volume * 1e-18, "are all alike: nearly all lie within"),
        ("ZScoreNormalization", "hot", "channel 0 after ZScoreNormalization has voxels that are all alike"),
        ("RescaleTo01Normalization", "hot", "are all alike"),
        ("CTNormalization", lambda volume: volume + 1e5, "are all alike: nearly all lie within 0;"),
        ("NoNormalization", lambda volume: volume * 1e-9, "are all alike"),
        ("NoNormalization", lambda volume: volume * 1e6, "float16 cannot represent"),
    ],
)
def test_a_case_whose_normalised_voxels_are_alike_is_set_aside(scheme, change, reason, scene):
    volume = make_phantom((9, 25, 31), 3).astype(np.float32)
    if change == "hot":
        volume[0, 4, 12, 15] = 1e30
    else:
        volume = change(volume)
    statistics = {"mean": 300.0, "std": 100.0, "percentile_00_5": 0.0, "percentile_99_5": 900.0}
    (target,) = plan_targets(scene.plan, scene.folders.preprocessed / NAME, ["3d_fullres"])
    recipe = replace(target.recipe, normalization_schemes=(scheme,), intensity_statistics=(statistics,))
    write_image(scene.images / "case00_0000.nii.gz", volume[0], (2.5, 0.9, 1.0))
    case = next(case for case in scene.dataset.cases if case.name == "case00")
    target.folder.mkdir(parents=True)
    entry = preprocess.preprocess_case(preprocess.Job(case, scene.dataset.reader, (replace(target, recipe=recipe),)))
    assert (entry.case, entry.file) == ("case00", str(case.images[0]))
    assert reason in entry.reason
    assert complete_cases(target.folder) == []


def test_an_image_of_few_voxels_is_kept(scene):
    """Nearly all voxels are 0, before as after, and standardisation changes that as little as nnU-Net's."""
    volume = np.zeros((1, 9, 25, 31), np.float32)
    volume[0, 0, 0, 0], volume[0, -1, -1, -1], volume[0, 4, 5, 6] = 3, 7, 5
    found = normalised(volume)
    np.testing.assert_allclose(found, expected_zscore(volume), atol=1e-4)


def end_or_preprocess(job):
    """Stands for a reader that ends the process on one image."""
    if job.case.name == "case01":
        os.abort()
    return preprocess.preprocess_case(job)


def test_a_case_that_ends_its_process_is_set_aside(nnunet_folders, monkeypatch):
    scene = Scene(11)
    outcomes = jobs.run_jobs
    monkeypatch.setattr(preprocess, "run_jobs", lambda work, *others: outcomes(end_or_preprocess, *others))
    report = scene.run(processes=2)
    assert report.done == 10
    (entry,) = report.set_aside
    assert (entry.case, entry.reason) == ("case01", "ended the process that worked on it by signal 6 (SIGABRT)")
    assert "memory" not in entry.reason
    assert len(complete_cases(scene.folder())) == 10


def test_a_name_of_240_bytes_is_stored(nnunet_folders):
    """Temporary names and those of the files of a case are longer than that of the image, which has 252 bytes."""
    scene = Scene(2)
    long = "ä" * 100 + "n" * 40
    (scene.images / "case00_0000.nii.gz").rename(scene.images / f"{long}_0000.nii.gz")
    scene.measure()
    assert scene.run().done == 2
    assert complete_cases(scene.folder()) == ["case01", long]
    assert max(len(os.fsencode(path.name)) for path in scene.folder().iterdir()) == 255
    assert scene.run().skipped == 2


def test_progress_is_said_in_lines_where_there_is_no_terminal(scene, monkeypatch):
    monkeypatch.setattr(jobs, "SECONDS_PER_LINE", 0.0)
    lines = []
    scene.run(say=lines.append)
    assert lines[1:] == [f"preprocessed {done} of 3 cases" for done in (1, 2, 3)]


# killed


def run_killed(scene, moment: str, count: int) -> int:
    """Preprocess in a forked process that kills itself at the n-th call of a function of ``os``; return its signal."""
    child = os.fork()
    if child == 0:
        call, calls = getattr(os, moment), []

        def die(*arguments):
            calls.append(arguments)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        setattr(os, moment, die)
        try:
            scene.run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_at_any_moment_and_run_again_ends_alike(nnunet_folders, moment):
    scene = Scene(2)
    scene.run()
    whole = read_all(scene.folder())
    for count in range(1, 9):
        for path in scene.folder().rglob("*.*"):
            path.unlink()
        assert run_killed(scene, moment, count) == -signal.SIGKILL
        left = read_all(scene.folder())
        assert any(name.endswith(".tmp") for name in left)
        complete = complete_cases(scene.folder())
        assert len(complete) == (count - 1) // 4
        for name in complete:
            for file in (f"{name}.json", f"{name}.b2nd", f"learnable/{name}.b2nd", f"{name}_foreground.npy"):
                assert left[file] == whole[file]
        report = scene.run()
        assert (report.done, report.skipped) == (2 - len(complete), len(complete))
        assert read_all(scene.folder()) == whole


KILLED_RUN = """
import os, sys, threading
sys.path.insert(0, {root!r})
from tests.nnssl.data.test_preprocess import Scene, make_plan
from nnssl.data.case_store import complete_cases
from nnssl.paths import resolve_folders

scene = Scene.__new__(Scene)
scene.folders, scene.channels, scene.plan = resolve_folders(), 1, make_plan()
replace = os.replace

def replace_or_wait(*arguments):
    # the processes import this module too: none finishes all cases before it is killed, however busy the machine is
    if len(complete_cases(scene.folder())) >= 3:
        threading.Event().wait()
    replace(*arguments)

os.replace = replace_or_wait

if __name__ == "__main__":
    scene.measure()
    scene.run(processes=2)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes as Linux lists them")
def test_killed_with_its_processes_running_and_run_again_ends_alike(nnunet_folders):
    scene = Scene(24)
    script = nnunet_folders / "run.py"
    script.write_text(KILLED_RUN.format(root=str(Path(__file__).parents[3])))
    run = subprocess.Popen([sys.executable, str(script)])
    try:
        wait_until(lambda: len(complete_cases(scene.folder())) >= 3 or run.poll() is not None)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    finally:
        run.kill()
    assert run.wait() == -signal.SIGKILL
    assert len(children) >= 2
    wait_until(lambda: all(has_ended(int(child)) for child in children))
    complete = len(complete_cases(scene.folder()))
    assert 3 <= complete < 24
    report = scene.run()
    assert (report.done, report.skipped) == (24 - complete, complete)
    again = read_all(scene.folder())
    scene.run(restart=True)
    assert read_all(scene.folder()) == again
