"""Griffe extension that removes class variables from the signatures on the documentation site.

Griffe reads the source code. It mistakes a class variable annotated with a bare ``ClassVar`` for a field of the dataclass and
shows it as an argument.
"""

from typing import Any

from griffe import Class, Extension


class WithoutPydanticConfig(Extension):
    """Extension that removes Pydantic's configuration from every class."""

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        """Remove the configuration before the fields of dataclasses are read."""
        cls.members.pop("__pydantic_config__", None)
