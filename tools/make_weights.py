"""Pretrain on ACDC, BTCV and hippocampus, compare with scratch, and write folders for a model hub.

The data of ACDC and BTCV may be used for research only, so weights that were trained on them are not shipped, but made by whoever
has the data. The data sets must be in ``nnUNet_raw`` under the names below::

    python -m tools.make_weights hippocampus acdc btcv --output weights

Every fifth patient is held out: the pretraining does not see them, and the Dice on the model card is theirs. It is that of one
network, fine-tuned on five other cases (of ACDC: frames). If the command is interrupted, run it again.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nnssl
from nnssl.cli.export import result_row
from nnssl.data.raw import find_dataset
from nnssl.files import write_json
from nnssl.paths import Folders, resolve_folders
from trainers.finetuning.finetune import finetune
from trainers.finetuning.result import FILE_NAME
from trainers.finetuning.settings import FinetuneSettings
from trainers.pretraining.pretrain import pretrain
from trainers.pretraining.settings import PretrainSettings

HELD_OUT_EVERY = 5
LABELS = 5


@dataclass(frozen=True)
class HubRecipe:
    """How the weights of a data set are made.

    Attributes:
        labelled: Data set with labels.
        unlabelled: Data set of links to its images that is pretrained on.
        licence: Licence of the weights, which follows that of the data.
        spacing_mm: Spacing (z, y, x) of the plan.
        configuration: Configuration that is pretrained and fine-tuned.
        method: Method for a network of nnU-Net's own that ``documentation/results`` favours on this data set, or Pix2Rep v2 where
            no method is ahead. RepRec, ahead on BTCV, pretrains the hybrid network, which needs nnssl wherever it is used.
        patient_of: Patient of a case by its name.
    """

    labelled: str
    unlabelled: str
    licence: str
    spacing_mm: tuple[float, float, float]
    configuration: str
    method: str
    patient_of: Callable[[str], str]


RECIPES = {
    "hippocampus": HubRecipe(
        "Dataset004_Hippocampus",
        "Dataset904_HippocampusUnlabelled",
        "CC-BY-SA-4.0",
        (2.0, 2.0, 2.0),
        "3d_fullres",
        "pix2rep_v2",
        lambda case: str((int(case.rpartition("_")[2]) + 1) // 2),  # both sides of a person
    ),
    "acdc": HubRecipe(
        "Dataset027_ACDC",
        "Dataset927_ACDCUnlabelled",
        "LicenseRef-ACDC-research-non-commercial",
        (10.0, 4.0, 4.0),
        "2d",
        "pix2rep_v2",
        lambda case: case.partition("_")[0],
    ),
    "btcv": HubRecipe(
        "Dataset017_BTCV",
        "Dataset917_BTCVUnlabelled",
        "LicenseRef-BTCV-registration-required",
        (8.0, 4.0, 4.0),
        "2d",
        "simclr",
        lambda case: case,
    ),
}


def split(cases: list[str], patient_of: Callable[[str], str]) -> tuple[list[str], list[str]]:
    """Return the cases to pretrain on and the held-out ones, of other patients."""
    patients = list(dict.fromkeys(map(patient_of, sorted(cases))))
    held_out = set(patients[::HELD_OUT_EVERY])
    return (
        [case for case in sorted(cases) if patient_of(case) not in held_out],
        [case for case in sorted(cases) if patient_of(case) in held_out],
    )


def link_images(recipe: HubRecipe, cases: list[str], folders: Folders) -> None:
    """Make the data set without labels, of links to the images of the cases."""
    source, target = (folders.raw / name / "imagesTr" for name in (recipe.labelled, recipe.unlabelled))
    target.mkdir(parents=True, exist_ok=True)
    for link in target.iterdir():  # of an earlier choice of cases
        if link.name.removesuffix("_0000.nii.gz") not in cases:
            link.unlink()
    for case in cases:
        link = target / f"{case}_0000.nii.gz"
        if not link.is_symlink():
            link.symlink_to((source / link.name).resolve())
    channel = "CT" if "BTCV" in recipe.labelled else "MRI"
    description = {"channel_names": {"0": channel}, "labels": {}, "numTraining": len(cases), "file_ending": ".nii.gz"}
    write_json(target.parent / "dataset.json", description)


def make(name: str, output: Path, args: argparse.Namespace) -> Path:
    """Pretrain, fine-tune and export; return the folder for the hub."""
    recipe, folders = RECIPES[name], resolve_folders()
    find_dataset(recipe.labelled, folders)
    images = sorted((folders.raw / recipe.labelled / "imagesTr").glob("*_0000.nii.gz"))
    trained, held_out = split([path.name.removesuffix("_0000.nii.gz") for path in images], recipe.patient_of)
    link_images(recipe, trained, folders)
    plan = nnssl.PlanSettings(configurations=[recipe.configuration], preset="cpu", spacing_mm=recipe.spacing_mm)
    nnssl.plan_and_preprocess(recipe.unlabelled, plan, folders)
    lengths = PretrainSettings(recipe.configuration, epochs=args.epochs, iterations_per_epoch=args.iterations_per_epoch)
    weights = pretrain(recipe.method, recipe.unlabelled, lengths, folders)
    output.mkdir(parents=True, exist_ok=True)
    lists = {"train": trained[:: max(1, len(trained) // LABELS)][:LABELS], "test": held_out}
    for which, cases in lists.items():
        (output / f"{name}_{which}.txt").write_text("\n".join(cases) + "\n")
    settings = FinetuneSettings(
        scratch=True,
        cases=output / f"{name}_train.txt",
        test_cases=output / f"{name}_test.txt",
        epochs=args.finetune_epochs,
        iterations_per_epoch=100,
        batch_size=2,
        optimizer="adam",
        learning_rate=0.003,
        mirroring=False,
    )
    arms = finetune(recipe.labelled, weights, settings, folders)
    rows = [result_row(Path(arm.model_folder) / FILE_NAME) for arm in arms]
    form = nnssl.ExportSettings(form="hub", out=output / name, licence=recipe.licence, results=rows)
    return nnssl.export(weights, form, folders).path


def main() -> None:
    """Make the weights of the named data sets that do not exist yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", choices=RECIPES, help="data sets whose weights to make")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to write to")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of pretraining (default: 10)")
    parser.add_argument(
        "--iterations-per-epoch", type=int, default=100, help="steps per epoch of pretraining (default: 100)"
    )
    parser.add_argument(
        "--finetune-epochs", type=int, default=18, help="epochs of fine-tuning, of 100 steps each (default: 18)"
    )
    args = parser.parse_args()
    for name in args.datasets:
        if (args.output / name).exists():
            print(f"{args.output / name} exists already")
            continue
        print(f"{make(name, args.output, args)} can be uploaded to a hub", flush=True)


if __name__ == "__main__":
    main()
