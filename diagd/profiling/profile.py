"""From a bundle to a report of decoding orders that are measured alike, or to the fastest backend here."""

from __future__ import annotations

import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from diagd.bundle import Bundle, Form
from diagd.bundle.files import write_text
from diagd.engines.backend import CHOICES, CPU, Backend, find, forms_of, names
from diagd.engines.ceilings import Ceilings
from diagd.engines.host import cores, installed, memory_bytes, peak_memory, processor_name
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import DiagdError, UsageError, unknown
from diagd.options import Flag, Numbers, checked, flag, setting
from diagd.profiling.cost import StoredModel, read_model
from diagd.profiling.measure import Event, Measured, Timeline, Workload, measure, name_of, random_workload
from diagd.profiling.plan import orders_of, split_orders
from diagd.profiling.report import Machine, Model, Report, Skipped, stages, summarise
from diagd.profiling.verify import open_reference, verify
from diagd.progress import Progress
from diagd.runtime import load
from diagd.runtime.decoders import Decoder, JacobiDecoder, ScheduledDecoder
from diagd.runtime.options import parse_decoder
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.session import Session
from diagd.schedule import Schedule
from diagd.version import __version__

PACKAGES: Final = (
    *("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "cuda-bindings"),
)
LEAST_FRAMES: Final = 2

NEXT_TOKEN_FRAMES: Final = 2
"""Frames measured of next-token prediction: each has as many steps as cells."""


@checked
class ProfileOptions:
    """What to measure; with ``marks``, NVTX ranges are put around the steps, where nvtx is installed.

    Raises:
        UsageError: too few frames.
    """

    ks: Numbers = flag("row lags, each serial and chained", (1, 2), Flag("k"))
    frames: int = flag("of each order, two or more", 4, le=1_000_000)
    fps: float | None = setting("count frames that come later than this rate allows", None, gt=0)
    backend: str = setting(CHOICES, CPU)
    engine: str | None = setting("form of the step graph on the CPU (default: the fastest)", None)
    precision: str | None = setting("of the step graph (default: the bundle's first)", None)
    window: int | None = setting("frames that a token may see (default: the model's context)", None)
    prompt: int | None = setting("frames known ahead (default: a full window)", None, ge=1, le=1_000_000)
    jacobi: bool = setting("measure Jacobi decoding too; how many passes it takes is the content's", False)
    pixels: bool = setting("decode and encode pictures, where there is a tokenizer", True)
    budget: float = flag("seconds to begin orders in, 0: all", 180.0, ge=0)
    marks: bool = False
    cpu: CpuOptions = CpuOptions()

    def __post_init__(self) -> None:
        if self.frames < LEAST_FRAMES:
            raise UsageError(f"--frames {self.frames}: steady frames need two or more")

    def left_out(self, name: str, began: float) -> Skipped | None:
        """What is not begun any more; ``began`` is the start of all (``time.perf_counter``)."""
        if not self.budget or time.perf_counter() - began <= self.budget:
            return None
        return Skipped(order=name, reason=f"the {self.budget:g} s of the budget were spent")

    def frames_of(self, decoder: Decoder) -> int:
        """Frames measured of one decoder."""
        next_token = isinstance(decoder, ScheduledDecoder) and decoder.schedule.is_next_token
        return min(self.frames, NEXT_TOKEN_FRAMES) if next_token else self.frames


@dataclass(frozen=True)
class Profile:
    """A report, the runs behind it, and what happened ahead of them."""

    report: Report
    runs: tuple[Measured, ...]
    start: Timeline

    def trace_events(self) -> list[dict[str, Any]]:
        """Complete events ("ph": "X") of the Chrome trace format, microseconds, one thread for each run."""
        origin, events = min(event.began for event in self.start.events), list[dict[str, Any]]()
        threads = [("start", self.start.events)]
        for run in self.runs:
            whole = Event(name_of(run.decoder), run.began, run.ended - run.began, {})
            threads.append((whole.stage, [whole, *run.timeline.events]))
        for thread, (name, timed) in enumerate(threads):
            at = {"pid": 1, "tid": thread}
            events.append(at | {"name": "thread_name", "ph": "M", "args": {"name": name}})
            for stage, began, seconds, details in timed:
                times = {"ts": 1e6 * (began - origin), "dur": 1e6 * seconds}
                events.append(at | times | {"name": stage, "ph": "X", "args": details})
        return events

    def write_trace(self, path: Path) -> None:
        """Write a file for chrome://tracing or ui.perfetto.dev."""
        write_text(path, json.dumps({"traceEvents": self.trace_events(), "displayTimeUnit": "ms"}))


def profile(
    bundle: Bundle, options: ProfileOptions, progress: Progress | None = None, backend: Backend | None = None
) -> Profile:
    """Measure a bundle on this machine.

    Raises:
        UsageError: a window or prompt that cannot be measured.
        ScheduleError: a lag that the model does not allow.
        EngineError: the engine cannot be loaded.
    """
    began, progress = time.perf_counter(), progress or Progress()
    backend, bundle = backend or _backend(options), bundle.at_precision(options.precision)
    orders = orders_of(bundle.manifest.layout, options.ks, bundle.manifest.schedule.row_seed)
    options = replace(options, cpu=load.with_threads(options.cpu, bundle, backend.name))
    device = backend.describe()
    ready = _load(bundle, options, backend, progress)
    with ready.session as session:
        chosen, skipped = _split(orders, ready, options)
        pairs, late = _run_each(ready, chosen, options, progress, began)
        device_memory = session.engine.memory_used() if device else 0
    report = Report(
        diagd_version=__version__,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=_machine(ready.ceilings, device, options.cpu),
        model=_model(bundle, ready),
        start=stages(ready.start),
        runs=tuple(summarise(run, cold, ready.model, ready.ceilings, options.fps) for cold, run in pairs),
        skipped=(*skipped, *late),
        peak_memory=peak_memory(),
        device_memory=device_memory,
    )
    return Profile(report, tuple(run for _, run in pairs), ready.start)


@dataclass(frozen=True)
class _Ready:
    """What is measured, loaded, what it is fed, the limits that hold for it, and what loading took."""

    session: Session
    workload: Workload
    pixels: PixelCodec | None
    model: StoredModel
    ceilings: Ceilings
    start: Timeline


def _backend(options: ProfileOptions) -> Backend:
    if options.engine is not None and options.backend != CPU:
        raise UsageError(
            f"engine={options.engine} is a form on the CPU; backend={options.backend} takes the one that "
            "suits it"
        )
    return find(options.backend)


def _form(bundle: Bundle, name: str | None) -> Form | None:
    """The form called ``name``; None is the backend's choice."""
    there = {form.value: form for form in forms_of(bundle)}
    if name is not None and name not in there:
        raise unknown(f"engine of {bundle.path}", name, there)
    return None if name is None else there[name]


def _load(bundle: Bundle, options: ProfileOptions, backend: Backend, progress: Progress) -> _Ready:
    """Measure the limits while nothing else is there, then load."""
    start, form = Timeline(), _form(bundle, options.engine)
    with progress.task("measuring this machine"):
        ceilings = backend.ceilings(options.cpu.threads)
    with progress.task("loading"):
        with start.stage("load"):
            session = load.open_session(
                bundle, window=options.window, cpu=options.cpu, backend=backend, form=form
            )
        pixels = _pixels(bundle, options, backend, start)
    workload = random_workload(session, options.prompt or session.window - 1, options.frames)
    return _Ready(session, workload, pixels, read_model(bundle, session.engine.form), ceilings, start)


def _pixels(bundle: Bundle, options: ProfileOptions, backend: Backend, start: Timeline) -> PixelCodec | None:
    """The tokenizer, loaded and warm, its encoder timed on a random picture."""
    if bundle.manifest.tokenizer is None or not options.pixels:
        return None
    pixels = PixelCodec(bundle, options.cpu, backend)
    picture = np.random.default_rng(0).integers(0, 256, (1, *pixels.spec.size, 3), dtype=np.uint8)
    with start.stage("load tokenizer"):
        tokens = pixels.encode(picture)
        list(pixels.decode(iter(tokens)))
    for _ in range(3):
        with start.stage("prompt encode"):
            pixels.encode(picture)
    return pixels


def _split(
    orders: Sequence[Schedule], ready: _Ready, options: ProfileOptions
) -> tuple[list[Decoder], list[Skipped]]:
    """Decoders of the orders that the model allows, and the other orders with the reason.

    Raises:
        UsageError: it allows none.
    """
    possible, skipped = split_orders(orders, ready.session, ready.workload, options.frames)
    if not possible:
        raise UsageError(f"no decoding order can be measured; {skipped[0].order}: {skipped[0].reason}")
    jacobi = [JacobiDecoder()] if options.jacobi else []
    return [*map(ScheduledDecoder, possible), *jacobi], skipped


def _run_each(
    ready: _Ready, decoders: Sequence[Decoder], options: ProfileOptions, progress: Progress, began: float
) -> tuple[list[tuple[float, Measured]], list[Skipped]]:
    """Runs of the decoders, the first one in any case, and those that the budget has no time for.

    The quickest come first, so that a large model on a slow machine is measured in some order at least.
    """
    runs, late = dict[Decoder, tuple[float, Measured]](), dict[Decoder, Skipped]()
    quickest = sorted(decoders, key=lambda decoder: _steps(ready, decoder, options))
    for number, decoder in enumerate(quickest, start=1):
        if runs and (skipped := options.left_out(name_of(decoder), began)):
            late[decoder] = skipped
            continue
        frames = options.frames_of(decoder)
        title = f"{name_of(decoder)}, 1 + {frames} frames, {number} of {len(decoders)} orders"
        with progress.count(title, _steps(ready, decoder, options)) as advance:
            runs[decoder] = _run(ready, decoder, options, advance)
    return [runs[one] for one in decoders if one in runs], [late[one] for one in decoders if one in late]


def _steps(ready: _Ready, decoder: Decoder, options: ProfileOptions) -> int:
    """Steps of both runs of a decoder; without a schedule, what they may come to."""
    known, session, counts = len(ready.workload.prompt), ready.session, (1, options.frames_of(decoder))
    if not isinstance(decoder, ScheduledDecoder):
        return sum(counts) * session.layout.rows
    return sum(decoder.schedule.table(known, n, 0, session.engine.max_width).steps for n in counts)


def _run(
    ready: _Ready, decoder: Decoder, options: ProfileOptions, advance: Callable[[int], object]
) -> tuple[float, Measured]:
    """Seconds of one frame as the first run of a decoder, then the measured frames."""
    frames = options.frames_of(decoder)
    run = partial(measure, ready.session, decoder, ready.workload, advance=advance, marks=options.marks)
    cold = run(1, ready.pixels)
    with TemporaryDirectory() as folder:
        return cold.ended - cold.began, run(frames, ready.pixels, Path(folder) / "frames.gif")


def _machine(ceilings: Ceilings, device: str, cpu: CpuOptions) -> Machine:
    found = {name: version for name in PACKAGES if (version := installed(name))}
    return Machine(
        **asdict(replace(ceilings, threads=ceilings.threads or cpu.threads or cores())),
        processor=processor_name(),
        cores=cores(),
        memory=memory_bytes(),
        platform=platform.platform(),
        versions={"python": platform.python_version()} | found,
        device=device,
    )


def _model(bundle: Bundle, ready: _Ready) -> Model:
    size = ready.model.size
    return Model(
        name=bundle.manifest.name,
        digest=bundle.digest,
        precision=bundle.manifest.precisions[0],
        engine=ready.session.engine.form.value,
        window=ready.session.window,
        parameters=size.streamed + size.looked_up,
        weight_bytes=ready.model.streamed_bytes,
    )


RAGGED_FRAMES: Final = 16
"""Times as many frames of decoders whose passes are the content's."""


def measure_backends(
    bundle: Bundle, options: ProfileOptions, progress: Progress | None = None
) -> tuple[load.Measurements, list[Skipped]]:
    """Decode a few frames by the bundle's decoder by every backend and precision, and keep the times.

    One engine is open at a time, for idle threads of two would take each other's cores. The fastest is then
    tried with other numbers of threads. A frame of each is judged beside the plain reference, see
    ``diagd.profiling.verify``.

    Returns:
        What was measured, and what was not with the reason.

    Raises:
        UsageError: nothing runs here, or passes; the window or prompt does not fit.
    """
    began, progress = time.perf_counter(), progress or Progress()
    window = load.check_window(bundle.manifest, options.window)
    options = replace(options, window=window)
    entries, skipped = list[load.Measurement](), list[Skipped]()
    precisions = [options.precision] if options.precision else bundle.manifest.precisions
    for backend, one in product(map(find, names()), map(bundle.at_precision, precisions)):
        name = f"{backend.name} {one.manifest.precisions[0]}"
        if entries and (late := options.left_out(name, began)):
            skipped.append(late)
            continue
        try:
            with progress.task(name):
                entries.append(_measured(backend, one, bundle, options))
        except DiagdError as error:
            skipped.append(Skipped(order=name, reason=str(error)))
    found = load.Measurements(
        date=datetime.date.today().isoformat(), order=bundle.manifest.spelling, entries=tuple(entries)
    )
    if (best := found.fastest()) is None:
        reasons = "; ".join(f"{left.order}: {left.reason}" for left in skipped)
        raise UsageError(f"no backend decodes {bundle.path} here inside its gate; {reasons}")
    if not options.cpu.threads:
        entries += _by_threads(best, bundle, options, progress)
        found = found.model_copy(update={"entries": tuple(entries)})
    load.keep_measured(bundle, found)
    return found, skipped


def _measured(backend: Backend, one: Bundle, bundle: Bundle, options: ProfileOptions) -> load.Measurement:
    """Seconds of a frame behind a full window, and whether it passes.

    Raises:
        DiagdError: the backend does not run it here.
    """
    backend.describe()
    if not set(backend.forms) & set(forms_of(one)):
        raise UsageError(f"it runs {' or '.join(form.value for form in backend.forms)} graphs: export one")
    stored = one.manifest.precisions[0]
    cpu = load.with_threads(options.cpu, one, backend.name)
    with load.open_session(one, window=options.window, cpu=cpu, backend=backend) as session:
        seconds = _frame_seconds(session, options)
        passed = _passes(session, bundle, backend.computes(stored))
    return load.Measurement(
        backend=backend.name,
        precision=stored,
        computed=backend.computes(stored),
        threads=cpu.threads or cores(),
        seconds=seconds,
        passed=passed,
    )


def _frame_seconds(session: Session, options: ProfileOptions) -> float:
    """Median over frames behind a first one; over more where their passes are the content's."""
    decoder = parse_decoder(None, session.manifest)
    count = 1 + options.frames * (RAGGED_FRAMES if decoder.ragged else 1)
    workload = random_workload(session, options.prompt or session.window - 1, count)
    frames = session.frames(decoder, workload.start(session, count), count=count)
    return float(np.median([frame.seconds for frame in frames][1:]))


def _passes(session: Session, bundle: Bundle, precision: str) -> bool | None:
    """Whether a frame behind a first one is inside the gate of a precision; None: there is no reference."""
    if not any(graph.form is Form.PREFIX and graph.precision == "fp32" for graph in bundle.manifest.graphs):
        return None
    workload = random_workload(session, 1, 1)
    with open_reference(bundle, session) as plain:
        return verify(session, plain, "", precision, session.manifest.schedule, workload, 1).passed


def _by_threads(
    best: load.Measurement, bundle: Bundle, options: ProfileOptions, progress: Progress
) -> Iterator[load.Measurement]:
    """The fastest with one thread, half of the cores and all of them, where it ran with others."""
    one = bundle.at_precision(best.precision)
    for threads in sorted({1, max(1, cores() // 2), cores()} - {best.threads}):
        with (
            progress.task(f"{best}, {threads} threads"),
            load.open_session(
                one, window=options.window, cpu=CpuOptions(threads), backend=best.backend
            ) as session,
        ):
            seconds = _frame_seconds(session, options)
        yield best.model_copy(update={"threads": threads, "seconds": seconds})
