"""Continuations of windows of known videos, decoded on an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle
from diagd.engines.engine import Float, Int
from diagd.errors import UsageError
from diagd.runtime.decoders import Decoder
from diagd.runtime.group import Group
from diagd.runtime.load import open_group
from diagd.runtime.options import parse_decoder
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import StreamLayout

TOGETHER = 16
"""Rollouts that share the passes of an engine."""

Streams = NDArray[np.int64]
"""int64 [B, N]: windows of token streams, each of whole frames behind the layout's prefix."""

Rolling: TypeAlias = tuple[Streams, Sequence[int]]
"""Windows that are rolled out together, and the seed of each."""


def parts(streams: Streams, layout: StreamLayout) -> tuple[Int, Int]:
    """Cells int32 [B, F, rows, columns] of windows, and the known tokens [B, F, n] that lead to each frame.

    Of what led to the first frame, the tokens that stand ahead of the window are any.
    """
    rows = streams[:, layout.prefix :].reshape(len(streams), -1, layout.frame_length).astype(np.int32)
    end = layout.before + layout.cells
    cells = rows[..., layout.before : end].reshape(*rows.shape[:2], layout.rows, layout.columns)
    return cells, np.concatenate([np.roll(rows[..., end:], 1, axis=1), rows[..., : layout.before]], axis=2)


def with_cells(streams: Streams, layout: StreamLayout, cells: Int) -> Streams:
    """The windows with other cells, int32 [B, F, rows, columns]."""
    made = streams.copy()
    rows = made[:, layout.prefix :].reshape(len(streams), -1, layout.frame_length)
    rows[..., layout.before : layout.before + layout.cells] = cells.reshape(*cells.shape[:2], -1)
    made[:, layout.prefix :] = rows.reshape(len(streams), -1)
    return made


def open_lanes(bundle: Bundle, **options: Any) -> Group:
    """Up to `TOGETHER` sessions over one engine, as many as it has streams; options are ``open_group``'s."""
    try:
        return open_group(bundle, TOGETHER, **options)
    except UsageError:  # this graph or this engine has one stream
        return open_group(bundle, 1, **options)


def roll_out(
    group: Group,
    streams: Streams,
    prompt: int,
    decoder: Decoder,
    sampling: SamplingSettings,
    seeds: Sequence[int],
    text: Float | None = None,
) -> Streams:
    """The windows with every cell behind the ``prompt`` first frames decoded, under their own actions.

    The lanes of the group are used side by side; ``seeds`` are of each window.
    """
    layout, lanes = group.sessions[0].layout, len(group.sessions)
    cells, led = parts(streams, layout)
    made, frames = cells.copy(), cells.shape[1]
    for first in range(0, len(streams), lanes):
        part = range(first, min(first + lanes, len(streams)))
        for session, row in zip(group.sessions, part, strict=False):
            session.start(cells[row, :prompt], led[row, :prompt] if layout.gap else None, text)
        actions = [led[row, prompt:] if layout.gap else None for row in part]
        run = group.frames(
            actions, decoder, count=frames - prompt, sampling=sampling, seeds=[seeds[row] for row in part]
        )
        for lane, frame in run:
            made[first + lane, frame.index] = frame.tokens
    return with_cells(streams, layout, made)


def open_roller(
    path: Path,
    precision: str,
    decoder: str,
    prompt: int,
    sampling: SamplingSettings,
    text: Float | None,
    **options: Any,
) -> Callable[[Rolling], Streams]:
    """A worker: rolls out windows under their own actions on an engine of its own; see `roll_out`.

    The options are ``open_group``'s.
    """
    bundle = Bundle.open(path).at_precision(precision)
    group, strategy = open_lanes(bundle, **options), parse_decoder(decoder, bundle.manifest)

    def roll(rolling: Rolling) -> Streams:
        streams, seeds = rolling
        group.forget()
        return roll_out(group, streams, prompt, strategy, sampling, seeds, text)

    return roll
