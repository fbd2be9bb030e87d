"""Pairs places of different scans before the first step of a run, by SAM's embeddings or by the body's box."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nnssl import schema
from nnssl.checkpoint import FINAL
from nnssl.data.case_store import CaseStore
from nnssl.data.patch_pairs import PairTable, read_pairs, write_pairs
from nnssl.distributed import is_distributed, rank
from nnssl.errors import ArgumentError, UserError
from nnssl.log import logger
from nnssl.matching.anatomical_sanity import Sanity, describe_difference
from nnssl.matching.body_box import BodyBoxMatcher
from nnssl.matching.embedded import EmbeddingMatcher
from nnssl.matching.pairs import make_pairs
from nnssl.methods import SAM, find_stage
from nnssl.plan import Plan
from nnssl.weights.restored_method import restore_method
from trainers.pretraining.stage_run import StageRun, stage_folder

PAIRS, EXAMINATION = "pairs.npz", "examination.json"


def pairs_of_run(
    folder: Path,
    store: CaseStore,
    partners: str | None,
    run: StageRun,
    recompute: bool,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> PairTable | None:
    """Return the pairs of a run, which its first process computes and all processes read; None if it pairs nothing.

    Args:
        folder: Results folder of the run, where the pairs are stored as ``pairs.npz``.
        store: The preprocessed cases.
        partners: How places are paired, as returned by ``PretextMethod.partners``; None for no pairs.
        run: The run that is about to start.
        recompute: Whether to compute the pairs although the file exists.
        device: Device to compute on.
        autocast: Function that returns the context of mixed precision.

    Raises:
        UserError: If SAM was not trained on this plan, if its checkpoint does not fit, or if the file of pairs cannot be
            read.
    """
    if partners is None:
        return None
    path = folder / PAIRS
    if rank() == 0 and (recompute or not path.exists()):
        logger.info(f"Pairing places of {len(store.names)} scans ...")
        matcher = None
        if partners == "sam":
            embeddings = stage_folder(folder.parents[2], run.plan, find_stage(SAM)[1], run.configuration) / FINAL
            matcher = usable_matcher(embeddings, run.plan, store, device, autocast)
        write_pairs(path, make_pairs(store, matcher, BodyBoxMatcher(store), run.seed))
    if is_distributed():
        dist.barrier()
    pairs = read_pairs(path)
    if set(pairs.cases) != set(store.names):
        raise ArgumentError(
            f"{path}: the pairs are of other cases than those in {store.folder}; use restart to pretrain again",
            "restart",
        )
    return pairs


def usable_matcher(
    embeddings: Path,
    plan: Plan,
    store: CaseStore,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> EmbeddingMatcher | None:
    """Return a matcher that uses the embeddings of a checkpoint; None if they did not pass their examination.

    Raises:
        UserError: If there is no such checkpoint, no examination beside it, or if it belongs to an earlier plan.
    """
    if not embeddings.exists():
        raise UserError(
            f"{embeddings}: not found, but its embeddings pair the places of different scans; run nnssl_pretrain -m sam, or "
            "set partners=body_box to pair them without embeddings"
        )
    advice = "run nnssl_pretrain -m sam --restart"
    examined = schema.read(Sanity, embeddings.parent / EXAMINATION, "examination of the embeddings", advice)
    if not examined.usable:
        logger.info(f"Places are paired by the body's box instead of embeddings: {'; '.join(examined.reasons)}")
        return None
    difference = describe_difference(examined.differences, examined.difference_interval, examined.unit)
    logger.info(
        f"Places are paired by embeddings, whose tissue similarity is above that of the body's box: {difference}"
    )
    method, provenance = restore_method(embeddings, device)
    own = plan.pretext.configurations.get(provenance.configuration)
    if provenance.dataset_name != plan.dataset_name or own is None or own.spacing_mm != method.configuration.spacing_mm:
        raise UserError(
            f"{embeddings}: trained on another data set or spacing than this plan's; run nnssl_pretrain -m sam --restart"
        )
    return EmbeddingMatcher(method.embedding, store, method.configuration.patch_size, device, autocast)
