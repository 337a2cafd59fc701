"""Generating with an engine and with full recomputation in PyTorch, to be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diagd.bundle import Bundle
from diagd.engines.engine import Engine
from diagd.export.transformer import Transformer
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.slots import TokenPlaces
from diagd.schedule import Schedule
from tests.models import PREFIX_TOKEN
from tests.oracles.full_recompute import FullRecompute, lengthened
from tests.oracles.models import CODES, random_stream
from tests.oracles.rows import rows_of
from tests.runtime.test_fidelity import actions_of, frames_of

GREEDY = SamplingSettings(temperature=0.0)
MakeEngine = Callable[[Bundle, int], Engine]


@dataclass(frozen=True)
class Run:
    """Frames to decode behind a prompt of a few."""

    schedule: Schedule
    frames: int = 2
    prompt: int = 2
    window: int = 4
    sampling: SamplingSettings = GREEDY
    seed: int = 0


def stream_of(run: Run) -> np.ndarray:
    layout = run.schedule.layout
    stream = random_stream(layout, run.prompt + run.frames, run.prompt)
    stream[: layout.prefix] = PREFIX_TOKEN
    return stream


def decode(bundle: Bundle, make_engine: MakeEngine, run: Run) -> np.ndarray:
    """Frames int32 [frames, rows, columns] of a session over the engine."""
    layout, stream = run.schedule.layout, stream_of(run)
    engine = make_engine(bundle, TokenPlaces(layout, run.window).size)
    session = Session(bundle.manifest, engine, run.window)
    session.start(frames_of(stream, layout, 0, run.prompt), actions_of(stream, layout, 0, run.prompt))
    actions = actions_of(stream, layout, run.prompt, run.frames)
    frames = session.generate(
        run.frames, actions, schedule=run.schedule, sampling=run.sampling, seed=run.seed
    )
    return np.stack([frame.tokens for frame in frames])


def recompute(model: Transformer, run: Run) -> np.ndarray:
    """The same frames by the oracle, greedily."""
    layout, stream = run.schedule.layout, stream_of(run)
    oracle = FullRecompute(
        lengthened(model, run.prompt + run.frames), sampled=range(CODES), window=run.window
    )
    oracle.run(rows_of(run.schedule.table(run.prompt, run.frames, 0)), stream)
    return frames_of(stream, layout, run.prompt, run.frames)
