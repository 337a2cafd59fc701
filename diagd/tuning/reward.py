"""What can be verified of a rollout, frame by frame, and a score of it.

Every term is something that can be counted in tokens; none is a matter of taste. Consistency, likelihood and
dynamics are judged on both sides: what is too likely or too still is no better than what is too wild, or the
best of many rollouts would be the one in which nothing happens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.transformer import TransformerConfig
from diagd.schedule import Schedule
from diagd.tuning.probe import Probe, Transitions
from diagd.tuning.rollouts import Streams, parts
from diagd.tuning.teacher_forcing import ForcedPasses, Logits, forced_nll

Figures = dict[str, NDArray[np.float64]]
"""By name, [B, F]: of each frame behind the prompt."""

WEIGHTS = {"followed": 0.4, "consistent": 0.2, "known": 0.15, "likelihood": 0.15, "dynamics": 0.1}
"""Of the terms in a score; without one of them the others share its weight."""

BAND = (0.1, 0.9)
"""Quantiles of the likelihood of true frames between which a frame is typical."""

_SHIFTS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]


@dataclass(frozen=True)
class RewardModel:
    """Looks at windows whose first ``prompt`` frames are known.

    Attributes:
        config: of the model.
        prompt: known frames.
        logits: of the model as it was, the reference of the likelihood.
        device: of the reference.
        probe: reads actions; None where there is none to read.
        seen: bool [rows, vocabulary], ids that true frames have in a row.
        band: of the likelihood, nats a token.
        usual: share of cells that change under an action, and of those that come from the frame before; under
            any that is not among them as ().
    """

    config: TransformerConfig
    prompt: int
    logits: Logits
    device: str
    probe: Probe | None
    seen: NDArray[np.bool_]
    band: tuple[float, float]
    usual: Mapping[tuple[int, ...], tuple[float, float]]

    @classmethod
    def learn(
        cls,
        config: TransformerConfig,
        streams: Streams,
        prompt: int,
        logits: Logits,
        probe: Probe | None = None,
        device: str = "cpu",
    ) -> RewardModel:
        """Learn what true frames are like."""
        cells, _ = parts(streams, config.layout)
        seen = np.zeros((config.layout.rows, config.vocabulary), bool)
        for row in range(config.layout.rows):
            seen[row, np.unique(cells[:, :, row])] = True
        every = Transitions.of(streams, config.layout)
        blind = cls(config, prompt, logits, device, None, seen, (0.0, 0.0), _usual(every))
        nll = blind.figures(streams[:: max(1, len(streams) // 128)])["nll"]
        low, high = np.quantile(nll, BAND)
        return cls(config, prompt, logits, device, probe, seen, (float(low), float(high)), blind.usual)

    def figures(self, streams: Streams) -> Figures:
        """What is found in windows [B, N].

        Returns:
            ``followed``: probability of the action to the probe, where there is one; ``consistent``: share of
            cells that the frame before shows there or one cell aside, all in one direction; ``known``: share
            of ids that true frames have in that row; ``nll``: under next-token prediction of the reference,
            nats a token; ``changed``: share of cells that differ from the frame before; ``expected`` and
            ``agreeing``: what is changed and consistent under that action in true frames.
        """
        layout, count = self.config.layout, len(streams)
        moved = Transitions.of(streams, layout, self.prompt)
        rows = np.arange(layout.rows)[:, None]
        usual = np.array([self.usual.get(tuple(led), self.usual[()]) for led in moved.led.tolist()])
        found = {
            "consistent": _agreement(moved),
            "known": self.seen[rows, moved.after].mean((1, 2)),
            "nll": self._nll(streams).ravel(),
            "changed": (moved.before != moved.after).mean((1, 2)),
            "expected": usual[:, 0],
            "agreeing": usual[:, 1],
        }
        figures = {name: values.reshape(count, -1).astype(np.float64) for name, values in found.items()}
        return self.reread(figures, streams)

    def reread(self, figures: Figures, streams: Streams) -> Figures:
        """The figures of windows [B, N] with the actions read by this model's own probe."""
        if self.probe is None:
            return figures
        read, _ = self.probe.read(Transitions.of(streams, self.config.layout, self.prompt))
        return figures | {"followed": read.reshape(len(streams), -1)}

    def score(self, figures: Figures, reference: Figures) -> NDArray[np.float64]:
        """Score of each window [B], 0 to 1: the terms' places among those of the reference, weighted."""
        terms, others = self._terms(figures), self._terms(reference)
        total = sum(WEIGHTS[name] for name in terms)
        weighted = [WEIGHTS[name] / total * _place(terms[name], others[name]) for name in terms]
        scores: NDArray[np.float64] = np.sum(weighted, axis=0).mean(1)
        return scores

    def _terms(self, figures: Figures) -> Figures:
        """The terms of a score, more is better."""
        low, high = self.band
        nll = figures["nll"]
        terms = {
            "consistent": -np.abs(figures["consistent"] - figures["agreeing"]),
            "known": figures["known"],
            "likelihood": -np.maximum(0, np.maximum(low - nll, nll - high)),
            "dynamics": -np.abs(figures["changed"] - figures["expected"]),
        }
        return terms | ({"followed": figures["followed"]} if "followed" in figures else {})

    def _nll(self, streams: Streams) -> NDArray[np.float64]:
        layout = self.config.layout
        frames = (streams.shape[1] - layout.prefix) // layout.frame_length
        raster = Schedule.next_token(layout)
        passes = ForcedPasses([raster], frames, score_prompt=False, prompt=self.prompt)
        nll = forced_nll(self.logits, passes, streams, 0, device=self.device)[:, layout.prefix :]
        by_frame: NDArray[np.float64] = np.nanmean(
            nll.reshape(len(streams), frames, -1)[:, self.prompt :], axis=2, dtype=np.float64
        )
        return by_frame


