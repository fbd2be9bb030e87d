"""Extension of Griffe, which reads the source for the documentation site: signatures without class variables.

Griffe takes a class variable annotated with a bare ``ClassVar`` for a field of the dataclass, and shows it as an argument.
"""

from typing import Any

from griffe import Class, Extension


class WithoutPydanticConfig(Extension):
    """Leaves Pydantic's configuration out of every class."""

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        """Remove it before the fields of dataclasses are read."""
        cls.members.pop("__pydantic_config__", None)
