"""From a bundle to a session; and how fast this machine decoded it by each backend, as was last measured."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, overload

from pydantic import ValidationError
from typing_extensions import Unpack

from diagd.bundle import Bundle, Form, Manifest, cache
from diagd.bundle.actions import Record
from diagd.engines.backend import Backend, StepOptions, find
from diagd.engines.engine import Engine
from diagd.engines.host import cores, processor_features
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import MAX_WIDTH
from diagd.errors import UsageError, expect, unknown
from diagd.runtime.group import Group
from diagd.runtime.session import Session
from diagd.runtime.slots import TokenPlaces
from diagd.runtime.step import Passes
from diagd.runtime.text import TextReader
from diagd.schedule import slots_needed

ONE_THREAD_BYTES = 32 << 20
"""Bundles below this size decode fastest on one thread: waking others costs more than they compute. Passes of
some dozens of rows, as windows of Jacobi decoding are, keep two at work."""

MOST_SESSIONS = 256
"""Of one engine: beyond, nothing is gained by more rows in a pass."""

_MEASURED = "backends"

COMPAT = ("mineworld",)
"""Released implementations whose cache can be reproduced."""


class OpenOptions(TypedDict, total=False):
    """What sessions are opened with; see ``load``. ``form`` None is the backend's best."""

    window: int | None
    compat: str | None
    roll: int | None
    precision: str | None
    backend: str | Backend
    form: Form | None


class LoadOptions(OpenOptions, total=False):
    """All that ``load`` can be told beside how many sessions there are."""

    threads: int
    prepack: bool


@overload
def load(path: str | Path, *, sessions: int, **options: Unpack[LoadOptions]) -> Group: ...


@overload
def load(path: str | Path, *, sessions: None = None, **options: Unpack[LoadOptions]) -> Session: ...


def load(
    path: str | Path,
    *,
    sessions: int | None = None,
    threads: int = 0,
    prepack: bool = True,
    **options: Unpack[OpenOptions],
) -> Session | Group:
    """Open a bundle and make its engine ready.

    Args:
        path: a bundle made by ``diagd-export``.
        sessions: that share the passes of one engine, as a group; None: one session alone.
        window: frames a query may see; default: the model's context. Buffers take memory for these only.
        threads: of the processor; 0 is what `diagd profile --backends` found fastest on this machine, or one
            for each core, or one in all for a very small model, two where its decoder is Jacobi.
        compat: ``mineworld`` shows queries the unwritten slots as zero rows, as the released code does; use
            it with schedules that have ``refeed=False, keep_seeds=True``.
        prepack: keep packed weights in this machine's cache, for faster starts.
        roll: frames by which a full window slides at once, for models whose positions are absolute: they then
            feed the window again. Default: the manifest's.
        precision: of the step graph, one of those in the bundle; default: that of its first graph.
        backend: ``cpu``, ``openvino``, ``cuda`` (ONNX Runtime), ``tensorrt`` or ``tensorrt_rtx`` (an engine
            made by diagd-build), another of ``diagd.engines.backend.names``, or a ``Backend``.

    Returns:
        A session, or a group; ``close()`` it, or use it in a ``with`` statement, to give its memory back.

    Raises:
        BundleError: the bundle is missing, damaged or altered.
        EngineError: there is no GPU, or no compiled engine fits it.
        UsageError: the window, ``roll``, ``compat`` or ``precision`` is not possible.
    """
    bundle, cpu = Bundle.open(path), CpuOptions(threads=threads, prepack=prepack)
    group = open_group(bundle, 1 if sessions is None else sessions, cpu=cpu, **options)
    return group.sessions[0] if sessions is None else group


def open_session(bundle: Bundle, *, cpu: CpuOptions | None = None, **options: Unpack[OpenOptions]) -> Session:
    """A session over a bundle that is open; see ``load``."""
    return open_group(bundle, 1, cpu=cpu, **options).sessions[0]


def open_group(
    bundle: Bundle,
    sessions: int,
    window: int | None = None,
    cpu: CpuOptions | None = None,
    *,
    compat: str | None = None,
    roll: int | None = None,
    precision: str | None = None,
    backend: str | Backend = "cpu",
    form: Form | None = None,
) -> Group:
    """Sessions over one engine; see ``open_session``."""
    expect(open_group, locals())
    bundle = bundle.at_precision(precision)
    manifest, window = bundle.manifest, check_window(bundle.manifest, window)
    if compat is not None and compat not in COMPAT:
        raise unknown("compat", compat, COMPAT)
    _check_sessions(manifest, sessions)
    opener = find(backend) if isinstance(backend, str) else backend
    cpu = with_threads(cpu or CpuOptions(), bundle, opener.name)
    zero_rows = manifest.layout.frame_start(window) if compat else 0
    options = step_options(manifest, window, cpu=cpu, form=form, zero_rows=zero_rows, streams=sessions)
    engine = opener.open_steps(bundle, options)
    try:
        check_slots(manifest, engine, window, zero_rows)
        if engine.streams < sessions:
            raise UsageError(
                f"the {engine.form.value} graph of {bundle.path} has {engine.streams} streams; export it "
                f"again with --set streams={sessions} to decode {sessions} sessions at once"
            )
        text = TextReader(bundle, manifest.text, cpu, opener) if manifest.text else None
        passes = None if sessions == 1 else Passes(engine)
        made = (
            Session(manifest, engine, window, bool(compat), roll, text, passes, lane)
            for lane in range(sessions)
        )
        return Group(engine, tuple(made))
    except BaseException:
        engine.close()
        raise


