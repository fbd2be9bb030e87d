"""Files between stages are dataclasses: one reader and one writer, and an unknown or missing key is an error."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from nnssl.errors import UserError
from nnssl.files import read_json, write_json

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
"""What a dataclass that is read from a file sets as its ``__pydantic_config__``."""


def parse(cls: type[T], content: Any, source: str) -> T:
    """Turn plain JSON content into a dataclass, checking every key and type.

    Args:
        cls: a frozen dataclass with ``__pydantic_config__ = STRICT``.
        content: dicts, lists, strings, numbers, booleans and None.
        source: what is being read (a path), for the error message.

    Raises:
        UserError: a key is unknown or missing or a value has the wrong type; names the source and the key.
    """
    try:
        return TypeAdapter(cls).validate_json(json.dumps(content))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}" for problem in error.errors()[:3]
        )
        raise UserError(f"{source}: {problems}; write the file again with this version of nnssl") from error


def read(cls: type[T], path: Path, what: str) -> T:
    """Read a dataclass from a JSON file; ``what`` names the file's kind in an error message."""
    return parse(cls, read_json(path, what), str(path))


def write(path: Path, content: Any) -> None:
    """Write a dataclass as JSON, atomically."""
    write_json(path, asdict(content))
