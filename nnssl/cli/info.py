"""``nnssl_info``: methods, folders and versions, the content of a checkpoint, or the files of a data set."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl.cli.command import (
    PLANS_NAME,
    CommandParser,
    add_dataset_argument,
    add_verbose_argument,
    path_or_address,
    print_next,
    run_command,
)
from nnssl.errors import ArgumentError
from nnssl.log import print_line
from nnssl.sizes import in_bytes, in_mm, in_voxels

if TYPE_CHECKING:
    from nnssl.data.disk_use import DiskUse
    from nnssl.weights.opened_checkpoint import OpenedCheckpoint

NAME = "nnssl_info"
CHECKPOINT, ENCODER_FILE = "checkpoint_final.pth", "encoder.safetensors"
"""Names of the weights in folders that nnssl_export writes."""
MOST_PARTS = 20
"""Largest number of prefixes to list; more are only counted, because an exported file names every tensor."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        NAME, description="Show methods, folders and versions, describe a checkpoint, or list the files of a data set."
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=path_or_address,
        help="Checkpoint to describe, or a file or folder written by nnssl_export: a path, https://... or hf://OWNER/REPO/FILE.",
    )
    add_dataset_argument(parser, "Number or name of a data set: list where its files lie and how large they are.")
    parser.add_argument(
        "--clean",
        action="store_true",
        help="With -d, delete the preprocessed cases that can be made again; raw files, plans and results stay.",
    )
    parser.add_argument(
        "--ext-trainer",
        action="store_true",
        help="Print the shell command with which stock nnU-Net finds nnssl's trainers.",
    )
    add_verbose_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(make_parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    if args.clean and args.dataset is None:
        raise ArgumentError(
            "clean needs dataset, the data set whose preprocessed cases are to be deleted", "clean", "dataset"
        )
    if args.dataset is not None:
        if args.checkpoint is not None:
            raise ArgumentError(
                "dataset lists the files of a data set; leave it out to describe a checkpoint", "dataset"
            )
        if args.ext_trainer:
            raise ArgumentError(
                "dataset and ext_trainer print different things; give one of them", "dataset", "ext_trainer"
            )
        for line in explain_dataset(args.dataset, args.clean):
            print_line(line)
    elif args.ext_trainer:
        import importlib.util

        from nnssl.methods import METHODS

        spec = importlib.util.find_spec("trainers")
        assert spec is not None
        assert spec.origin is not None
        print_line(f"export nnUNet_extTrainer={Path(spec.origin).parent / 'nnunet_ext'}")
        first = next(iter(METHODS.values()))
        print_next(
            f"nnUNetv2_train ID {first.configurations[0]} all -p {PLANS_NAME} -tr {first.stages[0].trainer} (or the trainer "
            "of another stage)",
            to_stderr=True,
        )
    elif args.checkpoint is not None:
        from nnssl.weights.download import is_address, local_weights

        path = local_weights(args.checkpoint) if is_address(args.checkpoint) else Path(args.checkpoint)
        for line in explain_checkpoint(path):
            print_line(line)
    else:
        for line in explain_installation():
            print_line(line)
        print_next("nnssl_plan_and_preprocess -d ID", "nnssl_import SOURCE -d ID -n NAME", "nnssl_demo")


def explain_installation() -> list[str]:
    """Return lines that describe versions, folders and methods; packages are not imported."""
    import os
    from importlib.metadata import PackageNotFoundError, version

    from nnssl.environment import other_nnssl
    from nnssl.methods import METHODS
    from nnssl.paths import VARIABLES
    from nnssl.version import __version__

    lines = [f"nnssl {__version__}, Python {sys.version.split()[0]}"]
    for package in ("torch", "nnunetv2", "dynamic-network-architectures", "blosc2", "SimpleITK"):
        try:
            lines.append(f"  {package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"  {package} is missing; install nnssl again")
    others = other_nnssl()
    if others:
        lines.append(
            f"  Warning: MIC-DKFZ's package, also called nnssl, is in this environment ({', '.join(others)}); one hides the "
            "other, so install them in two environments"
        )
    lines.append("folders:")
    for name, variable in VARIABLES.items():
        fallback = f"not set; would be {Path.cwd() / 'nnssl_workspace' / name}"
        lines.append(f"  {variable}: {os.environ.get(variable) or fallback}")
    lines.append("methods:")
    for method in METHODS.values():
        stages = " -> ".join(stage.name for stage in method.stages)
        lines += [
            f"  {method.name}: {method.title}",
            f"    {method.source}",
            f"    stages {stages}; configurations {', '.join(method.configurations)}",
        ]
    return lines


def explain_dataset(dataset: str, clean: bool = False) -> list[str]:
    """Return lines that list the files of a data set, where they are and how large.

    Args:
        dataset: Number or full name.
        clean: Whether to delete the preprocessed cases that can be made again.

    Raises:
        UserError: If there is no such data set, or if a process may be reading the cases to delete.
    """
    from nnssl.data.disk_use import delete_remakable, find_disk_use
    from nnssl.data.raw import find_dataset
    from nnssl.paths import resolve_folders
    from nnssl.tables import align

    folders = resolve_folders()
    name = find_dataset(dataset, folders)
    deleted = delete_remakable(name, folders) if clean else []
    uses = find_disk_use(name, folders)
    lines = []
    for part in (folders.raw, folders.preprocessed, folders.results):
        own = [use for use in uses if use.path.is_relative_to(part / name)]
        if own:
            lines.append(f"{part / name}: {in_bytes(sum(use.size_bytes for use in own))}")
            rows = [(use.what, f"{use.files:,} files", in_bytes(use.size_bytes), _explain_use(use)) for use in own]
            lines += [f"  {row}" for row in align(rows, left=(0, 3))]
    lines += [f"deleted {use.path} ({in_bytes(use.size_bytes)}); {use.again} makes it again" for use in deleted]
    remakable = sum(use.size_bytes for use in uses if use.again)
    if remakable:
        lines.append(f"next: nnssl_info -d {dataset} --clean (deletes {in_bytes(remakable)} that can be made again)")
    elif clean and not deleted:
        lines.append("nothing was deleted: nothing here can be made again")
    return lines


def _explain_use(use: "DiskUse") -> str:
    name = use.path.name if use.single else ""
    if use.again:
        return f"{name}; {use.again} makes it again"
    return f"{name}; kept, {use.kept}" if use.kept else name


def explain_checkpoint(path: Path) -> list[str]:
    """Return lines that describe where the weights of a checkpoint come from and which network they fit.

    Args:
        path: Checkpoint of nnssl or of nnU-Net's training, checkpoint with an adaptation plan, or file or folder of
            ``nnssl_export``.

    Raises:
        UserError: If the path is none of these.
    """
    from nnssl.weights.nnunet_training import SUPERVISED
    from nnssl.weights.opened_checkpoint import EXPORT_KEY, open_checkpoint

    if path.is_dir() and (path / CHECKPOINT).exists():
        path = path / CHECKPOINT
    if path.suffix == ".safetensors" or (path / ENCODER_FILE).exists():
        return _explain_encoder(path / ENCODER_FILE if path.is_dir() else path)
    source = open_checkpoint(path)
    if EXPORT_KEY in source.content:
        spec = source.content[EXPORT_KEY]
        return [
            str(path),
            f"  exported for nnU-Net's {spec['trainer']}, configuration {spec['configuration']} of plans {spec['plans']}, from",
            f"  {spec['checkpoint']} ({spec['stage']}, pretrained on {spec['pretraining_data']})",
        ]
    if source.provenance is None:
        return [str(path), *_explain_elsewhere(source)]
    trained = source.provenance.method == SUPERVISED
    return [str(path), *(_explain_nnunet(source) if trained else _explain_own(source))]


def _explain_encoder(path: Path) -> list[str]:
    from nnssl.files import read_json

    spec = read_json(path.with_name("encoder.json"), "description of an encoder")
    return [
        str(path),
        f"  the encoder of {spec['architecture']['network_class_name']}: {spec['stage']}, pretrained on "
        f"{spec['pretraining_data']}",
        f"  {spec['num_inputs']} input(s), patch {in_voxels(spec['patch_size'])}, spacing {in_mm(spec['spacing_mm'])} mm",
        f"next: python {path.with_name('load_encoder.py')}",
    ]


def _explain_network(source: "OpenedCheckpoint") -> list[str]:
    from nnssl.weights.tensor_names import count_values

    channels = f" ({', '.join(source.channel_names)})" if source.channel_names else ""
    made_on = source.pretraining
    lines = [
        f"  network {source.architecture['network_class_name']}, "
        f"{count_values(source.tensors) / 1e6:.2f} M pretrained parameters, {source.untrained / 1e6:.2f} M others",
        f"  {source.num_channels} channel(s){channels}, patch {in_voxels(source.patch_vox)}",
    ]
    spacing = f", spacing {in_mm(made_on['spacing_mm'])} mm" if made_on["spacing_mm"] else ""
    named = f", channels {', '.join(made_on['channel_names'])}" if made_on["channel_names"] else ""
    return [*lines, f"  pretrained with patch {in_voxels(made_on['patch_vox'])}{spacing}{named}"]


def _explain_elsewhere(source: "OpenedCheckpoint") -> list[str]:
    return [
        "  made elsewhere: a checkpoint in the adaptation-plan format",
        *_explain_network(source),
        f"next: nnssl_finetune -d LABELLED_ID -w {source.path}, nnssl_pretrain --init {source.path}, or",
        f"      nnssl_export {source.path} --for-plans PLANS.json",
    ]


def _explain_nnunet(source: "OpenedCheckpoint") -> list[str]:
    made = source.own_provenance
    settings = made.settings
    labels = ", ".join(map(str, made.dataset_json["labels"])) if "labels" in made.dataset_json else "not named"
    return [
        f"  trained by nnU-Net with labels: {settings['trainer'] or 'unknown trainer'}, fold {settings['fold']}, "
        f"{settings['epochs']} epochs",
        f"  trained on {made.dataset_name}; {'plan' if made.origin is None else 'made for plan'} {made.plans_name}, "
        f"configuration {made.configuration}",
        *_explain_network(source),
        f"  labels {labels}",
        f"next: nnssl_finetune -d LABELLED_ID -w {source.path}, nnssl_pretrain --init {source.path}, or",
        f"      nnssl_export {source.path} --for-plans PLANS.json",
    ]


def _explain_own(source: "OpenedCheckpoint") -> list[str]:
    provenance = source.provenance
    assert provenance is not None
    state = "finished" if provenance.finished else "unfinished"
    prefixes = provenance.pretrained_parts
    parts = ", ".join(prefixes) if len(prefixes) <= MOST_PARTS else f"{len(prefixes)} tensors, named one by one"
    lines = [
        f"  {provenance.stage}, {state}: step {provenance.step} of {provenance.total_steps}, seed {provenance.seed}, "
        f"nnssl {provenance.nnssl_version}",
        f"  pretrained on {provenance.dataset_name}; made for plan {provenance.plans_name}, configuration "
        f"{provenance.configuration}",
        *_explain_network(source),
        f"  pretrained parts: {parts}; all others have a seeded initialisation",
        f"  started from: {provenance.init or 'random weights'}",
        *([f"  method chosen by short runs: {source.chosen['reason']}"] if source.chosen else []),
        "  settings:",
    ]
    lines += [f"    {key} = {value}" for key, value in provenance.settings.items()]
    path = source.path
    lines.append(f"next: nnssl_finetune -d LABELLED_ID -w {path}, or nnssl_export {path} --for-plans PLANS.json")
    return lines


if __name__ == "__main__":
    sys.exit(main())
