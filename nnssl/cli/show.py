"""``nnssl_show``: pictures of what pretrained weights have learned, made without labels."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl.cli.command import (
    CommandParser,
    add_dataset_argument,
    add_device_argument,
    add_seed_argument,
    add_verbose_argument,
    add_weights_argument,
    natural_int,
    positive_int,
    print_next,
    run_command,
)
from nnssl.devices import find_device
from nnssl.log import print_line
from nnssl.tables import align

if TYPE_CHECKING:
    from nnssl.data.case_store import CaseStore
    from nnssl.pictures.dense_network import DenseNetwork
    from nnssl.weights.opened_checkpoint import OpenedCheckpoint

Draw = Callable[[argparse.Namespace, "OpenedCheckpoint", "CaseStore"], None]
"""Function that draws one kind of picture from weights and cases, and prints its key values."""
UNTOLD = dict.fromkeys("omh", "at best without the code") | {"s": "by the mean of what is visible"}
"""Reference that the error of a reconstruction is compared with, by model."""
NAME = "nnssl_show"
OTHERS = 2
"""Default number of other cases in which a query is searched."""
BESIDE = 3
"""Largest and default number of other cases that the picture of embeddings shows."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command, with one subparser per picture."""
    parser = CommandParser(NAME, description="Draw what pretrained weights have learned, without labels.")
    pictures = parser.add_subparsers(dest="picture", metavar="PICTURE", required=True)
    similarity = _add_picture(
        pictures, "similarity", _similarity, "Draw which voxels of other cases resemble a voxel of this case."
    )
    similarity.add_argument(
        "--point",
        nargs=3,
        type=natural_int,
        metavar=("Z", "Y", "X"),
        help="Query voxel, counted from 0 in the preprocessed case (default: the middle of the body).",
    )
    _add_others_argument(similarity, f"Cases to search (default: the next {OTHERS} of the data set).")
    embedding = _add_picture(
        pictures,
        "embedding",
        _embedding,
        "Draw the first three principal components of the features of up to four cases as red, green and blue.",
    )
    _add_others_argument(embedding, f"Cases to show beside it, at most {BESIDE} (default: the next {BESIDE}).")
    for each in (similarity, embedding):
        _add_feature_arguments(each)
    uncertainty = _add_picture(
        pictures,
        "uncertainty",
        _uncertainty,
        "Draw where the teacher of pixelglobal is uncertain, estimated by passes with dropout.",
    )
    uncertainty.add_argument(
        "--passes", type=positive_int, metavar="N", help="Number of passes with dropout (default: as in pretraining)."
    )
    reconstruction = _add_picture(
        pictures, "reconstruction", _reconstruction, "Draw how the decoder of pcrl or alice reconstructs a patch."
    )
    _add_matches(pictures)
    _add_picture(
        pictures,
        "retrieval",
        _retrieval,
        "Draw how often each stage of the exported network finds the other view of a patch and of a point.",
        with_case=False,
    )
    for each in (embedding, uncertainty, reconstruction):
        each.add_argument(
            "--slice",
            type=natural_int,
            metavar="Z",
            help="Slice to draw, for 2D weights (default: the one with the most body).",
        )
    add_seed_argument(reconstruction, "Random seed for crops, corruption, turns and masks")
    return parser


def _add_matches(pictures: Any) -> None:
    matches = _add_picture(
        pictures,
        "matches",
        _matches,
        "Draw where points of a case lie in another case, by the embeddings of sam and by the body's bounding box.",
    )
    matches.add_argument("--other", metavar="CASE", help="Case to search (default: the next one of the data set).")
    matches.add_argument(
        "--points",
        type=positive_int,
        default=4,
        metavar="N",
        help="Number of points, drawn at random in the body (default: 4).",
    )
    add_seed_argument(matches, "Random seed for the points")


def _add_picture(pictures: Any, name: str, function: Draw, text: str, with_case: bool = True) -> Any:
    """Add a subparser with its description and the arguments that pictures share."""
    parser = pictures.add_parser(name, help=text, description=text)
    add_weights_argument(parser)
    add_dataset_argument(parser, "Data set, number or name (default: the one that the weights were pretrained on).")
    if with_case:
        parser.add_argument("--case", metavar="CASE", help="Preprocessed case (default: the first).")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(f"nnssl_{name}.png"), metavar="FILE.png",
        help=f"File to write (default: ./nnssl_{name}.png).",
    )  # fmt: skip
    add_device_argument(parser)
    add_verbose_argument(parser)
    parser.set_defaults(function=function)
    return parser


