"""Checks of benchmarks/gpu.py ahead of its tables: is what is about to be timed right?"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_measure import FLOAT, MakeEngine
from diagd.bundle import Bundle, Form
from diagd.engines.backend import StepOptions, find, graphs_of
from diagd.engines.devices import Device
from diagd.engines.devices.kernels import SAMPLE, SampleArguments
from diagd.engines.engine import VOID, Engine, SamplingState, Steps
from diagd.engines.records import RecordRing
from diagd.engines.sampler import draw_plain
from diagd.runtime.tokens import token_places

REPLAYS = 1000
LAUNCHES = 50
VOCABULARIES = (107, 8192, 64_000)
NEAR, NEAR_ROUNDED = 2e-2, 0.1
"""Relative error of float16 logits that are right, and where the processor rounds activations as well."""

Figures = dict[str, float]


def opened(bundle: Bundle, make_engine: MakeEngine) -> tuple[bool, Figures]:
    """The step graphs open with nothing left to the processor, and are captured."""
    began = time.perf_counter()
    with closing(make_engine(bundle, _places(bundle), True)) as engine:
        seconds, memory = time.perf_counter() - began, engine.memory_used()
    return True, {"open, s": seconds, "memory in use, GB": memory / 1e9, "widest": float(engine.max_width)}


def one_step(bundle: Bundle, make_engine: MakeEngine) -> tuple[bool, Figures]:
    """The logits of the widest step are those of the processor."""
    reference = StepOptions(0, _places(bundle), form=Form.MODERN)
    found: list[NDArray[Any]] = []
    for make in (
        partial(make_engine, bundle, _places(bundle), False),
        partial(find("cpu").open_steps, bundle, reference),
    ):
        with closing(make()) as engine:
            run_steps(engine, bundle, [engine.max_width])
            found.append(engine.logits().astype(np.float64))
    error = float(np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[1]))
    agree = float((found[0].argmax(axis=1) == found[1].argmax(axis=1)).mean())
    near = NEAR if bundle.manifest.graphs[0].precision == FLOAT else NEAR_ROUNDED
    return error < near, {"relative error of logits": error, "rows of equal argmax": agree}


def replays(bundle: Bundle, make_engine: MakeEngine) -> tuple[bool, Figures]:
    """Captured steps of alternating widths draw what steps without graphs draw, time and again."""
    widths = [int(graph.width or 0) for graph in graphs_of(bundle, Form.MODERN)]
    drawn, seconds = [], []
    for graphs in (True, False):
        with closing(make_engine(bundle, _places(bundle), graphs)) as engine:
            began = time.perf_counter()
            drawn.append(run_steps(engine, bundle, [widths[n % len(widths)] for n in range(REPLAYS)]))
            seconds.append(time.perf_counter() - began)
    wrong = int((drawn[0] != drawn[1]).any(axis=1).sum())
    return not wrong, {
        "replays": REPLAYS,
        "steps that differ": wrong,
        "ms a replay": 1e3 * seconds[0] / REPLAYS,
        "ms without graphs": 1e3 * seconds[1] / REPLAYS,
    }


def samplers(device: Device) -> tuple[bool, Figures]:
    """The kernel draws NumPy's ids, from peaked and from flat laws."""
    random, equal, figures = np.random.default_rng(0), True, Figures()
    for ids in VOCABULARIES:
        for spread in (8.0, 1.0, 0.05):
            logits = (random.standard_normal((14, ids)) * spread).astype(np.float32)
            tokens, seconds = sampled(device, logits, SamplingState(1.0, 0, 0.8, 5))
            low, high = np.zeros(14, np.int32), np.full(14, ids, np.int32)
            wanted = draw_plain(logits, np.arange(14), SamplingState(1.0, 0, 0.8, 5), None, low, high, True)
            equal &= bool((tokens == wanted).all())
            figures[f"us, 14 x {ids} ids, deviation {spread:g}"] = 1e6 * seconds
    return equal, figures


def sampled(device: Device, logits: NDArray[np.float32], state: SamplingState) -> tuple[NDArray[Any], float]:
    """Tokens [R] of the kernel, and seconds of a launch."""
    rows, ids = logits.shape
    order = np.arange(rows, dtype=np.int32)
    ring, cursor = RecordRing(device), device.allocate(8)
    ranges = np.array([[0, ids]], np.int32)
    given = {"logits": logits, "ranges": ranges, "token_buffer": np.zeros(rows, np.int32)}
    addresses = {name: device.allocate(array.nbytes) for name, array in given.items()}
    for name, array in given.items():
        device.upload(addresses[name], array)
    steps = Steps.single(order, order, order, order, 0, 1, state)
    ring.send(replace(steps, cells=order.astype(np.int64)), 0)
    arguments = SampleArguments(
        records=ring.address,
        cursor=cursor,
        refused=device.allocate(8),
        **addresses,
        prefix=0,
        frame_length=1,
        vocabulary=ids,
        keep_crossing=True,
        width=rows,
    )
    device.launch(SAMPLE, arguments, rows, device.threads)
    device.mark(0)
    for _ in range(LAUNCHES):
        device.launch(SAMPLE, arguments, rows, device.threads)
    device.mark(1)
    tokens = np.empty(rows, np.int32)
    device.download(tokens, addresses["token_buffer"])
    device.synchronise()
    return tokens, device.seconds(0, 1) / LAUNCHES


def run_steps(engine: Engine, bundle: Bundle, widths: list[int]) -> NDArray[np.int32]:
    """Steps one after another over random tokens; ids [N, widest] that their rows draw, -1 behind those."""
    manifest, places = bundle.manifest, _places(bundle)
    known = min(engine.capacity, manifest.context.frames * manifest.layout.frame_length)
    low, high = manifest.sampling.range_table(manifest.layout)[manifest.layout.before]
    ids = np.random.default_rng(0).integers(low, high, places, dtype=np.int32)
    engine.write_slots(np.full(engine.capacity, VOID, np.int32))
    engine.write_tokens(np.arange(places, dtype=np.int32), ids)
    drawn = np.full((len(widths), max(widths)), -1, np.int32)
    for number, width in enumerate(widths):
        rows = np.arange(width, dtype=np.int32)
        sinks, start = places - 1 - rows, number % max(1, known - 2 * max(widths))
        positions = start + manifest.layout.prefix + rows
        state = SamplingState(1.0, seed=7)
        engine.send(Steps.single(rows, positions, rows, sinks, start, start + width, state))
        engine.step()
        engine.draw()
        drawn[number, :width] = engine.read_tokens(sinks)
    return drawn


def _places(bundle: Bundle) -> int:
    return token_places(bundle.manifest.layout, bundle.manifest.context.frames).size


CHECKS: Final[dict[str, Callable[[Bundle, MakeEngine], tuple[bool, Figures]]]] = {
    "open strictly": opened,
    "one step against the processor": one_step,
    "replays of alternating widths": replays,
}
