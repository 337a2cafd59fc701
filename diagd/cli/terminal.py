"""What verbs print on: it shows names as they are, in characters the terminal has, and never ends a verb."""

from __future__ import annotations

import codecs
import errno
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

from diagd.progress import is_first

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.EBADF, errno.EINVAL)
"""Errors of a stream that nobody reads any more."""

_PLAIN = {
    0x2026: "...",
    0x2022: "*",
    0x2013: "-",
    0x2014: "-",
    0x2018: "'",
    0x2019: "'",
    0x201C: '"',
    0x201D: '"',
    0x2192: "->",
}
"""ASCII for the characters that Rich and licences bring: ellipsis, bullet, dashes, quotes, arrow."""

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
"""Ways to write characters that terminals obey."""

_UNDECODED = range(0xDC80, 0xDD00)
_WIDE = 100_000


def console(*, stderr: bool = False) -> Console:
    """A console that takes brackets as text, and breaks and cuts nothing unless a terminal has to.

    Of processes that do the same work together, the first alone prints.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    class Plain(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            if all(isinstance(part, str | Text) for part in objects):
                options.setdefault("soft_wrap", True)
            tables = [part for part in objects if isinstance(part, Table)]
            if tables and len(objects) > 1:  # each below its title
                for part in objects:
                    self.print(part, **options)
                return
            for table in tables:
                if table.title:  # in the table it would be broken where the table is narrow
                    super().print(table.title, style="italic", soft_wrap=True)
                    table.title = None
                for column in table.columns:
                    column.overflow = "fold"
            super().print(*objects, **options)

        def render(self, renderable: Any, options: Any = None) -> Any:
            for part in super().render(renderable, options):
                yield part if part.control else part._replace(text=visible(part.text))

        def status(self, status: Any, **options: Any) -> Any:
            options.setdefault("spinner", "dots" if self.encoding.startswith("utf") else "line")
            return super().status(Text(status) if isinstance(status, str) else status, **options)

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _WIDE
    quiet = not is_first()
    return Plain(stderr=stderr, quiet=quiet, markup=False, highlight=False, emoji=False, width=width)


def visible(text: str) -> str:
    """Text of others, with the characters written out that a terminal would obey."""
    return text.translate(_ESCAPES)


def print_table(
    console: Console,
    heads: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    title: str | None = None,
    whole: Collection[int] = (),
) -> None:
    """Print a table; cells of the columns ``whole`` are not broken."""
    from rich.table import Table

    table = Table(*heads, title=title)
    for column in whole:
        table.columns[column].no_wrap = True
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_json(content: Any) -> None:
    """Print data for programs."""
    print(json.dumps(content, indent=2))  # noqa: T201


def styled(text: str, style: str) -> Text:
    """A cell or line in a style, its text as it is."""
    from rich.text import Text

    return Text(text, style=style)


class Stream:
    """A text stream that outlives its reader: what can no longer be written is dropped.

    Attributes:
        lost: why something was dropped, or None.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or drop."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        self._try(self._stream.flush)

    def _try(self, do: Callable[..., object], *given: str) -> None:
        if self.lost is None:
            try:
                do(*given)
            except OSError as error:
                self.lost = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def is_full(self) -> bool:
        """Whether something was lost though somebody listens."""
        return self.lost is not None and self.lost.errno not in GONE


@contextmanager
def streams() -> Iterator[tuple[Stream, Stream]]:
    """Let stdout and stderr outlive their readers, and write what they cannot encode in plain characters."""
    before = sys.stdout, sys.stderr
    wrapped = _wrapped(sys.stdout), _wrapped(sys.stderr)
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in wrapped)
    try:
        yield wrapped
    finally:
        for stream in wrapped:
            stream.flush()
            if stream.lost is not None:
                _silence(stream)
        sys.stdout, sys.stderr = before


def _wrapped(stream: TextIO | None) -> Stream:
    if stream is None:  # closed by whoever started this
        return Stream(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="plain")
    if hasattr(os, "set_blocking"):  # Windows has it since Python 3.12
        with suppress(OSError, ValueError):  # no descriptor
            os.set_blocking(stream.fileno(), True)  # what a full pipe does not take is lost otherwise
    return Stream(stream)


def _silence(stream: Stream) -> None:
    """Send what the interpreter flushes when it ends to nowhere, for it would complain."""
    with suppress(OSError, ValueError):
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _in_plain_characters(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encoding error handler ``plain``: bytes of names as they are, the rest as near as ASCII comes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    bad = error.object[error.start : error.end]
    if all(ord(character) in _UNDECODED for character in bad):
        return bytes(ord(character) - 0xDC00 for character in bad), error.end
    shown = bad.translate(_PLAIN)
    return "".join(c if ord(c) < 128 else "?" for c in shown), error.end


codecs.register_error("plain", _in_plain_characters)
