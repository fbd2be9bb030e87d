"""``nnssl_demo``: the main job on generated phantoms, from images to a Dice for scratch and for pretrained."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnssl.cli.command import add_device_argument, choose_device, positive_int, run_command, say

NAME = "nnssl_demo"
UNLABELLED, LABELLED = "Dataset901_PhantomsUnlabelled", "Dataset902_PhantomsLabelled"
SHAPE, SPACING_MM = (32, 48, 40), (2.5, 1.5, 1.7)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        NAME,
        description="Make phantoms, plan, preprocess, pretrain with RepRec, fine-tune with and without the weights, and "
        "write a report. Takes minutes on two CPU cores. It shows that everything works; it is too short to show a gain.",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("nnssl_demo"), help="for everything it writes (default: ./nnssl_demo)"
    )
    parser.add_argument(
        "--unlabelled", type=positive_int, default=16, metavar="N", help="phantoms without labels (default: 16)"
    )
    parser.add_argument(
        "--labels", type=positive_int, default=3, metavar="N", help="labelled phantoms to train on (default: 3)"
    )
    parser.add_argument(
        "--held-out", type=positive_int, default=6, metavar="N", help="labelled phantoms to test on (default: 6)"
    )
    parser.add_argument(
        "--epochs",
        type=positive_int,
        nargs=3,
        default=(4, 8, 5),
        metavar="N",
        help="of the contrastive stage, the generative stage and fine-tuning (default: 4 8 5)",
    )
    parser.add_argument("--iterations-per-epoch", type=positive_int, default=15, metavar="N", help="(default: 15)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    add_device_argument(parser)
    parser.add_argument("--verbose", action="store_true", help="print the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = make_parser().parse_args(argv)
    return run_command(NAME, _run, args, args.verbose)


def _run(args: argparse.Namespace) -> None:
    from time import time

    from nnssl.data.jobs import default_processes
    from nnssl.data.phantoms import write_phantom_dataset
    from nnssl.data.preprocess import preprocess_dataset
    from nnssl.data.raw import read_dataset
    from nnssl.environment import variables
    from nnssl.paths import make_writable, resolve_folders
    from planners.fingerprint import read_or_extract
    from planners.pretrain_planner import plan_pretraining
    from planners.reasons import format_decisions
    from trainers.finetune_run import finetune
    from trainers.pretrain import pretrain

    started = time()
    root = make_writable(args.folder.absolute())
    environment = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
    with variables(**environment):
        folders = resolve_folders()
        processes = default_processes()
        device = choose_device(args.device, say)

        say(
            f"1/5 phantoms: {args.unlabelled} without labels, {args.labels + args.held_out} with labels, in {folders.raw}"
        )
        cases = {UNLABELLED: args.unlabelled, LABELLED: args.labels + args.held_out}
        for name, count in cases.items():
            if not (folders.raw / name / "dataset.json").exists():
                first = 0 if name == UNLABELLED else args.unlabelled
                write_phantom_dataset(
                    folders.raw, name, count, args.seed, SHAPE, SPACING_MM, labelled=name == LABELLED, first_case=first
                )

        say("2/5 fingerprint, plan and preprocessing")
        dataset = read_dataset(UNLABELLED, folders, say)
        fingerprint = read_or_extract(dataset, folders, processes, say)
        plan = plan_pretraining(dataset, fingerprint, folders, "cpu", say=say)
        for line in format_decisions(plan):
            say(line)
        preprocess_dataset(
            dataset, plan, fingerprint.usable, folders, ["3d_fullres_hybrid"], processes, None, say, False
        )

        say("3/5 pretraining: RepRec, two stages")
        contrastive, generative, finetuning = args.epochs
        overrides = [
            f"contrastive.epochs={contrastive}",
            f"generative.epochs={generative}",
            f"iterations_per_epoch={args.iterations_per_epoch}",
            "batch_size=8",
        ]
        weights = pretrain(
            "reprec",
            folders,
            UNLABELLED,
            "3d_fullres_hybrid",
            overrides=overrides,
            seed=args.seed,
            device=device,
            say=say,
        )

        say(f"4/5 fine-tuning on {args.labels} labelled phantoms, pretrained and from scratch")
        results = finetune(
            LABELLED,
            weights,
            scratch=True,
            labels=args.labels,
            seed=args.seed,
            epochs=finetuning,
            iterations_per_epoch=args.iterations_per_epoch,
            optimizer="adam",  # nnU-Net's SGD predicts no foreground yet after so few steps
            learning_rate=0.003,
            device=device,
            processes=processes,
            say=say,
        )

        say("5/5 report")
        report = root / "report.md"
        lines = _report(plan, weights, results, time() - started)
        report.write_text("\n".join(lines) + "\n")
        for line in _result_lines(results):
            say(line)
        say(f"report: {report} ({(time() - started) / 60:.1f} minutes)")
        say(f"to look inside the weights: nnssl_info {weights}")


def _result_lines(results: Sequence[Any]) -> list[str]:
    from trainers.finetune_result import comparison

    return comparison(results)


def _report(plan: Any, weights: Path, results: Sequence[Any], seconds: float) -> list[str]:
    """Return the lines of a report in Markdown: the Dice, where each file is, and the plan with its reasons."""
    folder = weights.parent
    return [
        "# nnssl demo",
        "",
        f"RepRec on {plan.pretext.num_cases} phantoms without labels, fine-tuned on "
        f"{len(results[0].train_cases)} with labels, in {seconds / 60:.1f} minutes. The runs are far too short to show what "
        "pretraining is worth; they show that every step works.",
        "",
        "```",
        *_result_lines(results),
        "```",
        "",
        "| what | where |",
        "|---|---|",
        f"| pretrained weights, for `nnUNetv2_train -pretrained_weights` | {weights} |",
        f"| settings of the run with their origin | {folder / 'run.json'} |",
        f"| metrics per epoch, figure | {folder / 'metrics.csv'}, {folder / 'progress.png'} |",
        *(f"| fine-tuned model: {result.arm} | {result.model_folder} |" for result in results),
        "",
        "Predict with stock nnU-Net:",
        "",
        "```",
        *(result.predict_command for result in results),
        "```",
        "",
        "## Plan",
        "",
        "| configuration | what | value | reason |",
        "|---|---|---|---|",
        *(f"| {d.configuration} | {d.what} | {d.value} | {d.reason} |" for d in plan.pretext.decisions),
    ]


if __name__ == "__main__":
    sys.exit(main())
