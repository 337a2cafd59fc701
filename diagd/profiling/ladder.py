"""What each optimisation of an engine is worth, turned on alone and together."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from diagd.bundle import Bundle, Form
from diagd.engines.buffers import aligned_zeros
from diagd.engines.engine import Float, SamplingState, StepInputs
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import MAX_WIDTH, PrefixEngine
from diagd.profiling.engines import session_over
from diagd.profiling.measure import measure, random_workload
from diagd.profiling.report import Rung
from diagd.runtime.session import token_places
from diagd.schedule import Schedule, slots_needed

REPEATS: Final = 2

ABSENT: Final = {
    "sampling in the graph": "export with --form prefix,modern and profile with --set engine=modern",
    "CUDA graph": "needs a GPU engine",
    "precision": "profile a bundle of another precision, then --compare the two reports",
}
"""Optimisations that this engine cannot switch, and how to measure them."""


class SwitchedEngine(PrefixEngine):
    """The CPU engine with its optimisations as switches.

    Args:
        bundle: with a graph in the prefix form.
        capacity: slots.
        tokens: places of the token buffer.
        options: of ONNX Runtime.
        live_prefix: bind the slots in use; otherwise all of them.
        in_place: write K/V where they lie; otherwise into another set of buffers, as a cache that goes in
            and comes out of a graph does.
    """

    def __init__(
        self,
        bundle: Bundle,
        capacity: int,
        tokens: int,
        options: CpuOptions,
        *,
        live_prefix: bool,
        in_place: bool,
    ) -> None:
        super().__init__(bundle, capacity, tokens, options)
        self._live_prefix, self._in_place = live_prefix, in_place
        self._others = (
            {} if in_place else {n: aligned_zeros(b.shape, b.dtype) for n, b in self.buffers.items()}
        )

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """Run one pass; see ``Engine.step``."""
        if not self._live_prefix:
            inputs = replace(inputs, live=self.capacity)
        logits = super().step(inputs, sampling)
        if not self._in_place:
            self.buffers, self._others = self._others, self.buffers
            self._bound = 0
        return logits

    def _bind_prefix(self, length: int) -> None:
        super()._bind_prefix(length)
        for name, buffer in self._others.items():
            self._bind_output(f"present_{name}", buffer[:length])


def climb(bundle: Bundle, window: int, cpu: CpuOptions) -> list[Rung]:
    """Milliseconds of a diagonal step early in a context, where a cache of full capacity costs most."""
    manifest = bundle.manifest
    if not any(graph.form is Form.PREFIX for graph in manifest.graphs):
        return [Rung(name="prefix form", seconds=None, gain=None, reason="the bundle has no such graph")]
    switches = {
        "none": (False, False),
        "live-prefix attention": (True, False),
        "in-place K/V": (False, True),
        "both": (True, True),
    }
    times = {name: _time(bundle, window, cpu, *choice) for name, choice in switches.items()}
    measured = [Rung(name=n, seconds=t, gain=times["none"] / t) for n, t in times.items()]
    return measured + [Rung(name=n, seconds=None, gain=None, reason=why) for n, why in ABSENT.items()]


def _time(bundle: Bundle, window: int, cpu: CpuOptions, live_prefix: bool, in_place: bool) -> float:
    manifest = bundle.manifest
    layout = manifest.layout.stream()
    slots, places = slots_needed(layout, window, MAX_WIDTH), token_places(layout, window).size
    engine = SwitchedEngine(bundle, slots, places, cpu, live_prefix=live_prefix, in_place=in_place)
    session = session_over(bundle, engine, window, cpu)
    schedule = Schedule.serial(layout, 1, manifest.schedule.row_seed)
    workload = random_workload(session, 1, 1)
    runs = [measure(session, schedule, workload, 1) for _ in range(REPEATS)]
    return min(float(np.median([step.engine for step in run.steps[run.chunks + 1 :]])) for run in runs)
