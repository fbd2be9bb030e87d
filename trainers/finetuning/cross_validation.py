"""nnU-Net's cross-validation: the predictions of all folds of an arm, collected and evaluated together."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from nnssl.data.inline_pool import without_workers
from nnssl.log import logger, printed_output_to
from nnssl.tables import points
from trainers.finetuning.arm import Task
from trainers.finetuning.labelled_cases import FOLDS
from trainers.finetuning.result import FILE_NAME, ArmResult, read_dice


def cross_validate(task: Task, result: ArmResult) -> Path | None:
    """Collect the held-out predictions of all folds and evaluate them, as nnU-Net's ``find_best_configuration`` does.

    Args:
        task: Task of one of the folds.
        result: Result of this fold.

    Returns:
        nnU-Net's ``summary.json`` of all cases; None if a fold is not finished.
    """
    from nnunetv2.evaluation import accumulate_cv_results, evaluate_predictions

    folder = Path(result.model_folder)
    folds = tuple(range(FOLDS))
    if not all((folder / f"fold_{fold}" / FILE_NAME).exists() for fold in folds):
        return None
    merged = folder / f"crossval_results_folds_{'_'.join(map(str, folds))}"
    on_cpu = task.device.type == "cpu"
    with (
        printed_output_to(folder / "nnunet_output.txt"),
        without_workers(evaluate_predictions) if on_cpu else nullcontext(),
    ):
        accumulate_cv_results.accumulate_cv_results(str(folder), str(merged), folds, task.processes, overwrite=True)
    return merged / "summary.json"


def log_cross_validation(finished: Sequence[tuple[Task, ArmResult]]) -> None:
    """Evaluate every arm whose folds are all finished, and log its Dice over all cases and the commands that follow.

    Args:
        finished: Task and result of every fold of this call.
    """
    last = {result.model_folder: (task, result) for task, result in finished if isinstance(task.split.fold, int)}
    for task, result in last.values():
        summary = cross_validate(task, result)
        if summary is None:
            continue
        cases = sorted({*task.split.train, *task.split.test})
        dice, mean = read_dice(summary, task.dataset_json["labels"], cases)
        each = ", ".join(f"{name} {points(value)}" for name, value in dice.items())
        logger.info(
            f"{result.arm}, cross-validation over {FOLDS} folds, {len(cases)} cases: Dice {points(mean)} points ({each})"
        )
        logger.info(f"{result.arm}: {summary}")
        logger.info(
            f"{result.arm}: nnUNetv2_find_best_configuration {task.dataset_name} -p {task.plan.name} -c {task.configuration} "
            f"-tr {Path(result.model_folder).name.split('__')[0]}"
        )
