"""Progress of the predictions of held-out cases, which nnU-Net announces in its log one by one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nnssl.data.jobs import CaseProgress

ANNOUNCEMENT = "predicting "
"""Beginning of the line that nnU-Net's trainer logs before it predicts a case."""


@contextmanager
def predictions_followed(trainer: Any, total: int) -> Iterator[None]:
    """Show the progress of the predictions that a trainer makes inside a ``with`` block.

    Args:
        trainer: A trainer of nnU-Net.
        total: Number of cases to predict.
    """
    write = trainer.print_to_log_file
    with CaseProgress("predicting", "predicted", total) as progress:

        def write_and_count(*args: Any, **options: Any) -> None:
            if args and str(args[0]).startswith(ANNOUNCEMENT):
                progress.begin()
            write(*args, **options)

        trainer.print_to_log_file = write_and_count
        try:
            yield
            progress.end()
        finally:
            del trainer.print_to_log_file
