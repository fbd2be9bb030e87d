"""``nnssl_pretrain``: run a pretext method on a planned data set."""

import argparse
import sys
from pathlib import Path

from nnssl.cli.command import add_device_argument, choose_device, natural_int, positive_int, run_command, say
from nnssl.methods import METHODS

NAME = "nnssl_pretrain"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        NAME, description="Pretrain a planned data set. Run it again to go on where it stopped."
    )
    methods = "; ".join(f"{name}: {method.title}" for name, method in METHODS.items())
    parser.add_argument("-m", dest="method", required=True, metavar="METHOD", help=methods)
    parser.add_argument(
        "-d", dest="dataset", metavar="ID", help="data set, number or name (default: the one planned last)"
    )
    parser.add_argument("-c", dest="configuration", metavar="CONFIG", help="of the plan (default: the method's first)")
    parser.add_argument(
        "-p", dest="plans", default="nnsslPlans", metavar="PLANS", help="plans identifier (default: nnsslPlans)"
    )
    parser.add_argument(
        "--epochs",
        nargs="+",
        type=positive_int,
        metavar="N",
        help="epochs of every stage, or one number for each stage (default: the plan's)",
    )
    parser.add_argument(
        "--iterations-per-epoch", type=positive_int, metavar="N", help="steps per epoch (default: the plan's)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="change a setting of the method, e.g. temperature=0.2, or of one stage, e.g. generative.mask_ratio=0.6",
    )
    parser.add_argument(
        "--init", type=Path, metavar="FILE", help="checkpoint whose weights the first stage starts from"
    )
    parser.add_argument(
        "--probe", metavar="ID", help="labelled data set on which a linear probe is scored during pretraining"
    )
    parser.add_argument(
        "--probe-cases",
        type=positive_int,
        default=4,
        metavar="N",
        help="to learn from, and as many to score (default: 4)",
    )
    parser.add_argument(
        "--probe-every", type=positive_int, metavar="N", help="epochs between two probes (default: about 20 in a stage)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and views (default: 0)")
    add_device_argument(parser)
    parser.add_argument(
        "--num-gpus", type=positive_int, default=1, metavar="N", help="processes, one for each GPU (default: 1)"
    )
    parser.add_argument(
        "--workers", type=natural_int, metavar="N", help="processes that read patches (default: chosen)"
    )
    parser.add_argument("--restart", action="store_true", help="remove earlier results of this method first")
    parser.add_argument("--verbose", action="store_true", help="print the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = make_parser().parse_args(argv)
    return run_command(NAME, _run, args, args.verbose)


def _run(args: argparse.Namespace) -> None:
    from nnssl.errors import UserError
    from nnssl.methods import find_method
    from nnssl.paths import resolve_folders

    stages = find_method(args.method).stages
    overrides = list(args.overrides)
    if args.epochs:
        if len(args.epochs) not in (1, len(stages)):
            raise UserError(f"--epochs: {args.method} has {len(stages)} stages; give one number, or one for each")
        counts = args.epochs * len(stages) if len(args.epochs) == 1 else args.epochs
        overrides += [f"{stage.name}.epochs={count}" for stage, count in zip(stages, counts, strict=True)]
    if args.iterations_per_epoch is not None:
        overrides.append(f"iterations_per_epoch={args.iterations_per_epoch}")
    folders = resolve_folders(say)
    device = choose_device(args.device, say)

    from nnssl.data.raw import find_dataset
    from trainers.pretrain import pretrain

    final = pretrain(
        args.method,
        folders,
        dataset_name=None if args.dataset is None else find_dataset(args.dataset, folders),
        configuration=args.configuration,
        plans_name=args.plans,
        overrides=overrides,
        init=args.init,
        seed=args.seed,
        workers=args.workers,
        device=device,
        processes=args.num_gpus,
        restart=args.restart,
        probe=args.probe,
        probe_cases=args.probe_cases,
        probe_every=args.probe_every,
        say=say,
    )
    say(f"weights: {final}")
    say(f"next: nnssl_finetune -d LABELLED_ID -w {final}")


if __name__ == "__main__":
    sys.exit(main())
