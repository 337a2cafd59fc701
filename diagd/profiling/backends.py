"""Which backend, precision and number of threads decode a bundle fastest on this machine."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from diagd.bundle import Bundle, Form
from diagd.engines.backend import Backend, find, forms_of, names
from diagd.engines.host import cores
from diagd.engines.measured import Measurement, Measurements, keep
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import DiagdError, UsageError
from diagd.profiling.measure import random_workload
from diagd.profiling.profile import ProfileOptions
from diagd.profiling.report import Skipped
from diagd.profiling.verify import open_reference, verify
from diagd.progress import Progress
from diagd.runtime.load import check_window, open_session, with_threads
from diagd.runtime.options import parse_decoder
from diagd.runtime.session import Session

RAGGED_FRAMES: Final = 16
"""Times as many frames of decoders whose passes are the content's."""


def measure_backends(
    bundle: Bundle, options: ProfileOptions, progress: Progress | None = None
) -> tuple[Measurements, list[Skipped]]:
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
    window = check_window(bundle.manifest, options.window)
    options = replace(options, window=window)
    entries: list[Measurement] = []
    skipped: list[Skipped] = []
    for backend, one in _ways(bundle, options.precision):
        name = f"{backend.name} {one.manifest.graphs[0].precision}"
        if entries and options.budget is not None and time.perf_counter() - began > options.budget:
            skipped.append(Skipped(order=name, reason=f"the {options.budget:g} s of the budget were spent"))
            continue
        try:
            with progress.task(name):
                entries.append(_measured(backend, one, bundle, options))
        except DiagdError as error:
            skipped.append(Skipped(order=name, reason=str(error)))
    found = Measurements(
        date=datetime.date.today().isoformat(), order=bundle.manifest.spelling, entries=tuple(entries)
    )
    if (best := found.fastest()) is None:
        reasons = "; ".join(f"{left.order}: {left.reason}" for left in skipped)
        raise UsageError(f"no backend decodes {bundle.path} here inside its gate; {reasons}")
    if not options.cpu.threads:
        entries += _by_threads(best, bundle, options, progress)
        found = found.model_copy(update={"entries": tuple(entries)})
    keep(bundle, found)
    return found, skipped


def _ways(bundle: Bundle, precision: str | None) -> Iterator[tuple[Backend, Bundle]]:
    """Every backend beside the bundle at every precision, or at one."""
    stored = dict.fromkeys(graph.precision for graph in bundle.manifest.graphs)
    for name in names():
        for one in (precision,) if precision else stored:
            yield find(name), bundle.at_precision(one)


def _measured(backend: Backend, one: Bundle, bundle: Bundle, options: ProfileOptions) -> Measurement:
    """Seconds of a frame behind a full window, and whether it passes.

    Raises:
        DiagdError: the backend does not run it here.
    """
    backend.describe()
    if not set(backend.forms) & set(forms_of(one)):
        raise UsageError(f"it runs {' or '.join(form.value for form in backend.forms)} graphs: export one")
    stored = one.manifest.graphs[0].precision
    cpu = with_threads(options.cpu, one, backend.name)
    with open_session(one, window=options.window, cpu=cpu, backend=backend) as session:
        seconds = _frame_seconds(session, options)
        passed = _passes(session, bundle, backend.computes(stored))
    return Measurement(
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
    prompt = session.window - 1 if options.prompt is None else options.prompt
    workload = random_workload(session, prompt, count)
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
    best: Measurement, bundle: Bundle, options: ProfileOptions, progress: Progress
) -> Iterator[Measurement]:
    """The fastest with one thread, half of the cores and all of them, where it ran with others."""
    one = bundle.at_precision(best.precision)
    for threads in sorted({1, max(1, cores() // 2), cores()} - {best.threads}):
        with (
            progress.task(f"{best}, {threads} threads"),
            open_session(
                one, window=options.window, cpu=CpuOptions(threads), backend=best.backend
            ) as session,
        ):
            seconds = _frame_seconds(session, options)
        yield best.model_copy(update={"threads": threads, "seconds": seconds})
