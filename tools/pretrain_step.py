"""Compare a pretraining step with the bare network on the same batch.

The bare network is the part that every implementation of a stage needs:

- RepRec, contrastive: the encoder, forward and backward on one view and forward on the other.
- RepRec, generative: the encoder forward; the transformer and the token decoder forward and backward.
- Pix2Rep: encoder and decoder, forward and backward on both views.
- Pixel-global: encoder and decoder, forward on both views and backward on one.
- PCRL: the encoder forward on both views and the decoder on three times the batch, backward through all but one encoder.
- SAM: encoder, decoder and heads down to the fine embeddings, forward and backward on both views.
- Alice: the encoder on the visible tokens and the token decoder, forward and backward; the encoder forward on all tokens. Pairs
  are made by the body's box.
- SimCLR: the encoder, forward and backward on both views.
- Regions: encoder and decoder, forward and backward on both views.
- MAE on a U-Net, Models Genesis and Volume Fusion: encoder and decoder, forward and backward on the patches.

Both are timed alternately in one process and with the same precision, in processor time, which other work on the machine changes
less than wall time; waiting for data is not part of it. ``--memory``
measures peak resident memory instead, in one process that only runs steps and one that only runs the bare network.
``--operations`` counts PyTorch's operations that compute instead, each of which a GPU would start as one kernel or a few: many
small ones keep a GPU waiting for the CPU::

    python -m tools.pretrain_step --dataset 501
"""

import argparse
import concurrent.futures
import multiprocessing
import resource
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nnssl.data.case_store import CaseStore
from nnssl.data.patch_pairs import PairTable
from nnssl.matching.body_box import BodyBoxMatcher
from nnssl.matching.pairs import make_pairs
from nnssl.methods import METHODS, Stage
from nnssl.methods.settings import split_overrides
from nnssl.networks import fused_norm
from nnssl.networks.dense import decode, decoder_maps, maps_up_to
from nnssl.paths import resolve_folders
from nnssl.views import intensity_changes
from tools.machine import describe
from trainers.pretraining import pretext, pretrain_trainer
from trainers.pretraining.patches import reading
from trainers.pretraining.pretrain import find_plan
from trainers.pretraining.pretrain_trainer import PretrainTrainer
from trainers.pretraining.stage_run import RunOptions


def bare_contrastive(trainer: PretrainTrainer, views: Any) -> None:
    """Run the encoder on both views, with backward through one."""
    method: Any = trainer.method
    with trainer.precision.autocast(trainer.device):
        output = maps_up_to(method.encoder, views[0], method.token_stage)[-1]
        with torch.no_grad():
            maps_up_to(method.key_encoder, views[1], method.token_stage)
    output.float().square().mean().backward()


def bare_generative(trainer: PretrainTrainer, views: Any) -> None:
    """Run the frozen encoder, then transformer and decoder on the visible tokens with backward."""
    method: Any = trainer.method
    with trainer.precision.autocast(trainer.device):
        with torch.no_grad():
            feature = maps_up_to(method.encoder, views.volumes, method.token_stage)[-1].flatten(2).transpose(1, 2)
        seen = feature.gather(1, views.visible[..., None].expand(-1, -1, feature.shape[2]))
        positions = torch.zeros(feature.shape[1], method.transformer.width)
        encoded = method.transformer.encode(seen, positions[views.visible])
        output = method.decoder(encoded, views.visible, positions)
    output.float().square().mean().backward()


def bare_dense(trainer: PretrainTrainer, views: Any) -> None:
    """Run encoder and decoder on both views, with backward."""
    method: Any = trainer.method
    with trainer.precision.autocast(trainer.device):
        output = decoder_maps(method.network, torch.cat([views.before, views.warped]))[-1]
    output.float().square().mean().backward()


def bare_distillation(trainer: PretrainTrainer, views: Any) -> None:
    """Run encoder and decoder on both views, with backward through one."""
    method: Any = trainer.method
    with trainer.precision.autocast(trainer.device):
        output = decoder_maps(method.network, views.student)[-1]
        with torch.no_grad():
            decoder_maps(method.teacher, views.teacher)
    output.float().square().mean().backward()


def bare_contexts(trainer: PretrainTrainer, views: Any) -> None:
    """Run the encoder on both views and the decoder on three times the batch, with backward through all but one encoder."""
    method: Any = trainer.method
    with trainer.precision.autocast(trainer.device):
        features = method.network.encoder(views.seen_o)
        with torch.no_grad():
            taught = method.teacher(views.seen_m)
        pairs = zip(features, taught, strict=True)
        output = decode(method.network.decoder, [torch.cat([own, other, own]) for own, other in pairs])[-1]
    output.float().square().mean().backward()


