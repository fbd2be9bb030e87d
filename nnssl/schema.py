"""Reading and writing of the files between stages: dataclasses whose keys, types and version are checked."""

import json
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from nnssl.errors import UserError
from nnssl.files import read_json, write_json

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
"""Value of ``__pydantic_config__`` in every dataclass that is read from a file."""

WRITE_AGAIN = "write the file again with this version of nnssl"


def parse(cls: type[T], content: Any, source: str, advice: str = WRITE_AGAIN) -> T:
    """Turn plain JSON content into a dataclass, checking its version and every key and type.

    Args:
        cls: Frozen dataclass with ``__pydantic_config__ = STRICT``. If it has a field ``schema_version``, its class
            attribute ``__schema_version__`` is the version that is accepted.
        content: Dicts, lists, strings, numbers, booleans and None.
        source: What is being read (a path), for the error message.
        advice: What the user can do, for the error message.

    Returns:
        The dataclass.

    Raises:
        UserError: If the content has another schema version, an unknown or a missing key, or a value of the wrong type.
            The message names the source and the key.
    """
    if any(field.name == "schema_version" for field in fields(cls)):  # type: ignore[arg-type]
        check_version(content, cls.__schema_version__, source, advice)  # type: ignore[attr-defined]
    try:
        return _adapter_of(cls).validate_json(json.dumps(content))  # type: ignore[arg-type]
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}" for problem in error.errors()[:3]
        )
        raise UserError(f"{source}: {problems}; {advice}") from error


@cache
def _adapter_of(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)  # takes some twenty times as long as reading a small file with it


def check_version(content: Any, expected: int, source: str, advice: str = WRITE_AGAIN) -> None:
    """Check the ``schema_version`` of content that was read from a file.

    Raises:
        UserError: If the content has another version or none. The message names the source and both versions.
    """
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != expected:
        raise UserError(f"{source}: schema_version must be {expected}, got {found}; {advice}")


def read(cls: type[T], path: Path, what: str, advice: str = WRITE_AGAIN) -> T:
    """Read a dataclass from a JSON file; ``what`` names the kind of file in error messages. See ``parse``."""
    return parse(cls, read_json(path, what), str(path), advice)


def write(path: Path, content: Any) -> None:
    """Write a dataclass to a JSON file atomically."""
    write_json(path, asdict(content))