def _check_sessions(manifest: Manifest, sessions: int) -> None:
    if not 1 <= sessions <= MOST_SESSIONS:
        raise UsageError(f"{sessions} sessions are outside 1..{MOST_SESSIONS} of one engine")
    if manifest.text and sessions > 1:
        raise UsageError(
            f"{manifest.name} attends to a text, of which an engine holds one; open one session, not "
            f"{sessions}"
        )


def session_over(bundle: Bundle, engine: Engine, window: int, cpu: CpuOptions) -> Session:
    """A session over an engine on the processor that is open already."""
    manifest = bundle.manifest
    text = TextReader(bundle, manifest.text, cpu) if manifest.text else None
    return Session(manifest, engine, window, text=text)


def step_options(
    manifest: Manifest,
    window: int,
    *,
    cpu: CpuOptions,
    form: Form | None = None,
    zero_rows: int = 0,
    streams: int = 1,
) -> StepOptions:
    """What a backend needs to open the step graphs of a model for a window of so many frames."""
    slots = slots_needed(manifest.layout, window, MAX_WIDTH) + zero_rows
    places = TokenPlaces(manifest.layout, manifest.context.frames).size
    return StepOptions(slots, places, cpu, form, streams=streams)


def check_window(manifest: Manifest, window: int | None) -> int:
    """Frames that a token may see, None: the model's context; UsageError where it does not fit the model."""
    frames = manifest.context.frames
    if window is not None and not 2 <= window <= frames:
        raise UsageError(f"window {window} is outside 2..{frames}, the context of {manifest.name}")
    return int(window or frames)


def check_slots(manifest: Manifest, engine: Engine, window: int, zero_rows: int) -> None:
    """Refuse (UsageError) zero slots that a graph of fixed capacity has no place for."""
    needed = slots_needed(manifest.layout, window, engine.max_width) + zero_rows
    if zero_rows and engine.capacity < needed:
        raise UsageError(
            f"the released cache takes {needed} slots for a window of {window} frames, {zero_rows} of them "
            f"zero rows; the {engine.form.value} graph has {engine.capacity}: use a smaller window, or "
            "export the bundle again with --form prefix"
        )


def with_threads(cpu: CpuOptions, bundle: Bundle, backend: str = "cpu") -> CpuOptions:
    """Threads for a bundle at one precision, where none are named.

    Those that were fastest when ``diagd profile --backends`` measured; else few for a bundle of few bytes, in
    a core's reach: its products are too short to share.
    """
    if cpu.threads:
        return cpu
    found = measured(bundle)
    if found and (fastest := found.fastest(backend, bundle.manifest.precisions[0])):
        return replace(cpu, threads=fastest.threads)
    return threads_by_size(cpu, bundle.size, 2 if bundle.manifest.decoder.startswith("jacobi") else 1)


def threads_by_size(cpu: CpuOptions, size: int, most: int = 1) -> CpuOptions:
    """At most so many threads for few bytes, where none are named."""
    if size >= ONE_THREAD_BYTES or cpu.threads:
        return cpu
    return replace(cpu, threads=min(most, cores()))


class Measurement(Record):
    """A way to decode a bundle, and the ``seconds`` that a frame took.

    ``precision`` is that of the step graph, ``computed`` what the backend computes it in. ``passed``: tokens
    and logits are inside the gate of ``computed``; None: there was no FP32 graph to tell.
    """

    backend: str
    precision: str
    computed: str
    threads: int
    seconds: float
    passed: bool | None

    def __str__(self) -> str:
        computed = "" if self.computed == self.precision else f" in {self.computed}"
        return f"{self.backend} {self.precision}{computed}"

    @property
    def settings(self) -> str:
        """What chooses it on the command line."""
        return f"--set backend={self.backend} --set precision={self.precision} --set threads={self.threads}"


class Measurements(Record):
    """All ways that were measured on a day, in one order of decoding."""

    date: str
    order: str
    entries: tuple[Measurement, ...]

    def fastest(self, backend: str | None = None, precision: str | None = None) -> Measurement | None:
        """The fastest that did not fail; of one backend or precision, where they are named."""
        fit = [entry for entry in self.entries if entry.passed is not False]
        fit = [entry for entry in fit if backend in (None, entry.backend)]
        fit = [entry for entry in fit if precision in (None, entry.precision)]
        return min(fit, key=lambda entry: entry.seconds, default=None)


def measured(bundle: Bundle) -> Measurements | None:
    """What was measured of a bundle on this machine, or None."""
    if (content := cache.read(_MEASURED, _measured_key(bundle))) is None:
        return None
    try:
        return Measurements.model_validate_json(content)
    except ValidationError:  # of another diagd: as good as absent
        return None


def keep_measured(bundle: Bundle, found: Measurements) -> None:
    """Keep what was measured for ``measured``."""
    cache.write(_MEASURED, _measured_key(bundle), found.model_dump_json().encode())


def _measured_key(bundle: Bundle) -> str:
    """Of what the times depend on."""
    described = f"{bundle.digest} {cores()} {processor_features()}"
    return hashlib.sha256(described.encode()).hexdigest()[:32]