def _usual(seen: Transitions) -> dict[tuple[int, ...], tuple[float, float]]:
    shares = np.stack([(seen.before != seen.after).mean((1, 2)), _agreement(seen)], axis=1)
    found = defaultdict(list)
    for action, pair in zip(map(tuple, seen.led.tolist()), shares, strict=True):
        found[action].append(pair)
    found[()] = list(shares)
    return {action: tuple(np.mean(pairs, axis=0).tolist()) for action, pairs in found.items()}


def _agreement(moved: Transitions) -> NDArray[np.float64]:
    """Share of cells [n] that come from the frame before, under the best of `_SHIFTS`."""
    rows, columns = moved.after.shape[1:]
    best = np.zeros(len(moved))
    for y, x in _SHIFTS:
        old = moved.before[:, max(0, y) : rows + min(0, y), max(0, x) : columns + min(0, x)]
        new = moved.after[:, max(0, -y) : rows + min(0, -y), max(0, -x) : columns + min(0, -x)]
        best = np.maximum(best, (old == new).mean((1, 2)))
    return best


def _place(values: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the reference below each value, ties counted half."""
    known = np.sort(reference, axis=None)
    below, up_to = (np.searchsorted(known, values, side) for side in ("left", "right"))
    places: NDArray[np.float64] = (below + up_to) / (2 * len(known))
    return places


NLL_RISE = 0.01
"""Largest relative rise of the likelihood of true windows, nats."""

_RESAMPLES = 2000

Measures = dict[str, NDArray[np.float64]]
"""By name, [C]: of each context; ``truth`` of each true window, nats a token."""


@dataclass(frozen=True)
class Change:
    """A figure before and after, and the 95 % interval of the difference.

    ``truth`` is told as the relative rise of the likelihood.
    """

    before: float
    after: float
    low: float
    high: float

    @classmethod
    def of(cls, before: NDArray[np.float64], after: NDArray[np.float64], *, relative: bool = False) -> Change:
        """From paired samples [C]."""
        picked = np.random.default_rng(0).integers(len(before), size=(_RESAMPLES, len(before)))
        differences = (after - before)[picked].mean(1)
        if relative:
            differences = differences / before[picked].mean(1)
        low, high = np.quantile(differences, (0.025, 0.975))
        return cls(float(before.mean()), float(after.mean()), float(low), float(high))


@dataclass(frozen=True)
class Choice:
    """What the scores of rollouts tell of those that share a context.

    Attributes:
        agreement: correlation within contexts with the scores by another probe; 1 is no noise of the probe.
        gained: the figure that has to rise, to that probe: a context's rollouts, and the best of them.
        truth: likewise of the true frames that followed there.
    """

    agreement: float
    gained: Change
    truth: float

    @classmethod
    def of(
        cls, scores: NDArray[np.float64], others: NDArray[np.float64], aim: NDArray[np.float64], truth: float
    ) -> Choice:
        """From scores by both probes and the figure to the second, each [M, R]."""
        a, b = (found - found.mean(1, keepdims=True) for found in (scores, others))
        spread = np.sqrt((a**2).sum() * (b**2).sum())
        best = aim[np.arange(len(aim)), scores.argmax(1)]
        agreement = float((a * b).sum() / spread) if spread else 0.0
        return cls(agreement, Change.of(aim.mean(1), best), truth)


def measures(model: RewardModel, rolled: Streams, reference: Figures, truth: NDArray[np.float64]) -> Measures:
    """What is compared of rollouts int64 [C, S, N], one for each context and seed.

    ``followed`` where actions can be read; ``score``; ``changed``: share of cells that change a frame;
    ``distinct``: share of cells in which rollouts of a context differ; ``unknown``: share of ids that true
    frames never have there.
    """
    contexts, seeds = rolled.shape[:2]
    figures = model.figures(rolled.reshape(contexts * seeds, -1))
    means = {name: values.reshape(contexts, -1).mean(1) for name, values in figures.items()}
    pairs = [(rolled[:, a] != rolled[:, b]).mean(1) for a, b in combinations(range(seeds), 2)]
    found = {
        "score": model.score(figures, reference).reshape(contexts, seeds).mean(1),
        "changed": means["changed"],
        "distinct": np.mean(pairs, axis=0),
        "unknown": 1 - means["known"],
        "truth": truth,
    }
    return found | ({"followed": means["followed"]} if "followed" in means else {})


@dataclass(frozen=True)
class Verdict:
    """Changes by name, and which of them are not allowed, in words."""

    changes: dict[str, Change]
    breaches: list[str]

    @classmethod
    def of(cls, before: Measures, after: Measures) -> Verdict:
        """Judge what a model became."""
        changes = {
            name: Change.of(values, after[name], relative=name == "truth") for name, values in before.items()
        }
        aim = aim_of(before)
        told = {
            f"{aim} is not up": changes[aim].low <= 0,
            f"NLL of true frames may be up by more than {NLL_RISE:.0%}": changes["truth"].high > NLL_RISE,
            "dynamics are lower": changes["changed"].high < 0,
            "rollouts are less distinct": changes["distinct"].high < 0,
            "unknown ids are up": changes["unknown"].low > 0,
        }
        return cls(changes, [words for words, is_so in told.items() if is_so])


def aim_of(found: Measures) -> str:
    """The figure that has to rise: actions followed, or the score where actions cannot be read."""
    return "followed" if "followed" in found else "score"
