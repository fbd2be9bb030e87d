"""Labels carried over end to end with two channels and thick slices, of which only the second shows the structures."""

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from nnssl.checkpoint import Provenance, write_checkpoint
from nnssl.cli.plan_and_preprocess import main as plan_and_preprocess
from nnssl.data.phantoms import LABELS, write_phantom_dataset
from nnssl.networks.backbone import build_network, planned_configuration
from nnssl.networks.dense import ENCODER_AND_DECODER
from nnssl.propagation.propagate import PropagateSettings, propagate
from tests.trainers.phantom_study import narrow_unet

NAME = "Dataset009_TwoChannels"
SHAPE, SPACING_MM = (12, 24, 20), (5.0, 2.0, 2.2)
ANNOTATED, SAME, MISSING = "phantom_0000", "phantom_0001", "phantom_0002"


def write_channels(
    folder: Path, case: str, image: sitk.Image, structures: np.ndarray, rng: np.random.Generator
) -> None:
    """Write a ramp as the first channel and the structures, with a little noise, as the second."""
    channels = (
        np.broadcast_to(np.linspace(1, 2, SHAPE[2]), SHAPE),
        structures + rng.normal(0, 0.01 * structures.std(), SHAPE),
    )
    for number, values in enumerate(channels):
        volume = sitk.GetImageFromArray(values.astype(np.float32))
        volume.CopyInformation(image)
        sitk.WriteImage(volume, str(folder / f"{case}_{number:04d}.nii.gz"))


def test_the_channel_that_shows_the_structures_carries_the_labels(tmp_path, monkeypatch):
    """One case shows the structures of the annotated case, the other its voxels in random order; the ramp is in all."""
    monkeypatch.chdir(tmp_path)
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    raw = write_phantom_dataset(tmp_path / "raw", NAME, 3, 0, SHAPE, SPACING_MM)
    image = sitk.ReadImage(str(raw / "imagesTr" / f"{ANNOTATED}_0000.nii.gz"))
    structures = sitk.GetArrayFromImage(image).astype(np.float64)
    rng = np.random.default_rng(0)
    for case in (ANNOTATED, SAME):
        write_channels(raw / "imagesTr", case, image, structures, rng)
    write_channels(raw / "imagesTr", MISSING, image, rng.permutation(structures.ravel()).reshape(SHAPE), rng)
    content = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "T1", "1": "T2"}}))
    arguments = ["-d", "9", "--preset", "cpu", "--processes", "1", "-c", "3d_fullres"]
    assert plan_and_preprocess([*arguments, "--spacing", "5", "2.5", "2.5"]) == 0
    plan = json.loads((tmp_path / "preprocessed" / NAME / "nnsslPlans.json").read_text())
    narrow_unet(plan["configurations"]["3d_fullres"])
    network = build_network(planned_configuration(plan, "3d_fullres")["architecture"], 2, 2, seed=0)
    provenance = Provenance(
        nnssl_version="0", method="regions", stage="regions.prototypes", dataset_name=NAME, plans_name="nnsslPlans",
        configuration="3d_fullres", plans=plan, dataset_json={}, settings={"features": "pyramid"}, seed=0, step=1,
        total_steps=1, finished=True, pretrained=ENCODER_AND_DECODER, init=None,
    )  # fmt: skip
    write_checkpoint(Path("weights.pth"), {"network_weights": network.state_dict()}, provenance, {})

    settings = PropagateSettings(prototypes=64, position_weight=0.0, device="cpu")
    drafts = propagate(9, [ANNOTATED], "weights.pth", "drafts", settings)
    assert sorted(draft.case for draft in drafts) == [SAME, MISSING]
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "labelsTr" / f"{ANNOTATED}.nii.gz")))
    scores = {}
    for case in (SAME, MISSING):
        found = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "drafts" / f"{case}.nii.gz")))
        scores[case] = np.mean([dice(found == label, expected == label) for label in LABELS.values() if label])
    assert scores[SAME] > 0.5 > 0.2 > scores[MISSING]


def dice(ours: np.ndarray, theirs: np.ndarray) -> float:
    return 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
