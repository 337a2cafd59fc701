"""A candidate and its reference on the same trajectories: figures of the gate, and what each layer costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle
from diagd.bundle.manifest import StepGraph
from diagd.calibration.gate import Budget, Comparison, is_settled, log_softmax
from diagd.calibration.reference import open_graphs
from diagd.calibration.trajectory import Prompts, Tour, Trajectory
from diagd.engines.engine import Engine, Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.progress import Progress
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.step import Result
from diagd.schedule import NO_SINK

Law: TypeAlias = NDArray[np.float64]

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
        ranges = manifest.sampling.range_table(manifest.layout)
        self._allowed = slice(int(ranges[:, 0].min()), int(ranges[:, 1].max()))
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
        passes = sum(trajectory.steps for trajectory in course.tour)
        with closing(self._open(candidate, weight)) as engine:
            tours = self._tour(self._reference), self._tour(engine)
            with self._progress.count("gate, passes", ROUNDS[0] * passes) as advance:
                for done in range(ROUNDS[1]):
                    if done >= ROUNDS[0] and is_settled(comparison.figures(), budget):
                        break
                    for index, trajectory in enumerate(course.tour):
                        self._compare(tours, trajectory, done * len(course.tour) + index, comparison)
                        advance(trajectory.steps)
        return comparison

    def _compare(
        self, tours: tuple[Tour, Tour], trajectory: Trajectory, number: int, comparison: Comparison
    ) -> None:
        """One trajectory: the reference decodes, the candidate predicts every token from its own cache."""
        comparison.begin()
        best: dict[int, tuple[int, int]] = {}
        layout = self._bundle.manifest.layout
        low = self._allowed.start
        followed = tours[1].steps(trajectory, number, follow=True)
        for (step, expected), (_, seen) in zip(tours[0].steps(trajectory, number), followed, strict=True):
            cells = step.sinks[step.sinks != NO_SINK]
            tours[1].session.stream.write(cells, expected.tokens)
            if not len(cells):
                continue
            logits = expected.logits[:, self._allowed], seen.logits[:, self._allowed]
            comparison.add(*logits, step.width)
            figures = comparison.by_width[step.width]
            figures.reference.append(expected.time.engine)
            figures.quantised.append(seen.time.engine)
            tops = (low + rows.argmax(1) for rows in logits)
            best.update(zip(cells.tolist(), zip(*tops, strict=True), strict=True))
            for last in cells[(cells - layout.first_cell(0)) % layout.frame_length == layout.cells - 1]:
                frame = range(int(last) - layout.cells + 1, int(last) + 1)
                self._compare_pixels([best.pop(cell) for cell in frame], comparison)

    def _compare_pixels(self, best: list[tuple[int, int]], comparison: Comparison) -> None:
        """Mean squared error between the frames of the most probable tokens of both engines."""
        if self._pixels is None or len(comparison.frame_errors) >= FRAMES:
            return
        grids = np.array(best, np.int32).T.reshape(2, self._bundle.manifest.layout.rows, -1)
        shown = [next(iter(self._pixels.decode([grid]))) for grid in grids]
        error = np.square(shown[0].astype(np.float64) - shown[1]).mean()
        comparison.frame_errors.append(float(error))

    def layers(
        self, candidates: Iterator[tuple[str, Sequence[StepGraph]]], count: int, weight: str
    ) -> dict[str, float]:
        """Divergence of the predictions from the reference, nats, by the layer that alone is quantised.

        The reference decodes once; what it was asked is asked of every candidate.
        """
        widest = min(self._course.tour, key=lambda trajectory: trajectory.schedule.d)
        trajectory, found = replace(widest, steps=LAYER_STEPS // 2), {}
        asked = [
            [
                (step.sinks[step.sinks != NO_SINK], result.tokens.copy(), self._law(result))
                for step, result in steps
            ]
            for steps in (self._tour(self._reference).steps(trajectory, number) for number in range(2))
        ]
        with self._progress.count("layers", count) as advance:
            for name, graphs in candidates:
                with closing(self._open(graphs, weight)) as engine:
                    tour = self._tour(engine)
                    found[name] = self._divergence(tour, trajectory, asked)
                advance(1)
        return found

    def _divergence(
        self, tour: Tour, trajectory: Trajectory, asked: Sequence[Sequence[tuple[NDArray[Any], Int, Law]]]
    ) -> float:
        """Mean divergence of an engine's predictions from what the reference predicted, nats."""
        total, rows = 0.0, 0
        for number, answers in enumerate(asked):
            steps = tour.steps(trajectory, number, follow=True)
            for (_, result), (cells, tokens, expected) in zip(steps, answers, strict=True):
                tour.session.stream.write(cells, tokens)
                if len(cells):
                    total += float((np.exp(expected) * (expected - self._law(result))).sum())
                    rows += len(cells)
        return total / max(rows, 1)

    def _law(self, result: Result) -> Law:
        """Logarithms of the probabilities of allowed ids, float64 [R, V]."""
        logits = result.logits
        return log_softmax(logits[:, self._allowed]) if len(logits) else np.zeros((0, 0))

    def _tour(self, engine: Engine) -> Tour:
        course = self._course
        return Tour(self._bundle, engine, course.window, course.prompts, course.seed + GATE_SEED)

    def _open(self, graphs: Sequence[StepGraph], weight: str) -> Engine:
        return open_graphs(self._bundle, graphs, self._course.window, self._options(graphs, weight))

    def _options(self, graphs: Sequence[StepGraph], weight: str) -> CpuOptions:
        # Products of the GPU forms have signed activations, for which the CPU has no quick kernel.
        fuse = graphs[0].form.traits.host and weight != "fp8"
        return CpuOptions(self._threads, prepack=False, fuse=fuse)
