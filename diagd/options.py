"""What a verb can be told: one dataclass is its flags, its ``--set``, its help and the library's argument.

A `flag` or a `positional` is one of the command line, a `setting` stands behind ``--set name=value``; fields
without a description are for callers in Python. A dataclass inside one is a group:
``--set group.name=value``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, cast

import pydantic.dataclasses
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from typing_extensions import dataclass_transform

from diagd.errors import UsageError, fault

FLAG = "flag"
"""Where a field keeps its `Flag`."""

Class = TypeVar("Class")


@dataclass_transform(frozen_default=True)
def checked(options: type[Class]) -> type[Class]:
    """Make a class a dataclass of options, whose finite values pydantic checks, and which takes no others."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
    made: Any = pydantic.dataclasses.dataclass(frozen=True, config=config)(options)
    init = made.__init__

    @wraps(init)
    def refuse(self: Any, *values: Any, **named: Any) -> None:
        try:
            init(self, *values, **named)
        except ValidationError as error:
            raise UsageError(f"{options.__name__}: {fault(error)}") from error

    made.__init__ = refuse
    return cast(type[Class], made)


class Frozen(BaseModel):
    """Data that is written and read again: nothing of it changes, and nothing else belongs to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Flag:
    """Makes a field a flag, of another ``name`` or of none where it is ``positional``.

    ``count`` is of its values, as argparse counts them: a number, or ``+`` for one or more.
    """

    name: str | None = None
    positional: bool = False
    count: int | str | None = None
    metavar: str | Sequence[str] | None = None
    repeated: bool = False


SEED: Final[dict[str, Any]] = {"ge": 0, "lt": 1 << 63}
"""Limits of a seed: NumPy takes none below 0, PyTorch none above."""


def setting(description: str, default: Any = ..., **limits: Any) -> Any:
    """A field behind ``--set``; without a default it must be given. ``limits`` are ``pydantic.Field``'s."""
    return Field(default, description=description, **limits)


def flag(description: str, default: Any = ..., how: Flag | None = None, **limits: Any) -> Any:
    """A field that is a flag; see `Flag` and `setting`."""
    told: Any = {FLAG: how or Flag()}
    return Field(default, description=description, json_schema_extra=told, **limits)


def positional(description: str, default: Any = ..., **limits: Any) -> Any:
    """A field that is an argument without a name; see `setting`."""
    return flag(description, default, Flag(positional=True), **limits)


def _path(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError("the path is empty (a variable that is not set?); give a path")
    if "\0" in value:
        raise ValueError("no path holds a null character")
    return os.path.expanduser(value) if value.startswith("~/") else value  # noqa: PTH111


def _numbers(value: object) -> object:
    try:
        return tuple(map(int, value.split(","))) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError("expected whole numbers such as 1,2,4") from error


def _names(value: object) -> object:
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


def _size(value: object) -> object:
    if not isinstance(value, str):
        return value
    height, _, width = value.partition("x")
    if not all(re.fullmatch("[1-9][0-9]{0,4}", side) for side in (height, width)):
        raise ValueError("expected HEIGHTxWIDTH, such as 72x96")
    return int(height), int(width)


SIZE = BeforeValidator(_size)
"""Reads the height and width of a picture."""

NAMES = BeforeValidator(_names)
"""Reads words between commas."""

File = Annotated[Path, BeforeValidator(_path)]
"""A path; an empty one is mostly a variable that was never set, and shells leave ``--x=~/y`` as it is."""

Numbers = Annotated[tuple[int, ...], BeforeValidator(_numbers)]
"""Whole numbers between commas."""
