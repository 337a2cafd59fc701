"""Bytes and operations of a step, by formula."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diagd.bundle.precision import KV_CACHES, PRECISIONS, Precision
from diagd.planning.model import ModelSize
from diagd.schedule import chained_lag, steps_per_frame


def precisions(kv_cache: str | None = None) -> dict[str, Precision]:
    """``PRECISIONS``, with a quantised K/V cache if one is named."""
    if kv_cache is None:
        return dict(PRECISIONS)
    return {name: replace(entry, cache=KV_CACHES[kv_cache]) for name, entry in PRECISIONS.items()}


@dataclass(frozen=True)
class Lags:
    """A decoding order and its passes for one frame, by the closed forms of the schedule."""

    name: str
    k: int
    d: int
    steps: int

    def passes(self, frames: int) -> float:
        """Passes for each frame of a run of ``frames``; without end it comes to ``d``."""
        return (self.steps + (frames - 1) * self.d) / frames


def lags(model: ModelSize, ks: tuple[int, ...]) -> list[Lags]:
    """Next-token prediction, then serial and chained frames for each row lag."""
    rows, columns = model.layout.rows, model.layout.columns
    cells = model.layout.cells
    orders = [Lags("next token", columns, cells, cells)]
    for k in ks:
        steps = steps_per_frame(rows, columns, k)
        orders += [
            Lags(f"k={k} serial", k, steps, steps),
            Lags(f"k={k} chained", k, chained_lag(rows, k), steps),
        ]
    return orders


def live_tokens(model: ModelSize, generated: int = 1) -> float:
    """Mean tokens in the cache while a full context's last ``generated`` frames are decoded."""
    frames = model.context_frames - generated / 2
    return model.layout.prefix + frames * model.layout.frame_length


def cache_bytes(model: ModelSize, precision: Precision, tokens: float) -> float:
    """Bytes of K and V for that many tokens."""
    return model.cache_elements * precision.cache * tokens


def step_bytes(model: ModelSize, precision: Precision, live: float) -> float:
    """Bytes one pass reads: every streamed parameter once, and the live K/V rows once."""
    return model.streamed * precision.weight + cache_bytes(model, precision, live)


def step_operations(model: ModelSize, width: float, live: float) -> float:
    """Floating-point operations of one pass: 2 a parameter and fed token, 4 a query element and live slot."""
    return width * (2.0 * model.streamed + 4.0 * model.layers * model.query_width * live)


def step_seconds(bytes_read: float, operations: float, bandwidth: float, peak: float) -> float:
    """Least time of a pass on a roofline (Williams et al., 2009): the slower of memory and arithmetic."""
    return max(bytes_read / bandwidth, operations / peak)
