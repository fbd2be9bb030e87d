"""Finds which places of the scans a run pairs, before its first step, by what SAM learned or by the body's box."""

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
from nnssl.errors import UserError
from nnssl.log import logger
from nnssl.matching.anatomical_sanity import Sanity
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
    anew: bool,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> PairTable | None:
    """Return the pairs of a run, found by its first process and read by all; None for one that pairs nothing.

    Args:
        folder: of the run's results; the pairs lie there as ``pairs.npz``.
        store: the preprocessed cases.
        partners: what pairs places, as ``PretextMethod.partners`` says it.
        run: that is about to start.
        anew: find them although the file is there.
        device: where to compute.
        autocast: gives the context of mixed precision.

    Raises:
        UserError: SAM was not trained on this plan, or its checkpoint does not fit; a file of pairs cannot be read.
    """
    if partners is None:
        return None
    path = folder / PAIRS
    if rank() == 0 and (anew or not path.exists()):
        matcher = None
        if partners == "sam":
            embeddings = stage_folder(folder.parents[2], run.plan, find_stage(SAM)[1], run.configuration) / FINAL
            matcher = usable_matcher(embeddings, run.plan, store, device, autocast)
        write_pairs(path, make_pairs(store, matcher, BodyBoxMatcher(store), run.seed))
    if is_distributed():
        dist.barrier()
    pairs = read_pairs(path)
    if set(pairs.cases) != set(store.names):
        raise UserError(f"{path}: was made for other cases than those in {store.folder}; pretrain again with --restart")
    return pairs


def usable_matcher(
    embeddings: Path,
    plan: Plan,
    store: CaseStore,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> EmbeddingMatcher | None:
    """Return a matcher by the embeddings of a checkpoint, None where they did not pass their examination.

    Raises:
        UserError: there is no such checkpoint, or no examination beside it, or it is of an earlier plan.
    """
    if not embeddings.exists():
        raise UserError(
            f"{embeddings}: says which places of different scans are the same, and is not there; run nnssl_pretrain -m sam, or "
            "do without it, --set partners=body_box"
        )
    examined = schema.read(Sanity, embeddings.parent / EXAMINATION, "examination of the embeddings")
    if not examined.usable:
        logger.info(f"The body's box pairs places instead of embeddings: {'; '.join(examined.reasons)}")
        return None
    method, provenance = restore_method(embeddings, device)
    own = plan.pretext.configurations.get(provenance.configuration)
    if provenance.dataset_name != plan.dataset_name or own is None or own.spacing_mm != method.configuration.spacing_mm:
        raise UserError(
            f"{embeddings}: was trained on another data set or spacing than this plan's; run nnssl_pretrain -m sam --restart"
        )
    return EmbeddingMatcher(method.embedding, store, method.configuration.patch_size, device, autocast)
