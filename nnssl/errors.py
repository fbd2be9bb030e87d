"""Errors that the user can fix, and that of a training whose loss is not finite."""

import re
from collections.abc import Mapping


class UserError(Exception):
    """An error that the user can fix. Its message is one line that names the thing, what is wrong and what to do.

    Commands print the message and exit with code 2; ``--verbose`` adds the traceback.
    """


class ArgumentError(UserError):
    """A wrong argument. Python callers read the argument's name, users of a command the flag.

    Args:
        message: One line that names the arguments as in Python: ``"epochs must be at least 1, got 0"``.
        arguments: Names of the arguments in the message.
    """

    def __init__(self, message: str, *arguments: str) -> None:
        super().__init__(message)
        self.arguments = arguments

    def with_flags(self, flags: Mapping[str, str]) -> str:
        """Return the message with every argument replaced by the command's flag for it, if the command has one.

        Parts of paths and file names are not replaced.
        """
        text = str(self)
        for name in self.arguments:
            text = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w/-]|\.\w)", flags.get(name, name), text)
        return text


class DivergedError(RuntimeError):
    """The loss of an epoch is not finite."""
