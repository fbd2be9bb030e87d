"""Estimates how long the rest of a study takes: from finished cells, or else from trials of their parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from trainers.benchmark.arms import Pretraining, runs_of
from trainers.benchmark.cell_times import CellTimes, median_times, times_of
from trainers.benchmark.cells import StudyCells
from trainers.benchmark.study import CellKey, Study
from trainers.benchmark.trial import PASSES, Trial, time_bare_step, try_cell
from trainers.pace import format_duration
from trainers.pretraining.progress import METRICS_CSV, read_metrics

MOST_CELLS = 12
"""Number of last finished cells that an estimate is based on."""


@dataclass(frozen=True)
class Estimate:
    """Estimated seconds of some cells, and what the estimate is made of."""

    cells: int
    training: float
    others: float
    """Set-up (if it was measured), prediction and evaluation."""
    steps: int
    what: str
    """Name of what ``others`` covers."""
    source: str

    @property
    def seconds(self) -> float:
        """Seconds of all cells in one process."""
        return self.training + self.others

    def describe(self) -> str:
        """Return the estimate in one line."""
        return (
            f"about {format_duration(self.seconds)} in one process: training {format_duration(self.training)} "
            f"({self.training / self.steps:.3g} s per step), {self.what} {format_duration(self.others)} "
            f"({self.others / self.cells:.3g} s per cell), from {self.source}"
        )


def estimate_seconds(cells: StudyCells, left: Sequence[CellKey]) -> float | None:
    """Return the seconds that cells will take, from finished cells; None if there are none.

    Args:
        cells: Cells of the study.
        left: Cells that are not trained.
    """
    if not left:
        return 0.0
    estimates = [_from_finished(cells, mode, _of_mode(left, mode)) for mode in _modes(left)]
    if any(each is None for each in estimates):
        return None
    return sum(each.seconds for each in estimates if each is not None)


def describe_estimate(cells: StudyCells) -> list[str]:
    """Return lines with the estimated duration of the rest of a study, and what it is made of."""
    study = cells.study
    lines = []
    for arm, pretraining in study.pretrainings.items():
        if not pretraining.finished:
            seconds, source = estimate_pretraining(study, pretraining)
            lines.append(f"pretraining {arm}: about {format_duration(seconds)}, from {source}")
    left = [cell for cell in study.cells if not cells.is_trained(cell)]
    if not left:
        return [*lines, "all cells are trained"]
    trial: Trial | None = None
    total = 0.0
    for mode in _modes(left):
        own = _of_mode(left, mode)
        estimate = _from_finished(cells, mode, own)
        if estimate is None:
            trial = trial or try_cell(study)
            estimate = _from_trial(study, mode, own, trial)
        total += estimate.seconds
        beginning = f"{len(own)} cells" if len(_modes(left)) == 1 else f"{len(own)} cells of mode {mode}"
        lines.append(f"{beginning}: {estimate.describe()}")
    if len(_modes(left)) > 1:
        lines.append(f"{len(left)} cells: about {format_duration(total)} in one process")
    return lines


def estimate_pretraining(study: Study, pretraining: Pretraining) -> tuple[float, str]:
    """Return the seconds that a pretraining will take, and the measurement that the estimate is based on."""
    assert study.source is not None
    seconds, source = 0.0, "measured epochs"
    folders = dict(zip(pretraining.stages, pretraining.stage_folders, strict=True))
    for run in runs_of(pretraining.method, pretraining.stages, pretraining.overrides, study.source):
        stage, training = run.stage, run.settings.training
        folder = folders[stage.name]
        logged = folder / METRICS_CSV
        epochs = read_metrics(logged)["epoch_seconds"] if logged.exists() else []
        if epochs:
            seconds += median(epochs) * training.epochs
            continue
        source = "timed steps of the bare network"
        passes = stage.encoder_graphs + stage.encoder_passes / 3  # A pass without a graph costs about a third.
        seconds += time_bare_step(study, training.batch_size) * max(passes, 1) * training.total_steps
    return seconds, source


def _from_finished(cells: StudyCells, mode: str, left: Sequence[CellKey]) -> Estimate | None:
    """Return the estimate for cells of a mode from finished cells of that mode, or else of another; None without any."""
    others = [other for other in cells.study.settings.modes if other != mode]
    for known in (mode, *others):
        times = _measured(cells, known)
        if times:
            usual = median_times(times)
            steps = sum(map(cells.study.steps, left))
            per_step = usual.seconds_per_step * PASSES[mode] / PASSES[known]
            source = f"{len(times)} finished {'cell' if len(times) == 1 else 'cells'}"
            source += "" if known == mode else f" of mode {known}"
            what = "set-up, prediction and evaluation"
            return Estimate(len(left), steps * per_step, len(left) * usual.other_seconds, steps, what, source)
    return None


def _from_trial(study: Study, mode: str, left: Sequence[CellKey], trial: Trial) -> Estimate:
    training = sum(trial.training(mode, cell.epochs, study.steps(cell)) for cell in left)
    source = "timed steps of the bare network, nnU-Net's augmentation and tiles, and one evaluated case"
    afterwards = len(left) * trial.afterwards
    steps = sum(map(study.steps, left))
    return Estimate(len(left), training, afterwards, steps, "prediction and evaluation", source)


def _measured(cells: StudyCells, mode: str) -> list[CellTimes]:
    """Return how long the last finished cells of a mode took."""
    finished = [cell for cell in cells.study.cells if cell.mode == mode and cells.is_trained(cell)][-MOST_CELLS:]
    found = [times_of(cells.folder(cell), cells.study.steps(cell)) for cell in finished]
    return [times for times in found if times is not None]


def _modes(cells: Sequence[CellKey]) -> list[str]:
    return list(dict.fromkeys(cell.mode for cell in cells))


def _of_mode(cells: Sequence[CellKey], mode: str) -> list[CellKey]:
    return [cell for cell in cells if cell.mode == mode]
