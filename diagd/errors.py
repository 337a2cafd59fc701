"""The one tree of errors a user of diagd sees.

A message says what failed, the value seen, the value expected, and how to fix it. The command line prints
it as one line and exits with ``exit_code``: 2 where the user can mend it, 1 where the fault is ours.
"""

from __future__ import annotations

import difflib
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from numbers import Integral, Real
from types import ModuleType, NoneType, UnionType
from typing import TYPE_CHECKING, Any, Final, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from pydantic import ValidationError


class DiagdError(Exception):
    """Base of every error raised on purpose by diagd."""

    exit_code = 2

    def __str__(self) -> str:
        # paths need not be Unicode, and a message must be printable wherever it goes
        return super().__str__().encode(errors="backslashreplace").decode()


class UsageError(DiagdError):
    """An argument, option or input file is wrong."""


class ScheduleError(DiagdError):
    """A decoding schedule that cannot be run."""


class BundleError(DiagdError):
    """A bundle that is missing, damaged, altered or of another version."""


class CheckpointError(DiagdError):
    """A checkpoint that cannot be read or does not fit the model."""


class DependencyError(DiagdError):
    """An optional package that this operation needs is not installed."""


class EngineError(DiagdError):
    """A backend refused to compile or run a graph."""

    exit_code = 1


class QualityError(DiagdError):
    """A result that is worse than its gate allows."""

    exit_code = 1


def command_line(*words: str) -> str:
    """A command as the shells of this system take it; in single quotes, those of Windows do not."""
    if sys.platform == "win32":
        return " ".join(
            word if re.fullmatch(r"[\w\-.,:/\\=@+~\[\]]+", word) else f'"{word}"' for word in words
        )
    return shlex.join(words)


def pip_line(extra: str) -> str:
    """The command that installs what an extra brings."""
    return command_line("pip", "install", f"diagd[{extra}]")


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional module of an ``extra``, or raise the `pip` line; it "is needed to ``purpose``".

    Raises:
        DependencyError: the package is absent.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".", maxsplit=1)[0]:
            raise
        package = module.split(".", maxsplit=1)[0]
        raise DependencyError(
            f"{package} is needed to {purpose} and is not installed; run: {pip_line(extra)}"
        ) from error


def fault(error: ValidationError) -> str:
    """The first thing that is wrong with data that a pydantic model was made of, and where."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"'{where}': {first['msg']}"


_WORDS: Final = {int: "an integer", float: "a number", str: "a string", NoneType: "None"}
_NUMBERS: Final[dict[Any, type]] = {int: Integral, float: Real}
"""What counts as one, those of NumPy included."""


def expect(of: type | Callable[..., Any], given: Mapping[str, object], **late: type) -> None:
    """Refuse (UsageError) arguments that are not of the types which a function, or a class, names.

    Only what a type is made of is looked at: a callable may take anything, a sequence hold anything.
    ``late``: types that a module has for type checkers only, by name.
    """
    for name, kinds in _kinds(of, *late.items()).items():
        if name in given and not isinstance(given[name], tuple(_NUMBERS.get(kind, kind) for kind in kinds)):
            words = " or ".join(_WORDS.get(kind, f"a {kind.__name__}") for kind in kinds)
            raise UsageError(f"{name} is {given[name]!r}; expected {words}")


@lru_cache(maxsize=64)
def _kinds(of: type | Callable[..., Any], *late: tuple[str, type]) -> dict[str, tuple[Any, ...]]:
    unions = {
        name: get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        for name, hint in get_type_hints(of, localns=dict(late) or None).items()
    }
    return {name: tuple(map(_class, kinds)) for name, kinds in unions.items()}


def _class(kind: Any) -> Any:
    """What an instance of a type is of; NumPy 2.5 has its arrays' behind an alias."""
    plain = getattr(kind, "__value__", kind)
    return get_origin(plain) or plain


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """An unknown name, with the nearest known one and the whole list."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    return UsageError(f"unknown {kind} '{name}'{guess} (known: {', '.join(known)})")
