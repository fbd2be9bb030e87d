"""The cells of a study on disk: their folders, initial weights, state and metrics."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from nnssl.evaluation.labels import foreground_labels
from nnssl.evaluation.metrics import read_metrics_csv
from nnssl.log import logger
from nnssl.study.statistics import tabulate
from nnssl.study.table import Cell, StudyTable
from nnssl.weights.opened_checkpoint import OpenedCheckpoint
from nnssl.weights.tensor_names import SEGMENTATION
from trainers.benchmark.rates import with_chosen_rates
from trainers.benchmark.study import CellKey, Study
from trainers.finetuning.arm import Task, arm_folder, changes_of_arm
from trainers.finetuning.case_contents import Changes
from trainers.finetuning.pretrained_weights import open_weights, start_digest
from trainers.finetuning.result import FILE_NAME


class StudyCells:
    """Read access to the cells of a study.

    Args:
        study: The study.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.opened: dict[str, OpenedCheckpoint] = {}
        self.starts: dict[str, str] = {}
        """First arm that was opened, by the digest of the weights that it gives to the network."""
        self.classes = foreground_labels(study.dataset_json)

    def weights(self, arm: str) -> OpenedCheckpoint | None:
        """Open the checkpoint of an arm; None for scratch.

        Raises:
            UserError: If it does not exist or was made with another plan.
        """
        path = self.study.weights_path(arm)
        if path is None:
            return None
        if arm not in self.opened:
            weights = open_weights(path, self.study.folders)
            first = self.starts.setdefault(start_digest(weights, self.taken), arm)
            if first != arm:
                logger.info(
                    f"{arm}: {self.study.configuration} starts with the same weights as {first}, so the cells of {first} are "
                    f"used; the other weights of {arm} belong to parts that only {weights.own_provenance.configuration} has"
                )
            # a study keeps all arms open, so it must not keep their tensors
            self.opened[arm] = weights.without_content() if first == arm else self.opened[first]
        return self.opened[arm]

    @cached_property
    def taken(self) -> list[str]:
        """Names of the tensors that the fine-tuned network takes from pretraining: all except the segmentation layers."""
        return [name for name in self.study.build_network().state_dict() if SEGMENTATION not in name]

    def has_weights(self, arm: str) -> bool:
        """Return whether the weights of an arm exist."""
        path = self.study.weights_path(arm)
        return path is None or path.exists()

    def folder(self, cell: CellKey) -> Path:
        """Return the model folder of a cell, whose initial weights must exist."""
        return arm_folder(self.study.task(cell), self.weights(cell.arm), self.study.folders)

    def predictions(self, cell: CellKey) -> Path:
        """Return the folder of a cell's segmentations of the held-out cases."""
        return self.folder(cell) / "fold_0" / "validation"

    @property
    def references(self) -> Path:
        """Folder of the reference segmentations."""
        return self.study.folders.preprocessed / self.study.dataset.name / "gt_segmentations"

    def metrics_path(self, cell: CellKey) -> Path:
        """Return the file with the metrics of a cell."""
        return self.folder(cell) / f"metrics_{self.study.settings.tolerance_mm:g}mm.csv"

    def validation_path(self, cell: CellKey) -> Path:
        """Return the file with the metrics of a cell's validation cases."""
        return self.folder(cell) / f"metrics_validation_{self.study.settings.tolerance_mm:g}mm.csv"

    def task(self, cell: CellKey) -> Task:
        """Return the fine-tuning task of a cell with the present state of its cases."""
        return replace(self.study.task(cell), contents=self.study.contents)

    def changes(self, cell: CellKey) -> Changes:
        """Return what has changed in the cases of a cell since it was trained and scored."""
        return changes_of_arm(self.task(cell), self.folder(cell))

    def is_finished(self, cell: CellKey) -> bool:
        """Return whether a cell was trained and evaluated, on images and labels that have not changed since."""
        # the metrics of the held-out cases are written last
        return self.has_weights(cell.arm) and self.metrics_path(cell).exists() and not self.changes(cell)

    def is_trained(self, cell: CellKey) -> bool:
        """Return whether the network of a cell was trained, evaluated with this tolerance or not."""
        trained = self.has_weights(cell.arm) and (self.folder(cell) / FILE_NAME).exists()
        return trained and not self.changes(cell).trained

    def read(self, cell: CellKey, validation: bool = False) -> Cell:
        """Read a finished cell, with the metrics of its held-out or of its validation cases."""
        path = self.validation_path(cell) if validation else self.metrics_path(cell)
        metrics = tuple(read_metrics_csv(path))
        return Cell(cell.arm, cell.mode, cell.labels, cell.seed, self.study.steps(cell), metrics)

    def finished(self) -> list[Cell]:
        """Read all finished cells, including those of other studies and parts, each arm with the rate that was chosen for it.

        Where cells of some rates are missing, the choice is open, and the arm is left out.
        """
        return [self.read(cell) for cell in self.reported()]

    def reported(self) -> list[CellKey]:
        """Return the finished cells with the chosen rates."""
        done = [cell for cell in self.study.cells if self.is_finished(cell)]
        return with_chosen_rates(self, done)

    def table(self) -> StudyTable:
        """Return the table of the finished cells."""
        return tabulate(self.finished(), self.study.settings.tolerance_mm)
