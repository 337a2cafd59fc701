"""What TensorRT says while it builds, and how far it is."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any

from diagd.errors import EngineError
from diagd.progress import Progress

HARMLESS = "has Int64 binding"
"""Said of every graph, because ONNX wants the write index as int64; it is bound as that."""


@dataclass(frozen=True)
class LogLine:
    """One message: severity as TensorRT names it (``ERROR``, ``WARNING``, ...) and text."""

    severity: str
    text: str


def make_logger(trt: ModuleType, lines: list[LogLine]) -> Any:
    """A ``trt.ILogger`` that appends warnings and errors to ``lines`` and prints nothing."""
    base: Any = trt.ILogger

    class Logger(base):  # type: ignore[misc]
        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.INFO, trt.ILogger.VERBOSE) or HARMLESS in text:
                return
            lines.append(LogLine(str(severity).rpartition(".")[2], text))

    return Logger()


def errors_of(lines: list[LogLine]) -> str:
    """The errors of a log on one line."""
    texts = [line.text.strip() for line in lines if line.severity in {"ERROR", "INTERNAL_ERROR"}]
    return "; ".join(dict.fromkeys(texts)) or "TensorRT gave no reason"


def check_log(lines: list[LogLine]) -> None:
    """Refuse what TensorRT only warns of: an input of an operator that it drops changes the result.

    Raises:
        EngineError: the parser dropped an input.
    """
    dropped = [line.text.strip() for line in lines if "unused input" in line.text.lower()]
    if dropped:
        raise EngineError(
            f"TensorRT drops part of the graph, the engine would be wrong: {'; '.join(dropped)}"
        )


class Cancellation:
    """Set by Ctrl-C while TensorRT's own code runs, which Python cannot interrupt."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def on_interrupt(self) -> Iterator[None]:
        """Turn Ctrl-C into a request; outside the main thread, leave signals alone."""

        def request(number: int, frame: FrameType | None) -> None:
            del number, frame
            self.requested = True

        try:
            previous = signal.signal(signal.SIGINT, request)
        except ValueError:  # not the main thread
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def make_monitor(trt: ModuleType, progress: Progress, cancellation: Cancellation) -> Any:
    """A ``trt.IProgressMonitor``: a bar for the outermost phase, and an end to the build when asked for."""
    base: Any = trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # the binding insists on the call
            self._bars = ExitStack()
            self._outer = ""
            self._advance: Callable[[int], None] = _ignore

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._bars.close()
                self._outer, self._advance = name, self._bars.enter_context(progress.count(name, steps))

        def step_complete(self, name: str, step: int) -> bool:
            del step
            if name == self._outer:
                self._advance(1)
            return not cancellation.requested

        def phase_finish(self, name: str) -> None:
            if name == self._outer:
                self._bars.close()

    return Monitor()


def _ignore(steps: int) -> None:
    del steps
