"""Runs as a Chrome trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diagd.bundle.files import atomic_file
from diagd.profiling.measure import Measured
from diagd.profiling.timeline import Timeline


def trace_events(runs: Sequence[tuple[str, Measured]], start: Timeline) -> list[dict[str, Any]]:
    """Complete events ("ph": "X") of the Chrome trace format, microseconds, one thread for each run."""
    origin = min([event.began for event in start.events] + [run.began for _, run in runs], default=0.0)
    events = [*_timeline_events(start, 0, origin), _thread_name(0, "start")]
    for thread, (name, run) in enumerate(runs, start=1):
        events.append(_thread_name(thread, name))
        events.append(_event(name, run.began, run.ended - run.began, thread, origin, {}))
        events += _timeline_events(run.timeline, thread, origin)
    return events


def write_trace(path: Path, runs: Sequence[tuple[str, Measured]], start: Timeline) -> None:
    """Write a file for chrome://tracing or ui.perfetto.dev."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps({"traceEvents": trace_events(runs, start), "displayTimeUnit": "ms"}))


def _timeline_events(timeline: Timeline, thread: int, origin: float) -> list[dict[str, Any]]:
    return [
        _event(event.stage, event.began, event.seconds, thread, origin, event.details)
        for event in timeline.events
    ]


def _event(
    name: str, began: float, seconds: float, thread: int, origin: float, details: dict[str, float]
) -> dict[str, Any]:
    place = {"pid": 1, "tid": thread, "ts": 1e6 * (began - origin), "dur": 1e6 * seconds}
    return {"name": name, "ph": "X", **place, "args": details}


def _thread_name(thread: int, name: str) -> dict[str, Any]:
    return {"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}
