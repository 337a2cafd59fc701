"""A bundle under evaluation: what is measured is the engine that users run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle
from diagd.engines.engine import Engine, Float, Int, SamplingState, StepInputs
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.runtime.load import open_session
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session, token_places
from diagd.runtime.tokens import TokenPlaces
from diagd.schedule import Schedule
from diagd.tuning.recordings import FrameEncoder
from worlds.subject import Streams

_GREEDY = SamplingSettings(temperature=0)


class BundleSubject:
    """A bundle of the world family on its own engine; see `worlds.subject.Subject`.

    ``precision`` and ``compat`` are those of `diagd.load`.

    Raises:
        UsageError: the bundle has no tokenizer, or not exactly one action token ahead of each frame.
    """

    def __init__(
        self, path: str, threads: int = 0, compat: str | None = None, precision: str | None = None
    ) -> None:
        bundle, cpu = Bundle.open(path), CpuOptions(threads)
        self._session = open_session(bundle, cpu=cpu, compat=compat, precision=precision)
        self._codec = PixelCodec(bundle, cpu)
        self.layout = self._session.layout
        self.codes = bundle.manifest.output_vocabulary
        self.context_frames = bundle.manifest.context.frames
        self.encoder = FrameEncoder.of_bundle(bundle, cpu)
        if (self.layout.prefix, self.layout.before, self.layout.after) != (0, 1, 0):
            raise UsageError(f"{path} is no world bundle: expected one action token before each frame")

    def nll(self, streams: Streams, schedule: Schedule) -> NDArray[np.float32]:
        """See `Subject.nll`."""
        engine = self._session.engine
        places = token_places(self.layout, self._session.window)
        result = np.full(streams.shape, np.nan, np.float32)
        try:
            for stream, row in zip(streams, result, strict=True):
                forced = _ForcedEngine(engine, stream, places, row)
                self._session.engine = forced
                _generate(self._session, stream, 1, schedule, _GREEDY, 0)
        finally:
            self._session.engine = engine
        return result

    def roll_out(
        self, streams: Streams, prompt: int, schedule: Schedule, sampling: SamplingSettings, seed: int
    ) -> Streams:
        """See `Subject.roll_out`."""
        rolled = streams.copy()
        for n, stream in enumerate(rolled):
            frames = _generate(self._session, stream, prompt, schedule, sampling, seed + n)
            stream.reshape(-1, self.layout.frame_length)[prompt:, 1:] = frames.reshape(len(frames), -1)
        return rolled

    def pixels(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        """See `Subject.pixels`."""
        return np.stack(list(self._codec.decode(tokens.astype(np.int32))))


def _generate(
    session: Session,
    stream: NDArray[np.int64],
    prompt: int,
    schedule: Schedule,
    sampling: SamplingSettings,
    seed: int,
) -> Int:
    """Tokens int32 [F - prompt, rows, columns] generated under the actions of ``stream``."""
    layout = session.layout
    rows = stream.reshape(-1, layout.frame_length).astype(np.int32)
    frames = rows[:prompt, 1:].reshape(prompt, layout.rows, layout.columns)
    session.start(frames, rows[:prompt, :1])
    decoded = session.generate(
        len(rows) - prompt, rows[prompt:, :1], schedule=schedule, sampling=sampling, seed=seed
    )
    return np.stack([frame.tokens for frame in decoded])


@dataclass
class _ForcedEngine:
    """Scores the true tokens and makes the greedy sampler take them, so that a session is teacher-forced."""

    engine: Engine
    stream: NDArray[np.int64]
    places: TokenPlaces
    nll: NDArray[np.float32]
    samples_in_graph: bool = False
    _position: Int = field(init=False)

    def __post_init__(self) -> None:
        if self.engine.samples_in_graph:
            raise UsageError("this engine samples in its graph and gives no logits; evaluate on the CPU")
        self.capacity, self.max_width = self.engine.capacity, self.engine.max_width
        self.token_buffer, self.slot_position = self.engine.token_buffer, self.engine.slot_position
        self.padded_width: Callable[[int], int] = self.engine.padded_width
        self.rotate_keys: Callable[[NDArray[np.float64], int], None] = self.engine.rotate_keys
        self.set_text: Callable[[Mapping[str, NDArray[np.generic]]], None] = self.engine.set_text
        positions = np.arange(len(self.stream), dtype=np.int32)
        self._position = np.zeros(self.places.size, np.int32)
        self._position[self.places.of(positions)] = positions

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """Logits in which the true token leads."""
        logits = self.engine.step(inputs, sampling).astype(np.float32)
        positions = self._position[inputs.sinks[inputs.decoded]]
        tokens, rows = self.stream[positions], np.arange(len(positions))
        top = logits.max(1, keepdims=True, initial=-np.inf)
        total = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
        self.nll[positions] = total - logits[rows, tokens]
        logits[rows, tokens] = top[:, 0] + 1
        return logits