def _add_others_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the argument for cases beside the first one."""
    parser.add_argument("--others", nargs="*", metavar="CASE", help=what)


def _add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of pictures that compare features of voxels."""
    parser.add_argument(
        "--features",
        choices=("single", "pyramid"),
        help="Features of a voxel: single uses the last decoder stage, pyramid all decoder stages and the bottleneck (default: "
        "as in pretraining, else pyramid).",
    )
    add_seed_argument(parser, "Random seed for the sample over which features are standardised")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(make_parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    weights, store = _open_weights(args)
    args.function(args, weights, store)
    print_line(f"picture: {args.output}")
    print_next(f"nnssl_finetune -d LABELLED_ID -w {weights.path}")


def _similarity(args: argparse.Namespace, weights: "OpenedCheckpoint", store: "CaseStore") -> None:
    from nnssl.pictures.figures import similarity_figure, write_picture
    from nnssl.pictures.orientation import describe_views
    from nnssl.pictures.similarity import compare_cases

    network, described = _open_network(args, weights, store)
    case = args.case or store.names[0]
    others = _following(store, case, OTHERS) if args.others is None else args.others
    point = None if args.point is None else tuple(args.point)
    comparison = compare_cases(network, store, case, point, others, args.seed)
    write_picture(args.output, similarity_figure(comparison, described))
    print_line(describe_views(store.case(case).orientation))
    for similarity in comparison.similarities:
        nearest = " ".join(map(str, similarity.nearest_vox))
        print_line(f"{similarity.case.name}: nearest {nearest}, cosine {similarity.nearest_cosine:.3f}")
    query = " ".join(map(str, comparison.query_vox))
    print_line(f"query: --case {case} --point {query}")


def _embedding(args: argparse.Namespace, weights: "OpenedCheckpoint", store: "CaseStore") -> None:
    from nnssl.errors import ArgumentError
    from nnssl.pictures.components import embed_cases
    from nnssl.pictures.dense_network import find_case
    from nnssl.pictures.figures import embedding_figure, write_picture
    from nnssl.pictures.orientation import describe_views

    network, described = _open_network(args, weights, store)
    case = find_case(store, args.case or store.names[0]).name
    others = _following(store, case, BESIDE) if args.others is None else args.others
    if len(others) > BESIDE:
        raise ArgumentError(f"others must name at most {BESIDE} cases, got {len(others)}", "others")
    cases = [find_case(store, name) for name in dict.fromkeys([case, *others])]
    embedding = embed_cases(network, cases, args.slice, args.seed)
    write_picture(args.output, embedding_figure(embedding, described))
    print_line(describe_views(cases[0].orientation))


def _uncertainty(args: argparse.Namespace, weights: "OpenedCheckpoint", store: "CaseStore") -> None:
    from nnssl.pictures.dense_network import find_case
    from nnssl.pictures.figures import uncertainty_figure, write_picture
    from nnssl.pictures.orientation import describe_views
    from nnssl.pictures.teacher_uncertainty import measure_uncertainty, teacher_of

    teacher = teacher_of(weights, args.passes, find_device(args.device))
    case = find_case(store, args.case or store.names[0])
    uncertainty = measure_uncertainty(teacher, case, args.slice)
    described = _describe(weights, f"{teacher.passes} passes", store)
    write_picture(args.output, uncertainty_figure(uncertainty, described))
    print_line(describe_views(case.orientation))


def _reconstruction(args: argparse.Namespace, weights: "OpenedCheckpoint", store: "CaseStore") -> None:
    from nnssl.pictures.dense_network import find_case
    from nnssl.pictures.figures import reconstruction_figure, write_picture
    from nnssl.pictures.orientation import describe_views
    from nnssl.pictures.reconstructions import reconstruct_case, reconstructor_of

    device = find_device(args.device)
    method = reconstructor_of(weights, device)
    case = find_case(store, args.case or store.names[0])
    made = reconstruct_case(method, case, args.slice, args.seed, device)
    described = _describe(weights, case.name, store)
    figure = reconstruction_figure(made, method.configuration.spacing_mm, described, case.orientation)
    write_picture(args.output, figure)
    print_line(describe_views(case.orientation))
    for each in made:
        print_line(f"{each.model}: mean squared error {each.error:.3f}, {UNTOLD[each.model]} {each.error_untold:.3f}")


def _matches(args: argparse.Namespace, weights: "OpenedCheckpoint", store: "CaseStore") -> None:
    from nnssl.errors import UserError
    from nnssl.pictures.dense_network import find_case
    from nnssl.pictures.figures import matches_figure, write_picture
    from nnssl.pictures.matches import find_matches, matcher_of
    from nnssl.pictures.orientation import describe_views

    matcher, method = matcher_of(weights, store, find_device(args.device))
    if len(store.names) < 2:
        raise UserError(
            f"{store.folder}: holds only one case, so there is no other to search; choose another data set with -d"
        )
    case = find_case(store, args.case or store.names[0]).name
    following = store.names[(store.names.index(case) + 1) % len(store.names)]
    other = find_case(store, args.other or following).name
    found = find_matches(matcher, store, case, other, args.points, args.seed, method.configuration.patch_size)
    described = _describe(weights, f"{case}, found in {other}", store)
    orientations = store.case(case).orientation, store.case(other).orientation
    write_picture(args.output, matches_figure(found, method.configuration.spacing_mm, described, orientations))
    print_line(describe_views(orientations[0]))
    for each in found:
        place, by_embedding, by_box = (
            " ".join(map(str, vox)) for vox in (each.query_vox, each.found_vox, each.box_vox)
        )
        print_line(
            f"{place}: {by_embedding}, similarity {each.score:.3f}, cycle error {each.cycle_mm:.1f} mm; body's box {by_box}"
        )


def _retrieval(args: argparse.Namespace, weights: "OpenedCheckpoint", store: "CaseStore") -> None:
    from nnssl.pictures.figures import write_picture
    from nnssl.pictures.retrieval import measure_weights, retrieval_figure, retrieval_rows

    measured = measure_weights(weights, store, find_device(args.device))
    origin = "not trained on" if measured.set_aside else "of the data set"
    described = _describe(weights, f"{len(measured.cases)} cases {origin}", store)
    write_picture(args.output, retrieval_figure(measured, described))
    for line in align(retrieval_rows(measured)):
        print_line(line)


def _following(store: "CaseStore", case: str, count: int) -> list[str]:
    """Return the cases that follow a case in the data set, which continues at its beginning."""
    place = store.names.index(case) + 1 if case in store.names else 0
    return [name for name in (*store.names[place:], *store.names[:place]) if name != case][:count]


def _open_network(
    args: argparse.Namespace, weights: "OpenedCheckpoint", store: "CaseStore"
) -> "tuple[DenseNetwork, str]":
    """Return the network of the weights and its description."""
    from nnssl.pictures.dense_network import dense_network_of

    network = dense_network_of(weights, args.features, find_device(args.device))
    print_line(f"Features: {network.kind}")
    return network, _describe(weights, f"features: {network.kind}", store)


def _open_weights(args: argparse.Namespace) -> "tuple[OpenedCheckpoint, CaseStore]":
    """Check that the picture can be written, then return the weights and the cases to draw."""
    from nnssl.data.raw import find_dataset
    from nnssl.paths import resolve_folders
    from nnssl.pictures.figures import check_picture_path
    from nnssl.weights.preprocessed_cases import open_cases
    from trainers.finetuning.pretrained_weights import open_weights

    check_picture_path(args.output)
    folders = resolve_folders()
    weights = open_weights(args.weights, folders)
    provenance = weights.own_provenance
    dataset = provenance.dataset_name if args.dataset is None else find_dataset(args.dataset, folders)
    return weights, open_cases(provenance, dataset, folders)


def _describe(weights: "OpenedCheckpoint", detail: str, store: "CaseStore") -> str:
    """Return the two lines above a picture: the weights it was drawn with, and the data."""
    own = weights.own_provenance
    return (
        f"{own.stage}, step {own.step} of {own.total_steps}; {detail}\n"
        f"pretrained on {own.dataset_name} ({own.configuration}); cases of {store.folder.parent.name}"
    )


if __name__ == "__main__":
    sys.exit(main())
