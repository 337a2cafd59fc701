"""``--set name=value``: the options behind the flags, typed by a pydantic model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from diagd.errors import UsageError, unknown

Settings = TypeVar("Settings", bound=BaseModel)


def add_set_option(parser: argparse.ArgumentParser, model: type[BaseModel]) -> None:
    """Add ``--set`` to a verb; its help lists every option with its default."""
    lines = [f"{name}={field.default}: {field.description}" for name, field in model.model_fields.items()]
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="; ".join(lines).replace("%", "%%"),
    )


def parse_settings(model: type[Settings], pairs: Sequence[str]) -> Settings:
    """Values of ``--set``.

    Raises:
        UsageError: a pair has no '=', an unknown name or a value of the wrong type.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE, got '{pair}'")
        if not value.strip():
            raise UsageError(f"--set {name}: the value is empty (a variable that is not set?); give one")
        if name not in model.model_fields:
            raise unknown("option of --set", name, model.model_fields)
        values[name] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--set {first['loc'][0]}={first['input']}: {first['msg']}") from error
