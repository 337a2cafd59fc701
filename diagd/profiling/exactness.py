"""How much of what an engine draws is next-token prediction's: by pass width, and by decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from diagd.engines.engine import Int
from diagd.profiling.measure import Workload
from diagd.runtime.audit import audit, redrawn
from diagd.runtime.decoders import Decoder, JacobiDecoder, ScheduledDecoder
from diagd.runtime.session import Session
from diagd.schedule import Schedule

_FLIP_FRAMES: Final = 2  # a pass for every cell of these


@dataclass(frozen=True)
class Exactness:
    """One engine, by the sampling of its bundle.

    Attributes:
        engine: its name.
        flips: share of cells that are drawn otherwise in the widest pass than in a pass of their own, the
            tokens ahead of them being the same. Where it is 0, what is exact in theory is exact here.
        shares: by decoder, share of its cells that next-token prediction draws behind the same tokens.
    """

    engine: str
    flips: float
    shares: dict[str, float]


def exactness(
    session: Session, name: str, orders: Sequence[Schedule], workload: Workload, frames: int, seed: int = 0
) -> Exactness:
    """Decode by Jacobi and by each order, and audit what was decoded.

    Args:
        session: over the engine.
        name: of the engine.
        orders: beside Jacobi decoding.
        workload: prompt and actions.
        frames: to decode by each.
        seed: of the random numbers.
    """
    actions = None if workload.actions is None else workload.actions[:frames]

    def start() -> Session:
        session.start(workload.prompt, workload.prompt_actions, workload.text)
        return session

    def made(decoder: Decoder) -> Int:
        return np.stack([frame.tokens for frame in start().frames(decoder, actions, count=frames, seed=seed)])

    decoders: dict[str, Decoder] = {"jacobi": JacobiDecoder()}
    decoders |= {order.name: ScheduledDecoder(order) for order in orders}
    tokens = {decoder: made(decoders[decoder]) for decoder in decoders}
    shares = {
        decoder: float(audit(start(), cells, actions, seed=seed).mean()) for decoder, cells in tokens.items()
    }
    few = tokens["jacobi"][:_FLIP_FRAMES]
    given = None if actions is None else actions[: len(few)]
    narrow, wide = (redrawn(start(), few, given, rows=rows, seed=seed) for rows in (1, None))
    return Exactness(name, float((narrow != wide).mean()), shares)
