"""Cases that cannot be used: the error that stands for one, as against a ``UserError``, and the note that is kept of it."""

from dataclasses import dataclass
from typing import ClassVar

from nnssl.schema import STRICT

MOST_SET_ASIDE = 0.1
"""Share of the cases that may be unusable before something is taken to be wrong with the data set."""


@dataclass(frozen=True)
class SetAside:
    """A case or file that is not used, and why."""

    __pydantic_config__: ClassVar = STRICT

    case: str
    file: str
    reason: str


class CaseError(Exception):
    """A case that cannot be used.

    Attributes:
        file: the image file at fault.
        reason: what is wrong with it.
    """

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file = file
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"
