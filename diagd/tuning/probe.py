"""Which action led from one frame to the next, read off their tokens: a small network of inverse dynamics.

Whether a rollout follows its actions can be told wherever an action can be read off true frames. The network
compares each cell with those around it one frame before, for what an action does is mostly that things move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from diagd.engines.engine import Int
from diagd.schedule import StreamLayout
from diagd.tuning.rollouts import Streams, parts

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
    """Reads actions off transitions; see ``fit``.

    Attributes:
        known: ids that each of the known tokens takes, by its index; only those that vary are read.
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
