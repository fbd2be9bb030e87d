"""The error that stands for one case that cannot be used, as against a ``UserError``, which ends a command."""


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
