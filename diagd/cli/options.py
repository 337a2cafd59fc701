"""Dataclasses of options as flags and ``--set name=value``, and their help."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from diagd.errors import UsageError, unknown
from diagd.options import FLAG, Flag

Options = TypeVar("Options")
Path = tuple[str, ...]
"""Names of the groups that a field is in, and its own."""


@dataclass(frozen=True)
class Verb(Generic[Options]):
    """What the command line runs: what it can be told, what does it, giving exit codes but 0, examples.

    A task of a verb has a ``summary``; what a verb with ``prints`` prints is its result.
    """

    options: type[Options]
    run: Callable[[Options], int | None]
    examples: str
    summary: str = ""
    prints: bool = False


@dataclass(frozen=True)
class Entry:
    """A field of a dataclass of options, or of a group in it."""

    path: Path
    field: FieldInfo

    @property
    def flag(self) -> Flag | None:
        """How it is given on the command line; None: behind ``--set``."""
        extra = self.field.json_schema_extra
        found = extra.get(FLAG) if isinstance(extra, dict) else None
        return found if isinstance(found, Flag) else None

    @property
    def choices(self) -> tuple[str, ...]:
        """Values that its type allows, where they have names."""
        for kind in _kinds(self.field.annotation):
            if isinstance(kind, type) and issubclass(kind, Enum):
                return tuple(str(member.value) for member in kind)
            if get_origin(kind) is Literal:
                return tuple(map(str, get_args(kind)))
        return ()

    @property
    def is_path(self) -> bool:
        """Whether it is one, which says itself what is wrong with it."""
        return pathlib.Path in _kinds(self.field.annotation)

    @property
    def help(self) -> str:
        """Its description, values and default."""
        text, default = self.field.description or "", self.field.default
        if self.choices and not all(choice in text for choice in self.choices):
            text += f": {', '.join(self.choices)}"
        if self.field.is_required() or default in (None, False, "", ()) or "default" in text:
            return text
        return f"{text} (default {_shown(default)})"

    @property
    def name(self) -> str:
        """On the command line, where it is a flag."""
        assert self.flag is not None
        name = self.flag.name or self.path[-1].replace("_", "-")
        return name.upper() if self.flag.positional else f"--{name}"


def entries(options: type[Any], at: Path = ()) -> Iterator[Entry]:
    """All that can be told on the command line, that of groups included."""
    fields: Mapping[str, FieldInfo] = options.__pydantic_fields__
    for name, field in fields.items():
        if isinstance(group := field.annotation, type) and hasattr(group, "__pydantic_fields__"):
            yield from entries(group, (*at, name))
        elif field.description:
            yield Entry((*at, name), field)


def add_options(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    """Add the flags, and ``--set`` with a list of what stands behind it."""
    for entry in entries(options):
        if entry.flag is not None:
            _add_flag(parser, entry, entry.flag)
    if settable := _settable(options):
        lines = [f"  {name}: {entry.help}" for name, entry in settable.items()]
        group = parser.add_argument_group("further options", "\n".join(lines))
        group.add_argument(
            "--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="one of them"
        )


def read_options(options: type[Options], given: argparse.Namespace) -> Options:
    """The options that a parsed command line gives; see `parse_options`."""
    found = vars(given)
    flags = {entry.path: found[dest] for entry in entries(options) if (dest := "/".join(entry.path)) in found}
    return parse_options(options, found.get("settings", ()), flags)


def parse_options(
    options: type[Options], pairs: Sequence[str], flags: Mapping[Path, Any] | None = None
) -> Options:
    """Options of flags, and of ``name=value`` pairs.

    Raises:
        UsageError: a pair has no '=', an unknown name, or a value is of the wrong type.
    """
    known, settable, values = {e.path: e for e in entries(options)}, _settable(options), dict(flags or {})
    said = {path: f"{known[path].name} {_shown(value)}" for path, value in values.items()}
    for path, value in values.items():
        if isinstance(value, str) and not value.strip() and not known[path].is_path:
            raise UsageError(f"{said[path]}: the value is empty (a variable that is not set?); give one")
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE, got '{pair}'")
        if not value.strip():
            raise UsageError(f"--set {name}: the value is empty (a variable that is not set?); give one")
        entry = settable.get(name) or next((e for e in settable.values() if ".".join(e.path) == name), None)
        if entry is None:
            if named := [e.name for e in known.values() if e.flag and e.path[-1] == name]:
                raise UsageError(f"unknown option of --set '{name}': it is no setting, give {named[0]}")
            raise unknown("option of --set", name, settable)
        values[entry.path], said[entry.path] = value, f"--set {pair}"
    try:
        return TypeAdapter(options).validate_python(_nested(values))
    except ValidationError as error:
        raise _explained(error, known, said) from error


def explain_stray(options: type[Any], word: str) -> str:
    """What to say of a word on the command line that is none of the options."""
    name, settable = word.partition("=")[0].strip("-").replace("-", "_"), _settable(options)
    if word.startswith("--") and name in settable:
        return f"{word} is no flag: give --set {name}=VALUE"
    flags = [entry.name for entry in entries(options) if entry.flag and not entry.flag.positional]
    return str(unknown("option", word, flags))


def _explained(error: ValidationError, known: Mapping[Path, Entry], said: Mapping[Path, str]) -> UsageError:
    """The first thing that is wrong, where it was said."""
    first = error.errors()[0]
    place = tuple(map(str, first["loc"]))
    entry = next((entry for path, entry in known.items() if place[: len(path)] == path), None)
    message = first["msg"].removeprefix("Value error, ")
    if entry is None:
        return UsageError(message)
    if first["type"] in ("enum", "literal_error"):
        message = str(unknown(entry.path[-1].replace("_", " "), str(first["input"]), entry.choices))
    return UsageError(f"{said.get(entry.path, '.'.join(entry.path))}: {message}")


def _settable(options: type[Any]) -> dict[str, Entry]:
    """Options behind ``--set`` by name: the field's, with its groups where several fields have it."""
    everything = list(entries(options))
    names = [entry.path[-1] for entry in everything]
    return {
        entry.path[-1] if names.count(entry.path[-1]) == 1 else ".".join(entry.path): entry
        for entry in everything
        if entry.flag is None
    }


def _add_flag(parser: argparse.ArgumentParser, entry: Entry, flag: Flag) -> None:
    dest, required = "/".join(entry.path), entry.field.is_required()
    details: dict[str, Any] = {"help": entry.help.replace("%", "%%"), "default": argparse.SUPPRESS}
    if entry.field.annotation is bool:
        details["action"] = "store_true"
    else:
        details |= {"nargs": flag.count, "metavar": flag.metavar or entry.name.lstrip("-").upper()}
    if flag.repeated:
        details["action"] = "append"
    if flag.positional:
        parser.add_argument(dest, **details | {"nargs": flag.count or (None if required else "?")})
    else:
        parser.add_argument(entry.name, dest=dest, required=required, **details)


def _kinds(annotation: Any) -> Iterator[Any]:
    """A type and all that it is made of."""
    yield annotation
    for part in () if get_origin(annotation) is Literal else get_args(annotation):
        yield from _kinds(part)


def _nested(values: Mapping[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = value
    return tree


def _shown(value: object) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, list | tuple):
        return ",".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