def bare_embedding(trainer: PretrainTrainer, views: Any) -> None:
    """Run the encoder, the decoder down to the fine embeddings, and both heads on both views, with backward."""
    method: Any = trainer.method
    with trainer.precision.autocast(trainer.device):
        maps = method.embedding(torch.cat([views.first, views.second]))
    (maps.fine.square().mean() + maps.coarse.square().mean()).backward()


def bare_alignment(trainer: PretrainTrainer, views: Any) -> None:
    """Run the encoder on visible tokens and the token decoder with backward, and the encoder on all tokens."""
    method: Any = trainer.method
    with trainer.precision.autocast(trainer.device):
        seen = method.student(views.patches, views.visible)
        output = method.decoder(seen, views.visible, method.positions)
        with torch.no_grad():
            method.teacher(views.strong)
    output.float().square().mean().backward()


def bare_views(trainer: PretrainTrainer, views: Any) -> None:
    """Run the encoder on both views, with backward through both."""
    method: Any = trainer.method
    with trainer.precision.autocast(trainer.device):
        output = torch.cat([method.encoder(volumes)[-1] for volumes in views])
    output.float().square().mean().backward()


def bare_regions(trainer: PretrainTrainer, views: Any) -> None:
    """Run encoder and decoder on both views, with backward."""
    method: Any = trainer.method
    with trainer.precision.autocast(trainer.device):
        output = decoder_maps(method.network, torch.cat([views.reference, views.query]))[-1]
    output.float().square().mean().backward()


def bare_patches(trainer: PretrainTrainer, views: Any) -> None:
    """Run encoder and decoder on the patches, with backward."""
    method: Any = trainer.method
    with trainer.precision.autocast(trainer.device):
        output = decoder_maps(method.network, views[0])[-1]
    output.float().square().mean().backward()


MADE_WITHOUT_KERNEL = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::detach")
"""Operations that compute nothing, beside views."""

BARE = {
    "reprec.contrastive": bare_contrastive,
    "reprec.generative": bare_generative,
    "pix2rep.dense": bare_dense,
    "pix2rep_v2.dense": bare_dense,
    "pixelglobal.distillation": bare_distillation,
    "pcrl.contexts": bare_contexts,
    "sam.embedding": bare_embedding,
    "alice.alignment": bare_alignment,
    "simclr.contrast": bare_views,
    "regions.prototypes": bare_regions,
    "mae.recovery": bare_patches,
    "models_genesis.restoration": bare_patches,
    "volume_fusion.segmentation": bare_patches,
}


class Operations(TorchDispatchMode):
    """Counts the operations inside a ``with`` block, forward and backward, except those that only look at a tensor differently.

    Attributes:
        count: Number of operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation and run it."""
        self.count += not operation.is_view and operation._schema.name not in MADE_WITHOUT_KERNEL
        return operation(*args, **(kwargs or {}))


def count_operations(path: Path, stage: Stage, args: argparse.Namespace) -> tuple[int, int, int]:
    """Return the operations of making the views, of the rest of the same step, and of the bare network."""
    trainer = make_trainer(path, stage, args)
    make_views, of_views = trainer.method.make_views, [0]

    def counted(*arguments: Any) -> Any:
        before = operations.count
        views = make_views(*arguments)
        of_views[0] += operations.count - before
        return views

    norms_of_a_gpu = mock.patch.object(fused_norm, "_is_faster", return_value=False)
    views_of_a_gpu = mock.patch.object(intensity_changes, "numpy_sorts", return_value=False)
    with norms_of_a_gpu, views_of_a_gpu, reading(trainer.dataloader_train) as batches:
        batch = next(batches)
        trainer.train_step(batch)  # the first step makes the optimizer's state
        trainer.current_step += 1
        with Operations() as operations, mock.patch.object(trainer.method, "make_views", counted):
            trainer.train_step(batch)
        step = operations.count
        trainer.optimizer.zero_grad(set_to_none=True)
        views = views_of(trainer, batch)
        with Operations() as operations:
            BARE[stage.name](trainer, views)
    return of_views[0], step - of_views[0], operations.count


def timed(function: Callable[[], Any]) -> float:
    """Return the seconds of processor time that a call takes."""
    started = process_time()
    function()
    return process_time() - started


