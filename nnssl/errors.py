"""The error that a user's input can cause."""


class UserError(Exception):
    """Something the user can mend: its message is one line that names the thing, what is wrong and what to do.

    Commands print the message and end with exit code 2; ``--verbose`` adds the traceback.
    """
