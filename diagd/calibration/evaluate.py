"""A candidate and its reference on the same trajectories: figures, the gate, times and harm by layer."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle
from diagd.bundle.manifest import OwnLikelihood, StepGraph
from diagd.calibration.options import Budget
from diagd.calibration.report import Figures, LayerReport, WidthReport
from diagd.calibration.trajectory import CalibrationSet, Rollouts, Trajectory, open_graphs, session_window
from diagd.engines.engine import Engine, Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.progress import Progress
from diagd.runtime.comparison import Comparison, Sums, likelihood, lockstep, log_softmax
from diagd.runtime.decoders.draft import MEASURED
from diagd.runtime.load import threads_by_size
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.sampling import SamplingSettings
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

OWN_PROMPTS = 4
"""Prompts behind which a model decodes frames of its own."""

OWN_CELLS = 6144
"""Most cells of these frames, where they are large."""

ATTEMPTS = 5
"""Runs of the gate; ahead of each but the first, products are given up."""

SETTLED_ERRORS = 2.0
"""Standard errors between a figure and its bound at which a verdict stands."""


class Evaluator:
    """Compares graphs with the reference of a bundle.

    ``threads`` 0 is what ``load`` takes for the bundle.
    """

    def __init__(
        self,
        bundle: Bundle,
        reference: Sequence[StepGraph],
        samples: CalibrationSet,
        threads: int,
        progress: Progress,
    ) -> None:
        size = sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file())
        self._cpu = threads_by_size(CpuOptions(threads, prepack=False), size)
        self._bundle, self._progress = bundle, progress
        self._samples = replace(samples, seed=samples.seed + GATE_SEED)
        self._reference = self._open(reference, "fp32")
        self._ranges = bundle.manifest.sampling.range_table(bundle.manifest.layout)
        self._allowed = slice(int(self._ranges[:, 0].min()), int(self._ranges[:, 1].max()))
        tokenizer = bundle.manifest.tokenizer
        self._pixels = None if tokenizer is None else PixelCodec(bundle, self._cpu)

    def compare(
        self, candidate: Sequence[StepGraph], weight: str, budget: Budget
    ) -> tuple[Figures, dict[int, Sums]]:
        """Decode rounds of trajectories with both engines until the verdict stands.

        Returns the figures, and sums by rows of the step. ``candidate``: graphs of the reference's form,
        whose weights are ``weight``, see ``Precision.kind``.
        """
        trajectories = self._samples.trajectories
        comparison = Comparison(self._ranges, self._bundle.manifest.layout.prefix)
        errors: list[float] = []
        with closing(self._open(candidate, weight)) as engine:
            both = self._rollouts(self._reference), self._rollouts(engine)
            passes = sum(trajectory.steps for trajectory in trajectories)
            with self._progress.count("gate, passes", ROUNDS[0] * passes) as advance:
                for done in range(ROUNDS[1]):
                    if done >= ROUNDS[0] and is_settled(comparison.figures(), budget):
                        break
                    for number, trajectory in enumerate(trajectories, start=done * len(trajectories)):
                        self._compare(both, trajectory, number, comparison, errors)
                        advance(trajectory.steps)
        noise = float(np.mean(errors)) if errors else None
        psnr = None if noise is None else 10 * float(np.log10(255**2 / max(noise, 1e-6)))
        return {**comparison.figures(), "psnr": psnr}, comparison.widths

    def _compare(
        self,
        both: tuple[Rollouts, Rollouts],
        trajectory: Trajectory,
        number: int,
        comparison: Comparison,
        errors: list[float],
    ) -> None:
        """One trajectory: the reference decodes, the candidate predicts every token from its own cache.

        ``errors`` takes the mean squared error of each frame of most probable tokens.
        """
        comparison.begin()
        leader, follower = (side.steps(trajectory, number, follow=i > 0) for i, side in enumerate(both))
        counted = len(comparison.cells)
        for step, cells, expected, seen in lockstep(leader, follower, both[1].session.stream):
            comparison.add(step.width, cells, expected.logits, seen.logits)
        best = {cell.position: (cell.expected, cell.token) for cell in comparison.cells[counted:]}
        layout = self._bundle.manifest.layout
        for first in range(layout.first_cell(0), max(best, default=0) + 1, layout.frame_length):
            frame = [best[cell] for cell in range(first, first + layout.cells) if cell in best]
            if self._pixels is not None and len(frame) == layout.cells and len(errors) < FRAMES:
                grids = np.array(frame, np.int32).T.reshape(2, layout.rows, -1)
                shown = [next(iter(self._pixels.decode([grid]))) for grid in grids]
                errors.append(float(np.square(shown[0].astype(np.float64) - shown[1]).mean()))

    def step_times(
        self, candidate: Sequence[StepGraph], weight: str, widths: dict[int, Sums]
    ) -> dict[int, WidthReport]:
        """Median time of a step of each width, of both engines, with what a comparison gave.

        Each runs by itself with the threads that ``load`` gives it, at first unmeasured; they take turns by
        trajectory, so that what else the machine does falls on both.
        """
        seconds: list[dict[int, list[float]]] = [{}, {}]
        with closing(self._open(candidate, weight)) as engine:
            both = self._rollouts(self._reference), self._rollouts(engine)
            for side in both:
                deque(side.steps(self._samples.trajectories[0], 0), maxlen=0)
            for number, trajectory in enumerate(self._progress.each(self._samples.trajectories, "timing")):
                for index in (0, 1) if number % 2 else (1, 0):
                    for step, result in both[index].steps(trajectory, number):
                        seconds[index].setdefault(step.width, []).append(result.time.engine)
        before, after = ({width: 1e3 * float(np.median(s)) for width, s in side.items()} for side in seconds)
        return {
            width: WidthReport(
                predictions=seen.predictions,
                agreement=seen.agreed / seen.predictions,
                milliseconds_before=before[width],
                milliseconds_after=after[width],
            )
            for width, seen in sorted(widths.items())
        }

    def layers(
        self, candidates: Iterator[tuple[str, Sequence[StepGraph]]], count: int, weight: str
    ) -> dict[str, float]:
        """Divergence of the predictions from the reference, nats, by the layer that alone is quantised.

        The reference decodes once; what it was asked is asked of every candidate.
        """
        widest = min(self._samples.trajectories, key=lambda trajectory: trajectory.schedule.d)
        trajectory, found = replace(widest, steps=LAYER_STEPS // 2), {}
        asked = [
            [
                (step.sinks[step.sinks != NO_SINK], result.tokens.copy(), self._law(result))
                for step, result in steps
            ]
            for steps in (self._rollouts(self._reference).steps(trajectory, number) for number in range(2))
        ]
        with self._progress.count("layers", count) as advance:
            for name, graphs in candidates:
                with closing(self._open(graphs, weight)) as engine:
                    found[name] = self._divergence(self._rollouts(engine), trajectory, asked)
                advance(1)
        return found

    def _divergence(
        self, rollouts: Rollouts, trajectory: Trajectory, asked: Sequence[Sequence[tuple[Int, Int, Law]]]
    ) -> float:
        """Mean divergence of an engine's predictions from what the reference predicted, nats."""
        total, predictions = 0.0, 0
        for number, answers in enumerate(asked):
            steps = rollouts.steps(trajectory, number, follow=True)
            for (_, result), (cells, tokens, expected) in zip(steps, answers, strict=True):
                rollouts.session.stream.write(cells, tokens)
                if len(cells):
                    total += likelihood(expected, self._law(result))[1]
                    predictions += len(cells)
        return total / max(predictions, 1)

    def own_likelihood(self, graphs: Sequence[StepGraph], weight: str) -> OwnLikelihood:
        """How likely its own frames are to a model by these graphs, in a window as long as they hold."""
        manifest = self._bundle.manifest
        window = session_window(manifest, graphs, manifest.context.frames)
        frames = max(1, min(MEASURED, OWN_CELLS // manifest.layout.cells) // OWN_PROMPTS)
        with closing(self._open(graphs, weight, window)) as engine:
            rollouts = Rollouts(self._bundle, engine, replace(self._samples, window=window))
            with self._progress.task("likelihood of its own frames"):
                found = rollouts.own_likelihoods(OWN_PROMPTS, frames)
        return OwnLikelihood(
            precision=graphs[0].precision,
            window=window,
            **asdict(SamplingSettings.of(manifest.sampling)),
            mean=float(np.mean(found)),
            deviation=float(np.std(found)),
        )

    def _law(self, result: Result) -> Law:
        """Logarithms of the probabilities of allowed ids, float64 [R, V]."""
        logits = result.logits
        return log_softmax(logits[:, self._allowed]) if len(logits) else np.zeros((0, 0))

    def _rollouts(self, engine: Engine) -> Rollouts:
        return Rollouts(self._bundle, engine, self._samples)

    def _open(self, graphs: Sequence[StepGraph], weight: str, window: int | None = None) -> Engine:
        # Products of the GPU forms have signed activations, for which the CPU has no quick kernel.
        fuse = graphs[0].form.traits.host and weight != "fp8"
        frames = window or self._samples.window
        return open_graphs(self._bundle, graphs, frames, replace(self._cpu, fuse=fuse))


def failures(figures: Mapping[str, float | None], budget: Budget) -> list[str]:
    """What is outside the budget, in words; agreement and NLL must be inside by one standard error."""
    found = []
    agreement, nll, psnr = (figures[name] for name in ("agreement", "nll", "psnr"))
    agreement_error, nll_error = figures["agreement_error"] or 0.0, figures["nll_error"] or 0.0
    if agreement is None or not agreement - agreement_error >= budget.agreement:
        found.append(
            f"agreement {agreement:.4f} +- {agreement_error:.4f} is not safely above {budget.agreement:g}"
        )
    if nll is None or not nll + nll_error <= budget.nll:
        found.append(f"NLL rises by {nll:.4f} +- {nll_error:.4f}, allowed is {budget.nll:g}")
    if psnr is not None and not psnr >= budget.psnr:
        found.append(f"PSNR {psnr:.2f} dB is below {budget.psnr:g}")
    return found


def is_settled(figures: Mapping[str, float | None], budget: Budget) -> bool:
    """Whether more predictions would hardly change the verdict: no bound is within two standard errors."""
    distances = (
        (figures["agreement"], figures["agreement_error"], budget.agreement),
        (figures["nll"], figures["nll_error"], budget.nll),
    )
    return all(
        value is not None and error is not None and not abs(value - bound) < SETTLED_ERRORS * error
        for value, error, bound in distances
    )


def part_of(name: str) -> str:
    """The layer that a product belongs to: ``transformer.layers.3``; the head is ``transformer.head``."""
    return ".".join(name.split(".")[:3])


def most_harmful(layers: Sequence[LayerReport]) -> list[str]:
    """The fewest quantised products that make up half of the harm of them all, the worst first.

    The divergence that a layer causes alone is shared among its products by their noise; divergences of
    layers add up nearly, so that every call about halves what is left.
    """
    quantised = [layer for layer in layers if not layer.excluded]
    noises = {layer.name: 10 ** (-layer.signal_to_noise / 10) for layer in quantised}
    sums: dict[str, float] = defaultdict(float)
    for name, noise in noises.items():
        sums[part_of(name)] += noise
    harms = {
        layer.name: (layer.divergence or 0.0) * noises[layer.name] / max(sums[part_of(layer.name)], 1e-30)
        for layer in quantised
    }
    total, chosen = sum(harms.values()), list[str]()
    for name in sorted(harms, key=lambda name: (-harms[name], name)):
        if chosen and sum(harms[other] for other in chosen) >= total / 2:
            break
        chosen.append(name)
    return chosen
