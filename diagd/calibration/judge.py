"""A candidate and its reference on the same trajectories: figures of the gate, and what each layer costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import StepGraph
from diagd.calibration.gate import Budget, Comparison, PairedEngine, is_settled, log_softmax
from diagd.calibration.reference import open_graphs
from diagd.calibration.trajectory import EnoughStepsError, Prompts, Tour, Trajectory
from diagd.engines.engine import Engine, Float, Int, SamplingState, StepInputs
from diagd.engines.fixed import FixedEngine
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import PrefixEngine
from diagd.progress import Progress
from diagd.runtime.pixels import PixelCodec

GATE_SEED = 1_000_003
"""Added to the seed, so that a model is judged on other frames than its ranges were found on."""

ROUNDS = (4, 16)
"""Fewest and most rounds of a gate; each decodes every trajectory behind new prompts."""

FRAMES = 48
"""Frames whose pixels are compared."""

LAYER_STEPS = 32
"""Passes on which each layer is measured by itself, half of them behind another prompt."""


@dataclass(frozen=True)
class Course:
    """What is decoded.

    Attributes:
        tour: trajectories, their passes those of one round.
        window: frames of the session.
        prompts: where prompts and actions come from.
        seed: of prompts, actions and sampling.
    """

    tour: Sequence[Trajectory]
    window: int
    prompts: Prompts
    seed: int


class Judge:
    """Compares graphs with the reference of a bundle.

    Args:
        bundle: the graphs lie in.
        reference: graphs of one form in floating point.
        course: what is decoded.
        threads: of ONNX Runtime.
        progress: where to report.
    """

    def __init__(
        self,
        bundle: Bundle,
        reference: Sequence[StepGraph],
        course: Course,
        threads: int,
        progress: Progress,
    ) -> None:
        self._bundle, self._course, self._threads, self._progress = bundle, course, threads, progress
        self._reference = open_graphs(bundle, reference, course.window, self._options(reference, "fp32"))
        manifest = bundle.manifest
        self._ranges = manifest.sampling.range_table(manifest.layout)
        self._pixels = None
        if manifest.tokenizer is not None:
            self._pixels = PixelCodec(bundle, CpuOptions(threads, prepack=False))

    def compare(self, candidate: Sequence[StepGraph], weight: str, budget: Budget) -> Comparison:
        """Decode rounds of trajectories with both engines until the verdict stands.

        Args:
            candidate: graphs of the reference's form.
            weight: what its weights are, see ``Scheme``.
            budget: bounds of the verdict.
        """
        comparison, course = Comparison(), self._course
        pair = PairedEngine(self._reference, self._open(candidate, weight), self._ranges, comparison)
        guide = Tour(self._bundle, pair, course.window, course.prompts, course.seed + GATE_SEED)
        passes = sum(trajectory.steps for trajectory in course.tour)
        with self._progress.count("gate, passes", ROUNDS[0] * passes) as advance:
            for done in range(ROUNDS[1]):
                if done >= ROUNDS[0] and is_settled(comparison.figures(), budget):
                    break
                for index, trajectory in enumerate(course.tour):
                    pair.remaining = trajectory.steps
                    comparison.begin()
                    guide.run(trajectory, done * len(course.tour) + index, self._on_frame(pair, comparison))
                    advance(trajectory.steps)
        return comparison

    def layers(
        self, candidates: Iterator[tuple[str, Sequence[StepGraph]]], count: int, weight: str
    ) -> dict[str, float]:
        """Divergence of the predictions from the reference, nats, by the layer that alone is quantised.

        The reference decodes once; what it was asked is asked of every candidate.
        """
        recorder = Recorder(self._reference, self._ranges)
        course, widest = self._course, min(self._course.tour, key=lambda t: t.schedule.d)
        guide = Tour(self._bundle, recorder, course.window, course.prompts, course.seed + GATE_SEED)
        for number in range(2):
            recorder.remaining = LAYER_STEPS // 2
            guide.run(replace(widest, steps=LAYER_STEPS // 2), number)
        found = {}
        with self._progress.count("layers", count) as advance:
            for name, graphs in candidates:
                found[name] = recorder.divergence(self._open(graphs, weight))
                advance(1)
        return found

    def _open(self, graphs: Sequence[StepGraph], weight: str) -> PrefixEngine | FixedEngine:
        return open_graphs(self._bundle, graphs, self._course.window, self._options(graphs, weight))

    def _options(self, graphs: Sequence[StepGraph], weight: str) -> CpuOptions:
        # Products of the GPU forms have signed activations, for which the CPU has no quick kernel.
        fuse = graphs[0].form is Form.PREFIX and weight != "fp8"
        return CpuOptions(self._threads, prepack=False, fuse=fuse)

    def _on_frame(self, pair: PairedEngine, comparison: Comparison) -> Callable[[Int], None]:
        pixels, rows = self._pixels, self._bundle.manifest.layout.rows

        def compare(places: Int) -> None:
            if pixels is not None and len(comparison.frame_errors) < FRAMES:
                comparison.frame_errors.append(_frame_error(pixels, pair, places, rows))

        return compare


class Recorder:
    """Decodes with one engine and keeps every step, to ask others the same.

    Args:
        engine: the reference.
        ranges: int32 [frame_length, 2], allowed ids by place of the frame.
    """

    samples_in_graph = False

    def __init__(self, engine: Engine, ranges: Int) -> None:
        self._engine = engine
        self.capacity, self.max_width = engine.capacity, engine.max_width
        self.token_buffer, self.slot_position = engine.token_buffer, engine.slot_position
        self._allowed = slice(int(ranges[:, 0].min()), int(ranges[:, 1].max()))
        self._calls: list[Callable[[Engine], float | None]] = []
        self._rows = 0
        self.remaining = 0

    def padded_width(self, width: int) -> int:
        """See ``Engine.padded_width``."""
        return self._engine.padded_width(width)

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """See ``Engine.step``; raises ``EnoughStepsError`` once ``remaining`` steps have run."""
        if not self.remaining:
            raise EnoughStepsError
        self.remaining -= 1
        tokens, slots = self.token_buffer.copy(), self.slot_position.copy()
        kept = replace(
            inputs,
            sources=inputs.sources.copy(),
            positions=inputs.positions.copy(),
            sinks=inputs.sinks.copy(),
            decoded=inputs.decoded.copy(),
            uniforms=inputs.uniforms.copy(),
        )
        logits = self._engine.step(inputs, sampling)
        expected = log_softmax(logits[:, self._allowed]) if len(logits) else None
        self._rows += len(logits)

        def ask(engine: Engine) -> float | None:
            engine.token_buffer[:], engine.slot_position[:] = tokens, slots
            seen = engine.step(kept, sampling)
            if expected is None:
                return None
            return float((np.exp(expected) * (expected - log_softmax(seen[:, self._allowed]))).sum())

        self._calls.append(ask)
        return logits

    def set_text(self, rows: Mapping[str, NDArray[np.generic]]) -> None:
        """See ``Engine.set_text``."""
        kept = {name: array.copy() for name, array in rows.items()}
        self._engine.set_text(kept)
        self._calls.append(lambda engine: engine.set_text(kept))

    def rotate_keys(self, angles: NDArray[np.float64], live: int) -> None:
        """See ``Engine.rotate_keys``."""
        kept = angles.copy()
        self._engine.rotate_keys(kept, live)
        self._calls.append(lambda engine: engine.rotate_keys(kept, live))

    def divergence(self, engine: Engine) -> float:
        """Mean divergence of another engine's predictions on the kept steps, nats."""
        return sum(call(engine) or 0.0 for call in self._calls) / max(self._rows, 1)


def _frame_error(pixels: PixelCodec, pair: PairedEngine, places: Int, rows: int) -> float:
    """Mean squared error between the frames of the most probable tokens of both engines."""
    shown = [next(iter(pixels.decode([best[places].reshape(rows, -1)]))) for best in pair.best]
    return float(np.square(shown[0].astype(np.float64) - shown[1]).mean())
