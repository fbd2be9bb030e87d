"""Weights of pretraining: found, opened safely, and loaded into a network by nnU-Net's own loader."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnssl.checkpoint import FINAL, Provenance, load_tensors, read_checkpoint
from nnssl.errors import UserError
from nnssl.files import file_digest
from nnssl.log import logger
from nnssl.paths import Folders
from nnssl.weights.source import choose_configuration
from trainers.finetuning.finetune_trainer import FinetuneTrainer
from trainers.finetuning.result import FILE_NAME

NEWEST = "latest"
"""What a user says for the newest finished pretraining."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint of pretraining."""

    path: Path
    provenance: Provenance

    @cached_property
    def digest(self) -> str:
        """Of the file's bytes."""
        return file_digest(self.path)


def open_weights(weights: str | Path, folders: Folders) -> Weights:
    """Open a checkpoint of pretraining, without running anything in it, and say what it is.

    Raises:
        UserError: it is missing, unsafe, or no checkpoint of nnssl pretraining; or there is no latest one.
    """
    path = find_latest(folders) if str(weights) == NEWEST else Path(weights).expanduser().absolute()
    provenance = read_checkpoint(path)[1]
    state = "" if provenance.finished else f", unfinished: step {provenance.step} of {provenance.total_steps}"
    logger.info(
        f"Weights: {path} ({provenance.method}, stage {provenance.stage}, pretrained on {provenance.dataset_name} with "
        f"{provenance.configuration}{state})"
    )
    return Weights(path, provenance)


def start_digest(path: Path, names: Iterable[str]) -> str:
    """Return a digest of the tensors that a network takes from a checkpoint; two with the same digest start it alike.

    Args:
        path: a checkpoint of nnssl.
        names: of the network's tensors; those that the file lacks are left out.

    Raises:
        UserError: it cannot be read.
    """
    tensors = load_tensors(path)["network_weights"]
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(set(names) & set(tensors)):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def find_latest(folders: Folders) -> Path:
    """Return the newest ``checkpoint_final.pth`` of nnssl pretraining below nnU-Net's results folder.

    Raises:
        UserError: there is none.
    """
    finals = folders.results.rglob(f"fold_all/{FINAL}")  # of pretraining; an export has the name too
    found = [path for path in finals if not (path.parents[1] / FILE_NAME).exists()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        # an arm that is being trained has no finetune.json yet, and stock nnU-Net's models lie here too
        try:
            if "nnssl" in load_tensors(path):
                return path
        except UserError:
            continue
    raise UserError(
        f"-w {NEWEST}: no finished pretraining below {folders.results}; run nnssl_pretrain or give a checkpoint"
    )


def configuration_to_train(configuration: str | None, weights: Weights) -> str:
    """Return the configuration to train: the one asked for, or the one the weights were pretrained with.

    Raises:
        UserError: the weights' plan has no such configuration.
    """
    return choose_configuration(configuration, weights.path, weights.provenance)


def load_weights(trainer: FinetuneTrainer, weights: Weights) -> None:
    """Load pretrained weights into a trainer's network with nnU-Net's own loader.

    Args:
        trainer: built here if it is not yet.
        weights: a checkpoint that ``open_weights`` has shown to be safe.

    Raises:
        UserError: a weight is missing or has another shape.
    """
    if not trainer.was_initialized:
        trainer.initialize()
    try:
        load_pretrained_weights(trainer.network, str(weights.path), verbose=True)
    except AssertionError as error:
        reason = str(error).split(". ")[0]
        raise UserError(
            f"{weights.path}: does not fit {trainer.configuration_name} ({reason}); take the configuration it was "
            f"pretrained with, -c {weights.provenance.configuration}"
        ) from error
