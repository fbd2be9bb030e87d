"""Measure whether masked tokens cost time in the encoder, for several shares of masked tokens.

For each share, the table shows the seconds of a forward and backward pass through the encoder on a batch of patches, and through
its blocks alone on the same number of random tokens. Both are timed alternately::

    python -m tools.masked_tokens --dataset 518 --configuration 3d_fullres_primus
"""

import argparse
import statistics
from time import perf_counter
from typing import Any

import torch

from nnssl.networks.backbone import build_network
from nnssl.networks.token_encoders import token_encoder
from nnssl.paths import resolve_folders
from nnssl.plan import read_plan
from tools.machine import describe
from trainers.precision import choose_precision
from trainers.pretraining.pretrain import find_plan

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)


def seconds_of(encoder: Any, output: Any) -> float:
    """Return the seconds of a forward and backward pass."""
    started = perf_counter()
    output().float().square().mean().backward()
    encoder.zero_grad(set_to_none=True)
    return perf_counter() - started


def main() -> None:
    """Print one row for each share of masked tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="planned data set, number or name")
    parser.add_argument(
        "--configuration", default="3d_fullres_primus", help="configuration of the plan (default: 3d_fullres_primus)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="patches per step (default: 8)")
    parser.add_argument("--repeats", type=int, default=10, help="measurements of each share (default: 10)")
    args = parser.parse_args()
    folders = resolve_folders()
    plan = read_plan(find_plan(folders, args.dataset, "nnsslPlans"))
    configuration = plan.configuration(args.configuration)
    architecture = plan.nnunet["configurations"][args.configuration]["architecture"]
    network = build_network(architecture, len(plan.pretext.modalities), 2, seed=0)
    encoder: Any = token_encoder(network, configuration.tokens.stage, configuration.patch_size)
    device = torch.device("cpu")
    autocast = choose_precision(device).autocast
    volumes = torch.randn(args.batch_size, len(plan.pretext.modalities), *configuration.patch_size)
    count = int(torch.tensor(encoder.grid).prod())

    def encode(visible: torch.Tensor | None) -> torch.Tensor:
        with autocast(device):
            return encoder(volumes, visible)

    def blocks(tokens: torch.Tensor) -> torch.Tensor:
        rotation = encoder.eva.rope.get_embed()[: tokens.shape[1]]
        with autocast(device):
            for block in encoder.eva.blocks:
                tokens = block(tokens, rope=rotation)
        return tokens

    print(describe())
    print("| masked | visible tokens | encoder (s) | relative to no masking | blocks alone (s) | ratio |")
    print("|---|---|---|---|---|---|")
    rows: dict[float, list[tuple[float, float]]] = {share: [] for share in SHARES}
    for _ in range(args.repeats + 1):
        for share, times in rows.items():
            shown = count - round(share * count)
            visible = torch.rand(args.batch_size, count).argsort(dim=1)[:, :shown].sort(dim=1).values
            noise = torch.randn(args.batch_size, shown, encoder.width)
            times.append(
                (seconds_of(encoder, lambda v=visible: encode(v)), seconds_of(encoder, lambda n=noise: blocks(n)))
            )
    first = None
    for share, times in rows.items():
        own, bare = (statistics.median(column) for column in zip(*times[1:], strict=True))
        ratio = statistics.median([a / b for a, b in times[1:]])
        first = first or own
        shown = count - round(share * count)
        print(f"| {share:.0%} | {shown} of {count} | {own:.3f} | {own / first:.2f} | {bare:.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
