"""Pretrained weights for fine-tuning: found, opened, compared, and loaded into a network by nnU-Net's own loader."""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from torch import Tensor

from nnssl.checkpoint import FINAL, load_tensors
from nnssl.errors import UserError
from nnssl.log import logger
from nnssl.paths import PROBES_FOLDER, Folders
from nnssl.weights.download import local_weights
from nnssl.weights.nnunet_training import SUPERVISED
from nnssl.weights.opened_checkpoint import OpenedCheckpoint, open_checkpoint
from nnssl.weights.tensor_names import HEAD, SEGMENTATION
from trainers.finetuning.finetune_trainer import FinetuneTrainer
from trainers.finetuning.result import FILE_NAME

NEWEST = "latest"
"""Word for the newest finished pretraining, in place of a path."""


def find_weights(weights: str | Path, folders: Folders) -> Path:
    """Return the absolute path of a checkpoint, or of the newest finished pretraining for ``"latest"``.

    A checkpoint at an address is downloaded first (``nnssl.weights.download``).

    Raises:
        UserError: If no pretraining is finished, or nothing can be downloaded.
    """
    if str(weights) != NEWEST:
        return local_weights(weights, folders)
    path = find_latest(folders)
    logger.info(f"Newest finished pretraining: {path}")
    return path


def open_weights(weights: str | Path, folders: Folders) -> OpenedCheckpoint:
    """Open a checkpoint of pretraining and log where its weights come from.

    Raises:
        UserError: If the file is missing, unsafe, or not a checkpoint of nnssl; or if no pretraining is finished.
    """
    checkpoint = open_checkpoint(find_weights(weights, folders))
    log_weights(checkpoint)
    return checkpoint


def log_weights(checkpoint: OpenedCheckpoint) -> None:
    """Log where the weights of a checkpoint come from.

    Raises:
        UserError: If the file is neither a checkpoint of nnssl nor one of nnU-Net's training.
    """
    provenance = checkpoint.own_provenance
    if provenance.method == SUPERVISED:
        logger.info(f"Weights: {checkpoint.path} ({checkpoint.label}, {provenance.configuration})")
        return
    state = "" if provenance.finished else f", unfinished: step {provenance.step} of {provenance.total_steps}"
    logger.info(
        f"Weights: {checkpoint.path} ({provenance.method}, stage {provenance.stage}, pretrained on "
        f"{provenance.dataset_name} with {provenance.configuration}{state})"
    )


def start_digest(checkpoint: OpenedCheckpoint, names: Iterable[str]) -> str:
    """Return a digest of the tensors that a network takes from a checkpoint.

    A network starts alike from two checkpoints with the same digest.

    Args:
        checkpoint: A checkpoint of nnssl.
        names: Names of the network's tensors; names that the checkpoint lacks are skipped.
    """
    tensors = checkpoint.content["network_weights"]
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(set(names) & set(tensors)):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def find_latest(folders: Folders) -> Path:
    """Return the newest ``checkpoint_final.pth`` of nnssl pretraining below nnU-Net's results folder.

    Raises:
        UserError: If there is none.
    """
    finals = folders.results.rglob(f"fold_all/{FINAL}")  # an export may have this name as well, but lies elsewhere
    found = [path for path in finals if PROBES_FOLDER not in path.parts and not (path.parents[1] / FILE_NAME).exists()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        # An arm in training has no finetune.json yet, and models of stock nnU-Net lie in this folder as well.
        try:
            if "nnssl" in load_tensors(path):
                return path
        except UserError:
            continue
    raise UserError(
        f"{folders.results}: no finished pretraining for weights '{NEWEST}'; run nnssl_pretrain or name a checkpoint"
    )


class _NoGroup:
    """Stands for ``torch.distributed`` in nnU-Net's loader."""

    @staticmethod
    def is_initialized() -> bool:
        return False


@contextmanager
def _alone() -> Iterator[None]:
    """Let nnU-Net's loader read a file as a single process does; in a group, it reads onto GPUs, which CPUs do not have."""
    loader = vars(sys.modules[load_pretrained_weights.__module__])
    before, loader["dist"] = loader["dist"], _NoGroup
    try:
        yield
    finally:
        loader["dist"] = before


def load_weights(trainer: FinetuneTrainer, weights: OpenedCheckpoint) -> None:
    """Load pretrained weights into a trainer's network, files of nnssl by nnU-Net's own loader.

    Segmentation layers are loaded only if the settings of the trainer list them as pretrained.

    Args:
        trainer: The trainer; initialised here if it is not yet.
        weights: A checkpoint of nnssl or of nnU-Net's training. nnU-Net's loader executes code in a file, so it reads only files
            of nnssl that have been opened safely; files of nnU-Net are read without it.

    Raises:
        UserError: If a weight is missing or has another shape.
    """
    if not trainer.was_initialized:
        trainer.initialize()
    if weights.by_nnunet:
        tensors = weights.reopened().content["network_weights"]
        _copy(trainer, weights, {name: value for name, value in tensors.items() if SEGMENTATION not in f".{name}"})
    else:
        _load_by_nnunet(trainer, weights)
    if HEAD in trainer.settings.pretrained:
        _copy(trainer, weights, weights.reopened().head_for(trainer.dataset_json))


def _copy(trainer: FinetuneTrainer, weights: OpenedCheckpoint, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a trainer's network, which must have them and whose segmentation layers may be others.

    Raises:
        UserError: If a tensor is missing or has another shape.
    """
    state = trainer.bare_network.state_dict()
    only_head = all(SEGMENTATION in f".{name}" for name in tensors)
    for name, value in state.items():
        found = tensors.get(name)
        if (SEGMENTATION in f".{name}") == only_head and (found is None or found.shape != value.shape):
            raise UserError(
                f"{weights.path}: does not fit configuration {trainer.configuration_name} ({name} differs); use "
                f"{weights.own_provenance.configuration}, which the weights were trained with"
            )
    trainer.bare_network.load_state_dict({**state, **{name: tensors[name] for name in set(tensors) & set(state)}})


def _load_by_nnunet(trainer: FinetuneTrainer, weights: OpenedCheckpoint) -> None:
    try:
        with _alone():
            load_pretrained_weights(trainer.network, str(weights.path), verbose=True)
    except AssertionError as error:
        reason = str(error).split(". ")[0]
        raise UserError(
            f"{weights.path}: does not fit configuration {trainer.configuration_name} ({reason}); use "
            f"{weights.own_provenance.configuration}, which the weights were pretrained with"
        ) from error
