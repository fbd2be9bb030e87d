"""Segments images with a fine-tuned model, by nnU-Net's own predictor."""

from pathlib import Path
from typing import TYPE_CHECKING

from nnssl.checkpoint import FINAL
from nnssl.data.jobs import default_processes
from nnssl.devices import find_device
from nnssl.errors import UserError
from nnssl.log import logger, printed_output_to
from nnssl.paths import make_writable

if TYPE_CHECKING:
    import torch


def segment(
    model: Path | str,
    images: Path | str,
    output: Path | str,
    *,
    device: "torch.device | str | None" = None,
    processes: int | None = None,
) -> list[Path]:
    """Segment the images of a folder with a fine-tuned model. Several folds are averaged, as nnU-Net does.

    Args:
        model: Model folder of nnssl or nnU-Net: it holds ``plans.json``, ``dataset.json`` and ``fold_*`` folders.
        images: Folder of images named as in ``imagesTr``: ``CASE_0000.nii.gz``.
        output: Folder for the segmentations, ``CASE.nii.gz``.
        device: Device to compute on; None for a GPU if one is available, else the CPU.
        processes: Worker processes for preprocessing and writing; None for one per core, at most 8.

    Returns:
        The segmentation files, sorted by name.

    Raises:
        UserError: If the model folder holds no finished fold, or the images folder no images of the model's file ending.

    Examples:
        >>> images = nnssl.resolve_folders().raw / "Dataset004_MyTask" / "imagesTr"
        >>> files = nnssl.segment(arm.model_folder, images, "segmentations", processes=1)
        >>> len(files)
        8
    """
    model, images = Path(model).expanduser(), Path(images).expanduser()
    folds = sorted(path.parent.name.removeprefix("fold_") for path in model.glob(f"fold_*/{FINAL}"))
    if not folds or not (model / "plans.json").exists():
        raise UserError(f"{model}: not a model folder with a finished fold; give the model_folder of a fine-tuning")
    output = make_writable(Path(output).expanduser())
    computed_on = find_device(device)
    workers = processes or default_processes()
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    logger.info(f"Segmenting {images} with {len(folds)} fold(s) of {model} ...")
    with printed_output_to(output / "nnunet_output.txt"):
        predictor = nnUNetPredictor(device=computed_on, allow_tqdm=False, perform_everything_on_device=True)
        names = tuple(fold if fold == "all" else int(fold) for fold in folds)
        predictor.initialize_from_trained_model_folder(str(model), names, FINAL)
        ending = predictor.dataset_json["file_ending"]
        if not any(images.glob(f"*{ending}")):
            raise UserError(f"{images}: no images ending in {ending}, which the model reads")
        predictor.predict_from_files(
            str(images),
            str(output),
            save_probabilities=False,
            num_processes_preprocessing=workers,
            num_processes_segmentation_export=workers,
        )
    written = sorted(output.glob(f"*{ending}"))
    logger.info(f"{len(written)} segmentations: {output}")
    return written
