"""The cells of a study as they are on disk: where each lies, what it starts from, whether it is finished, what was measured."""

from functools import cached_property
from pathlib import Path

from nnssl.evaluation.labels import foreground_labels
from nnssl.evaluation.metrics import read_metrics_csv
from nnssl.log import logger
from nnssl.study.statistics import tabulate
from nnssl.study.table import Cell, StudyTable
from nnssl.weights.opened_checkpoint import OpenedCheckpoint
from nnssl.weights.tensor_names import SEGMENTATION
from trainers.benchmark.study import CellKey, Study
from trainers.finetuning.arm import arm_folder
from trainers.finetuning.pretrained_weights import open_weights, start_digest
from trainers.finetuning.result import FILE_NAME


class StudyCells:
    """Looks at the cells of a study; nothing is written.

    Args:
        study: which cells there are.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.opened: dict[str, OpenedCheckpoint] = {}
        self.starts: dict[str, str] = {}
        """The arm that was opened first, by what the network takes from its weights."""
        self.classes = foreground_labels(study.dataset_json)

    def weights(self, arm: str) -> OpenedCheckpoint | None:
        """Open the checkpoint of an arm; None for scratch.

        Raises:
            UserError: it is not there, or was made with another plan.
        """
        path = self.study.weights_path(arm)
        if path is None:
            return None
        if arm not in self.opened:
            weights = open_weights(path, self.study.folders)
            first = self.starts.setdefault(start_digest(weights, self.taken), arm)
            if first != arm:
                logger.info(
                    f"{arm}: gives {self.study.configuration} the same weights as {first}, so its cells are those of {first}; "
                    f"what else it trained has a place in {weights.own_provenance.configuration} only"
                )
            # a study keeps all arms open, so it must not keep their tensors
            self.opened[arm] = weights.without_content() if first == arm else self.opened[first]
        return self.opened[arm]

    @cached_property
    def taken(self) -> list[str]:
        """Names of the tensors that the fine-tuned network takes from pretraining: all but the segmentation layers."""
        return [name for name in self.study.build_network().state_dict() if SEGMENTATION not in name]

    def has_weights(self, arm: str) -> bool:
        """Whether the weights of an arm are there."""
        path = self.study.weights_path(arm)
        return path is None or path.exists()

    def folder(self, cell: CellKey) -> Path:
        """Return the model folder of a cell; its weights must be there."""
        return arm_folder(self.study.task(cell), self.weights(cell.arm), self.study.folders)

    def predictions(self, cell: CellKey) -> Path:
        """Return the folder of a cell's segmentations of the held-out cases."""
        return self.folder(cell) / "fold_0" / "validation"

    @property
    def references(self) -> Path:
        """The folder of the segmentations that they are compared with."""
        return self.study.folders.preprocessed / self.study.dataset.name / "gt_segmentations"

    def metrics_path(self, cell: CellKey) -> Path:
        """Return where the metrics of a cell are kept."""
        return self.folder(cell) / f"metrics_{self.study.settings.tolerance_mm:g}mm.csv"

    def is_finished(self, cell: CellKey) -> bool:
        """Whether a cell was trained and evaluated."""
        return self.has_weights(cell.arm) and self.metrics_path(cell).exists()

    def is_trained(self, cell: CellKey) -> bool:
        """Whether the network of a cell is there, evaluated with this tolerance or not."""
        return self.has_weights(cell.arm) and (self.folder(cell) / FILE_NAME).exists()

    def read(self, cell: CellKey) -> Cell:
        """Return a finished cell."""
        metrics = tuple(read_metrics_csv(self.metrics_path(cell)))
        return Cell(cell.arm, cell.mode, cell.labels, cell.seed, self.study.steps(cell), metrics)

    def finished(self) -> list[Cell]:
        """Return all cells that are finished, whoever made them."""
        return [self.read(cell) for cell in self.study.cells if self.is_finished(cell)]

    def table(self) -> StudyTable:
        """Return the table of the finished cells."""
        return tabulate(self.finished(), self.study.settings.tolerance_mm)
