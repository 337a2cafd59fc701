"""What can be verified of a rollout, frame by frame, and a score of it.

Every term is something that can be counted in tokens; none is a matter of taste. Consistency, likelihood and
dynamics are judged on both sides: what is too likely or too still is no better than what is too wild, or the
best of many rollouts would be the one in which nothing happens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from diagd.bundle.transformer import TransformerConfig
from diagd.engines.engine import Int
from diagd.schedule import Schedule, StreamLayout
from diagd.tuning.rollouts import Streams, parts
from diagd.tuning.teacher_forcing import ForcedPasses, Logits, forced_nll

_WIDTH, _CHANNELS, _POOLS, _REACH = 16, 48, 8, 2
_BATCH, _RATE, _EPOCHS = 64, 3e-3, 20
_READ = 512
"""Transitions that are read at once."""


@dataclass(frozen=True)
class Transitions:
    """Pairs of frames that follow each other.

    Attributes:
        before, after: cells, int32 [n, rows, columns].
        led: known tokens between them, int32 [n, gap].
    """

    before: Int
    after: Int
    led: Int

    @classmethod
    def of(cls, streams: Streams, layout: StreamLayout, first: int = 1) -> Transitions:
        """Those to frame ``first`` of windows [B, N] and to the later ones, window by window."""
        cells, led = parts(streams, layout)
        before, after = (c.reshape(-1, *c.shape[2:]) for c in (cells[:, first - 1 : -1], cells[:, first:]))
        return cls(before, after, led[:, first:].reshape(len(after), layout.gap))

    def __len__(self) -> int:
        return len(self.led)

    def __getitem__(self, part: slice) -> Transitions:
        return Transitions(self.before[part], self.after[part], self.led[part])

    @property
    def vary(self) -> bool:
        """Whether there is an action to be read."""
        return bool((self.led != self.led[:1]).any())


class Probe:
    """Reads actions off transitions: a small network of inverse dynamics.

    It compares each cell with those around it one frame before, for what an action does is mostly that things
    move. ``known`` are ids that each of the known tokens takes, by its index; only those that vary are read.
    """

    def __init__(self, known: dict[int, NDArray[np.int64]], network: nn.Module) -> None:
        self.known, self._network = known, network

    @classmethod
    def fit(
        cls,
        seen: Transitions,
        vocabulary: int,
        *,
        steps: int,
        seed: int,
        report: Callable[[int], None] = lambda _: None,
    ) -> Probe:
        """Train one on true transitions; deterministic given the arguments.

        One of the known tokens varies. There are fewer ``steps`` where there is little to learn from.
        """
        columns = [np.unique(column) for column in seen.led.T]
        known = {n: ids.astype(np.int64) for n, ids in enumerate(columns) if len(ids) > 1}
        answers = _classes(seen.led, known)
        steps = min(steps, 1 + _EPOCHS * len(seen) // _BATCH)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            network = _Network(vocabulary, seen.before.shape[1:], [len(ids) for ids in known.values()])
            optimiser = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=0.01)
            for step in range(steps):
                picked = np.random.default_rng((seed, step)).integers(len(seen), size=_BATCH)
                heads = network(*_tensors(seen.before[picked], seen.after[picked]))
                losses = [
                    functional.cross_entropy(h, a) for h, a in zip(heads, answers[:, picked], strict=True)
                ]
                optimiser.zero_grad(set_to_none=True)
                torch.stack(losses).sum().backward()
                optimiser.param_groups[0]["lr"] = _RATE * min(1.0, 2 * (1 - step / steps))
                optimiser.step()
                report(step + 1)
        return cls(known, network.eval())

    @torch.inference_mode()
    def read(self, seen: Transitions) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What it thinks of the action of each transition.

        Returns:
            Its probability [n], and whether it is the most probable one [n]; both are means over
            the tokens of an action that vary.
        """
        answers, likely, right = _classes(seen.led, self.known), list[Tensor](), list[Tensor]()
        for start in range(0, len(seen), _READ):
            part = slice(start, start + _READ)
            heads = self._network(*_tensors(seen.before[part], seen.after[part]))
            laws, asked = [head.softmax(1) for head in heads], answers[:, part]
            chosen = [law.gather(1, a.clamp(min=0)[:, None]) for law, a in zip(laws, asked, strict=True)]
            likely.append((torch.cat(chosen, 1).T * (asked >= 0)).mean(0))
            right.append((torch.stack([law.argmax(1) for law in laws]) == asked).float().mean(0))
        return torch.cat(likely).double().numpy(), torch.cat(right).double().numpy()

    def commonest(self, led: Int) -> float:
        """Share of the actions [n, gap] that always naming the commonest one gets right."""
        shares = [np.unique(led[:, n], return_counts=True)[1].max() / len(led) for n in self.known]
        return float(np.mean(shares))


class _Network(nn.Module):
    """Cells of two frames [B, h, w] to logits of each head [B, classes]."""

    def __init__(self, vocabulary: int, grid: Sequence[int], classes: Sequence[int]) -> None:
        super().__init__()
        near = (2 * _REACH + 1) ** 2
        self.embedding = nn.Embedding(vocabulary, _WIDTH)
        self.look = nn.Sequential(
            nn.Conv2d(2 * _WIDTH + near, _CHANNELS, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1),
            nn.GELU(),
        )
        self.pool = nn.Linear(grid[0] * grid[1], _POOLS)
        self.heads = nn.ModuleList(nn.Linear(_CHANNELS * _POOLS, count) for count in classes)

    def forward(self, before: Tensor, after: Tensor) -> list[Tensor]:
        old, new = (self.embedding(cells).permute(0, 3, 1, 2) for cells in (before, after))
        batch, width, rows, columns = old.shape
        around = functional.unfold(old, 2 * _REACH + 1, padding=_REACH).view(batch, width, -1, rows, columns)
        alike = (around * new[:, :, None]).mean(1)
        pooled = self.pool(self.look(torch.cat([old, new, alike], 1)).flatten(2))
        return [head(pooled.flatten(1)) for head in self.heads]


def _classes(led: Int, known: dict[int, NDArray[np.int64]]) -> Tensor:
    """Which of its known ids each token is, int64 [slots, n]; -1 for others."""
    found = [np.searchsorted(ids, led[:, n]).clip(max=len(ids) - 1) for n, ids in known.items()]
    rows = [np.where(ids[f] == led[:, n], f, -1) for f, (n, ids) in zip(found, known.items(), strict=True)]
    return torch.from_numpy(np.stack(rows))


def _tensors(*cells: Int) -> list[Tensor]:
    return [torch.from_numpy(part.astype(np.int64)) for part in cells]


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
        cls, config: TransformerConfig, streams: Streams, prompt: int, logits: Logits, device: str = "cpu"
    ) -> RewardModel:
        """Learn what true frames are like; no actions are read."""
        cells, _ = parts(streams, config.layout)
        seen = np.zeros((config.layout.rows, config.vocabulary), bool)
        for row in range(config.layout.rows):
            seen[row, np.unique(cells[:, :, row])] = True
        usual = _usual(Transitions.of(streams, config.layout))
        blind = cls(config, prompt, logits, device, None, seen, (0.0, 0.0), usual)
        nll = blind.figures(streams[:: max(1, len(streams) // 128)])["nll"]
        low, high = np.quantile(nll, BAND)
        return replace(blind, band=(float(low), float(high)))

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
        passes = ForcedPasses([raster], frames, prompt=self.prompt)
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
