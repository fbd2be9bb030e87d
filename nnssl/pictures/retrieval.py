"""The retrieval of views by every pretrained stage of a checkpoint, beside random weights and chance, as a table and a figure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

from nnssl.data.case_store import CaseStore
from nnssl.data.patients import set_aside
from nnssl.errors import UserError
from nnssl.evaluation.view_retrieval import (
    PATCHES,
    Retrieval,
    draw_view_pairs,
    measure_retrieval,
    smallest_patch,
)
from nnssl.networks.primus_positions import is_primus
from nnssl.palette import BLUE, ORANGE
from nnssl.weights.opened_checkpoint import OpenedCheckpoint

ROW_INCHES = 0.42
FONT_SIZE = 9
PANELS = {"pooled": "other view of a patch", "points": "same point in the other view"}


@dataclass(frozen=True)
class MeasuredWeights:
    """Retrieval by the weights of a checkpoint.

    Attributes:
        found: Retrieval by every pretrained stage.
        random: The same with random weights.
        chance: Expected retrieval by features that say nothing.
        cases: Names of the cases that were measured on.
        set_aside: Whether these cases were left out of the training of all methods.
    """

    found: dict[str, Retrieval]
    random: dict[str, Retrieval]
    chance: Retrieval
    cases: tuple[str, ...]
    set_aside: bool


def measure_weights(weights: OpenedCheckpoint, store: CaseStore, device: torch.device) -> MeasuredWeights:
    """Measure the retrieval of views by a checkpoint of pretraining, and by random weights of the same network.

    Args:
        weights: The checkpoint.
        store: Preprocessed cases; those that pretraining sets aside are used if there are any.
        device: Device for the computation.

    Raises:
        UserError: If the weights do not fit the network of the plan.
    """
    provenance = weights.own_provenance
    configuration = weights.plan.configuration(provenance.configuration)
    own = tuple(provenance.settings.get("patch_size") or configuration.patch_size)
    # A finished stage hands its weights on for the patch of the plan, on which only Primus depends.
    built_for = configuration.patch_size if provenance.finished else own
    network = weights.build_network(provenance.seed, built_for)
    patch = built_for if is_primus(network) else smallest_patch(configuration)
    aside = set_aside(store.names)
    cases = aside or tuple(store.names)
    pairs = draw_view_pairs(store, cases, patch, configuration, PATCHES)
    network = network.to(device)
    random = measure_retrieval(network, pairs, provenance.pretrained, {}, device)
    try:
        network.load_state_dict(weights.content["network_weights"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{weights.path}: its weights do not fit the network of its plan ({reason}); pretrain again"
        ) from error
    found = measure_retrieval(network, pairs, provenance.pretrained, {}, device)
    return MeasuredWeights(found, random, pairs.chance, cases, bool(aside))


def retrieval_rows(measured: MeasuredWeights) -> list[tuple[str, ...]]:
    """Return a table: one row for each stage and one for chance, with the values of the weights and of random ones."""
    header = ("stage", "patches", "random", "points", "random")
    rows = [
        (
            name,
            f"{own.pooled:.3f}",
            f"{measured.random[name].pooled:.3f}",
            f"{own.points:.3f}",
            f"{measured.random[name].points:.3f}",
        )
        for name, own in measured.found.items()
    ]
    return [header, *rows, ("chance", f"{measured.chance.pooled:.3f}", "", f"{measured.chance.points:.3f}", "")]


def retrieval_figure(measured: MeasuredWeights, title: str) -> Figure:
    """Draw the retrieval by every stage as bars, with random weights as marks and chance as a line.

    Args:
        measured: Retrieval by the weights of a checkpoint.
        title: Title of the figure.
    """
    names = list(measured.found)
    figure = Figure(figsize=(8, 1.6 + ROW_INCHES * len(names)), layout="constrained")
    figure.suptitle(title, fontsize=FONT_SIZE, x=0.01, ha="left")
    for axes, (kind, what) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
        _draw_bars(axes, kind, measured.found, measured.random)
        axes.axvline(getattr(measured.chance, kind), color="black", linewidth=1, linestyle=":", label="chance")
        axes.set_title(what, loc="left", fontsize=FONT_SIZE)
        axes.set_xlim(left=0)
        axes.set_xlabel("share found", fontsize=FONT_SIZE)
        axes.tick_params(labelsize=FONT_SIZE)
        axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=FONT_SIZE, frameon=False)
    return figure


def _draw_bars(axes: Any, kind: str, found: Mapping[str, Retrieval], random: Mapping[str, Retrieval]) -> None:
    places = range(len(found))
    axes.barh(places, [getattr(each, kind) for each in found.values()], color=BLUE, height=0.6, label="these weights")
    values = [getattr(random[name], kind) for name in found]
    axes.plot(values, places, "D", color=ORANGE, markeredgecolor="black", markersize=5, label="random weights")
