"""Many rollouts at once in PyTorch, straight from the schedule tables: the yardstick for quality figures.

Every rollout of a batch follows the same schedule, so one table drives them all. The cache holds one slot per
table row and the mask is the tables' own, which makes this independent of the runtime.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from diagd.engines.engine import SamplingState
from diagd.engines.sampler import sample
from diagd.export.transformer import FullAttention, Transformer
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import NO_SINK, Schedule
from diagd.tuning.teacher_forcing import visible_rows


def roll_out(
    model: Transformer,
    streams: NDArray[np.int64],
    prompt: int,
    schedule: Schedule,
    sampling: SamplingSettings,
    *,
    seed: int,
    window: int,
) -> NDArray[np.int64]:
    """Decode all frames but the first ``prompt``.

    ``streams`` are int64 [B, F * frame_length], of which the actions of all frames and the cells of the
    ``prompt``, fewer frames than ``window``, are read. Rollout b draws with seed ``seed + b``: the same
    numbers under every schedule. The cache holds ``window`` frames; older ones are forgotten half a window at
    a time.

    Returns:
        int64 [B, F * frame_length], the streams with every cell behind the prompt decoded.
    """
    length, known, result = schedule.layout.frame_length, prompt, streams.copy()
    frames = streams.shape[1] // length
    while known < frames:
        first = max(0, known - window // 2)
        end = min(frames, first + window)
        span = slice(first * length, end * length)
        # Noise is keyed by the place in the whole stream, wherever the window lies.
        decoded = _decode(model, result[:, span], known - first, span.start, schedule, sampling, seed)
        result[:, span], known = decoded, end
    return result


class _CachedRows(FullAttention):
    """Attention of the rows of one step over the rows of all steps so far."""

    def __init__(self, model: Transformer, batch: int, rows: int) -> None:
        config = model.config
        shape = (config.layers, batch, config.kv_heads, rows, config.head_size)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.step, self.visible = slice(0, 0), torch.zeros(0, 0, dtype=torch.bool)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Append the new rows, then attend to the visible ones."""
        self.keys[layer, :, :, self.step] = keys.transpose(1, 2)
        self.values[layer, :, :, self.step] = values.transpose(1, 2)
        end = self.step.stop
        attended = functional.scaled_dot_product_attention(
            queries.transpose(1, 2),
            self.keys[layer, :, :, :end],
            self.values[layer, :, :, :end],
            attn_mask=self.visible[self.step, :end],
            enable_gqa=True,
        )
        return attended.transpose(1, 2)


@torch.inference_mode()
def _decode(
    model: Transformer,
    streams: NDArray[np.int64],
    prompt: int,
    offset: int,
    schedule: Schedule,
    sampling: SamplingSettings,
    seed: int,
) -> NDArray[np.int64]:
    """Decode the frames behind the first ``prompt`` ones of a window that starts at position ``offset``."""
    batch, frames = len(streams), streams.shape[1] // schedule.layout.frame_length
    table = schedule.table(first_frame=prompt, frames=frames - prompt, fed=0)
    cache = _CachedRows(model, batch, len(table.positions))
    cache.visible = torch.from_numpy(visible_rows(table, keep_seeds=schedule.keep_seeds))
    decoded = streams.copy()
    laws = [
        SamplingState(sampling.temperature, sampling.top_k, sampling.top_p, seed + b) for b in range(batch)
    ]
    for n in range(table.steps):
        step = table.step(n)
        cache.step = slice(int(table.offsets[n]), int(table.offsets[n + 1]))
        positions = torch.from_numpy(step.positions).long().expand(batch, -1)
        states = model.states(torch.from_numpy(decoded[:, step.sources]), positions, cache)
        rows = np.flatnonzero(step.sinks != NO_SINK)
        logits, sinks = (states[:, rows] @ model.head).float().numpy(), step.sinks[rows]
        for stream, law, own in zip(decoded, laws, logits, strict=True):
            stream[sinks] = sample(own, sinks + offset, law)
    return decoded
