"""The messages of a run: they reach the user through ``nnssl.log`` and are written to the training log file as well."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from nnssl.log import LineHandler, logger, silence


class RunLog:
    """Passes messages to the user and to a log file, in the first process only.

    Args:
        write: Function that writes one line to the log file.
        is_first: Whether this is the first process; the others pass on nothing.
    """

    def __init__(self, write: Callable[[str], None], is_first: bool) -> None:
        self.write = write
        self.is_first = is_first

    def tell(self, line: str, level: int = logging.INFO) -> None:
        """Write a line to the log file and log it for the user; the log file receives it whatever level the user chose."""
        if self.is_first:
            self.write(line)
            logger.log(level, line)

    def tell_all(self, lines: Sequence[str], details: Sequence[str]) -> None:
        """Pass on some lines to the user and the log file, and others to the log file only."""
        for line in lines:
            self.tell(line)
        if self.is_first:
            for line in details:
                self.write(line)

    @contextmanager
    def including_others(self) -> Iterator[None]:
        """Write what other modules log inside a ``with`` block to the log file as well."""
        if not self.is_first:
            with silence():
                yield
            return
        handler = LineHandler()
        handler.receive = self.write
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
