"""Whether a quantised graph may replace the FP32 one: both decode the same trajectories, side by side.

The FP32 engine decides which tokens come next, so that one early difference does not spoil what follows;
the candidate predicts every one of them from its own cache.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from diagd.calibration.trajectory import EnoughStepsError
from diagd.engines.engine import Engine, Float, Int, SamplingState, StepInputs
from diagd.errors import UsageError, unknown


@dataclass(frozen=True)
class Budget:
    """What a quantised model may lose.

    Attributes:
        agreement: smallest share of predictions whose most probable token is that of FP32.
        nll: largest relative rise of the NLL of tokens that the FP32 model draws.
        psnr: smallest PSNR of all frames of most probable tokens against those of FP32, dB.
    """

    agreement: float = 0.97
    nll: float = 0.01
    psnr: float = 30.0


def parse_budget(text: str, default: Budget) -> Budget:
    """``agreement=0.97,nll=0.01,psnr=30``, any of them.

    Raises:
        UsageError: a name or number is wrong.
    """
    names = [entry.name for entry in fields(Budget)]
    values = {name: float(getattr(default, name)) for name in names}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if name not in names:
            raise unknown("budget", name, names)
        try:
            values[name] = float(value)
        except ValueError:
            raise UsageError(f"--budget {pair}: expected NAME=NUMBER") from None
        if not equals or not np.isfinite(values[name]):
            raise UsageError(f"--budget {pair}: expected NAME=NUMBER")
    return Budget(**values)


@dataclass
class Comparison:
    """Sums over the predictions of a comparison.

    ``nll`` is the expected negative log-likelihood, nats, of tokens that the FP32 model draws under the FP32
    model itself; ``divergence`` is what it rises by under the candidate. Both are exact sums over the allowed
    ids, so that no draw adds noise. ``frame_errors`` are mean squared errors of frames of most probable
    tokens.
    """

    rows: int = 0
    agreed: int = 0
    nll: float = 0.0
    divergence: float = 0.0
    frame_errors: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"fp32": [], "quantised": []})
    by_width: dict[int, list[int]] = field(default_factory=dict)

    def add(self, reference: Float, candidate: Float, width: int) -> None:
        """Take the logits [R, V] of allowed ids of one step of ``width`` rows."""
        p_log, q_log = log_softmax(reference), log_softmax(candidate)
        agreed = int((reference.argmax(1) == candidate.argmax(1)).sum())
        p = np.exp(p_log)
        self.rows += len(reference)
        self.agreed += agreed
        self.nll -= float((p * p_log).sum())
        self.divergence += float((p * (p_log - q_log)).sum())
        counts = self.by_width.setdefault(width, [0, 0])
        counts[0] += agreed
        counts[1] += len(reference)

    def figures(self) -> dict[str, float | None]:
        """Measured values by name; PSNR is None without decoded frames."""
        rows = max(self.rows, 1)
        error = float(np.mean(self.frame_errors)) if self.frame_errors else None
        return {
            "agreement": self.agreed / rows,
            "nll": self.divergence / max(self.nll, 1e-30),
            "psnr": None if error is None else 10 * float(np.log10(255**2 / max(error, 1e-6))),
            "fp32_nll": self.nll / rows,
            "divergence": self.divergence / rows,
            "predictions": float(self.rows),
        }


def failures(figures: Mapping[str, float | None], budget: Budget) -> list[str]:
    """What is outside the budget, in words."""
    found = []
    agreement, nll, psnr = figures["agreement"], figures["nll"], figures["psnr"]
    if agreement is None or not agreement >= budget.agreement:
        found.append(f"agreement {agreement:.4f} is below {budget.agreement:g}")
    if nll is None or not nll <= budget.nll:
        found.append(f"NLL rises by {nll:.4f}, allowed is {budget.nll:g}")
    if psnr is not None and not psnr >= budget.psnr:
        found.append(f"PSNR {psnr:.2f} dB is below {budget.psnr:g}")
    return found


def log_softmax(logits: Float) -> NDArray[np.float64]:
    """Natural logarithms of probabilities, float64 [R, V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


class PairedEngine:
    """Runs every step on two engines, decodes with the first and compares.

    Args:
        reference: FP32.
        candidate: quantised, of the same capacity.
        ranges: int32 [frame_length, 2], allowed ids by place of the frame; rows of unequal range are
            compared over the widest one.
        comparison: takes the figures.

    ``best`` holds the most probable tokens of both, by place in the token buffer.
    """

    samples_in_graph = False

    def __init__(self, reference: Engine, candidate: Engine, ranges: Int, comparison: Comparison) -> None:
        self._reference, self._candidate, self._comparison = reference, candidate, comparison
        self.capacity, self.max_width = reference.capacity, reference.max_width
        self.token_buffer, self.slot_position = reference.token_buffer, reference.slot_position
        self.best: tuple[Int, Int] = (reference.token_buffer.copy(), reference.token_buffer.copy())
        self._low, self._high = int(ranges[:, 0].min()), int(ranges[:, 1].max())
        self.remaining = 0

    def padded_width(self, width: int) -> int:
        """See ``Engine.padded_width``."""
        return self._reference.padded_width(width)

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """See ``Engine.step``; raises ``EnoughStepsError`` once ``remaining`` steps have run."""
        if not self.remaining:
            raise EnoughStepsError
        self.remaining -= 1
        self._candidate.token_buffer[:] = self.token_buffer
        self._candidate.slot_position[:] = self.slot_position
        began = time.perf_counter()
        expected = self._reference.step(inputs, sampling)
        middle = time.perf_counter()
        seen = self._candidate.step(inputs, sampling)
        ended = time.perf_counter()
        if len(inputs.decoded):
            self._comparison.seconds["fp32"].append(middle - began)
            self._comparison.seconds["quantised"].append(ended - middle)
            allowed = slice(self._low, self._high)
            self._comparison.add(expected[:, allowed], seen[:, allowed], len(inputs.positions))
            sinks = inputs.sinks[inputs.decoded]
            for best, logits in zip(self.best, (expected, seen), strict=True):
                best[sinks] = self._low + logits[:, allowed].argmax(1)
        return expected

    def set_text(self, rows: Mapping[str, NDArray[np.generic]]) -> None:
        """See ``Engine.set_text``."""
        self._reference.set_text(rows)
        self._candidate.set_text(rows)

    def rotate_keys(self, angles: NDArray[np.float64], live: int) -> None:
        """See ``Engine.rotate_keys``."""
        self._reference.rotate_keys(angles, live)
        self._candidate.rotate_keys(angles, live)