def main() -> None:
    """Print one row for each stage of a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="planned and preprocessed data set, number or name")
    parser.add_argument("--method", default="reprec", choices=METHODS, help="(default: reprec)")
    parser.add_argument("--configuration", help="configuration of the plan (default: the method's first)")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps (default: 10)")
    parser.add_argument("--batch-size", type=int, default=8, help="patches per step (default: 8)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the method, as in nnssl_pretrain"
    )
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of seconds")
    parser.add_argument("--operations", action="store_true", help="count operations instead of seconds")
    args = parser.parse_args()
    args.configuration = args.configuration or METHODS[args.method].configurations[0]
    folders = resolve_folders()
    path = find_plan(folders, args.dataset, "nnsslPlans")
    print(describe())
    stages = METHODS[args.method].stages
    if args.operations:
        print("| stage | batch | views | rest of the step | bare network |\n|---|---|---|---|---|")
        for stage in stages:
            print(f"| {stage.name} | {args.batch_size} | {' | '.join(map(str, count_operations(path, stage, args)))} |")
        return
    if args.memory:
        print("| stage | batch | step (GB) | bare (GB) | ratio |\n|---|---|---|---|---|")
        for stage in stages:
            step, own = (in_own_process(largest_memory, path, stage, args, bare) for bare in (False, True))
            print(f"| {stage.name} | {args.batch_size} | {step:.2f} | {own:.2f} | {step / own:.2f} |", flush=True)
        return
    print(
        "| stage | batch | step (s of processor time) | bare (s) | ratio | waiting for data |\n|---|---|---|---|---|---|"
    )
    for stage in stages:
        step, own, ratio, wait = time_stage(path, stage, args)
        print(f"| {stage.name} | {args.batch_size} | {step:.3f} | {own:.3f} | {ratio:.2f} | {wait:.1%} |", flush=True)


def time_stage(path: Any, stage: Any, args: argparse.Namespace) -> tuple[float, float, float, float]:
    """Return medians: processor seconds of a step and of the bare network, their ratio, and the share of a step spent waiting."""
    trainer = make_trainer(path, stage, args)
    steps, bares, waits = [], [], []
    with reading(trainer.dataloader_train) as batches:
        for repeat in range(args.repeats + 2):
            started = perf_counter()
            batch = next(batches)
            waited = perf_counter() - started
            seconds = timed(lambda batch=batch: trainer.train_step(batch))
            in_all = perf_counter() - started
            trainer.current_step += 1
            views = views_of(trainer, batch)
            own = timed(lambda views=views: BARE[stage.name](trainer, views))
            trainer.optimizer.zero_grad(set_to_none=True)
            if repeat >= 2:  # the first two fill caches
                steps.append(seconds)
                bares.append(own)
                waits.append(waited / in_all)
    ratio = statistics.median([a / b for a, b in zip(steps, bares, strict=True)])
    return statistics.median(steps), statistics.median(bares), ratio, statistics.median(waits)


def largest_memory(path: Any, stage: Any, args: argparse.Namespace, bare: bool) -> float:
    """Return the peak resident memory of this process in GB after four steps or four runs of the bare network."""
    trainer = make_trainer(path, stage, args)
    with reading(trainer.dataloader_train) as batches:
        for _ in range(4):
            batch = next(batches)
            if bare:
                BARE[stage.name](trainer, views_of(trainer, batch))
                trainer.optimizer.zero_grad(set_to_none=True)
            else:
                trainer.train_step(batch)
                trainer.current_step += 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a new process, so that its peak memory includes nothing else, and return its result."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def views_of(trainer: PretrainTrainer, batch: Any) -> Any:
    """Return the views of a batch from fixed seeds."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(batch.samples))]
    return trainer.method.make_views(batch.volumes, generators)


def pairs_of_boxes(folder: Path, store: CaseStore, partners: str | None, *_: Any, **__: Any) -> PairTable | None:
    """Return pairs by the body's box if a stage needs pairs, without writing them."""
    return None if partners is None else make_pairs(store, None, BodyBoxMatcher(store), 0)


def make_trainer(path: Any, stage: Stage, args: argparse.Namespace) -> PretrainTrainer:
    """Return an initialised trainer that writes no results; the generative stage starts from random weights."""
    from nnssl.files import read_json

    plans = {**read_json(path, "plan"), "continue_training": False}
    dataset_json = read_json(path.parent / "dataset.json", "description of the data set")
    trainer: PretrainTrainer = getattr(pretext, stage.trainer)(
        plans, stage.runs_in(args.configuration), "all", dataset_json, torch.device("cpu")
    )
    given = split_overrides(args.set, {each.name: each.load() for each in METHODS[args.method].stages})
    trainer.options = RunOptions(overrides=(f"batch_size={args.batch_size}", *given[stage.name]), alone=True)
    trainer.disable_checkpointing = True
    trainer.initialize()
    with mock.patch.object(pretrain_trainer, "pairs_of_run", pairs_of_boxes):
        trainer.dataloader_train, _ = trainer.get_dataloaders()
    trainer.method.train()
    return trainer


if __name__ == "__main__":
    main()
