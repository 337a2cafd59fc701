"""How much of what a decoder made is what next-token prediction draws."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import Int
from diagd.runtime.decoders import RasterDecoder
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.stream import Ids
from diagd.schedule import NO_SINK


def redrawn(
    session: Session,
    frames: Int,
    actions: Ids | None,
    *,
    rows: int | None = None,
    sampling: SamplingSettings | None = None,
    seed: int = 0,
) -> Int:
    """What next-token prediction draws at each cell of given frames, behind the given tokens ahead of it.

    Args:
        session: started at the prompt of the frames.
        frames: int32 [F, rows, columns].
        actions: [F, n], ids of the known tokens that lead to each.
        rows: of the widest pass; default: as many as the engine takes.
        sampling: default: the manifest's.
        seed: of the random numbers.

    Returns:
        int32 [F, rows, columns].
    """
    decoder = RasterDecoder(frames, rows or session.engine.max_width)
    steps = session.steps(decoder, actions, count=len(frames), sampling=sampling, seed=seed)
    drawn = [result.tokens for step, result in steps if (step.sinks != NO_SINK).any()]
    return np.concatenate(drawn).reshape(frames.shape)


def audit(
    session: Session,
    frames: Int,
    actions: Ids | None,
    *,
    sampling: SamplingSettings | None = None,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Share [F] of each frame's cells that are next-token prediction's; see ``redrawn``.

    A frame whose share is 1 is next-token prediction's, behind the frames before it.
    """
    same = redrawn(session, frames, actions, sampling=sampling, seed=seed) == frames
    shares: NDArray[np.float64] = same.mean(axis=(1, 2))
    return shares
