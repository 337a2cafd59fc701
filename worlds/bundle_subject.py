"""A bundle under evaluation: what is measured is the engine that users run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle
from diagd.engines.engine import Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.runtime.decoders import ForcedDecoder, ScheduledDecoder
from diagd.runtime.load import open_session
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.schedule import NO_SINK, Schedule, StreamLayout
from diagd.tuning.recordings import FrameEncoder
from worlds.subject import Streams


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
        result = np.full(streams.shape, np.nan, np.float32)
        for stream, row in zip(streams, result, strict=True):
            frames, actions = _parts(stream, self.layout)
            self._session.start(frames[:1], actions[:1])
            for step, seen in self._session.steps(ForcedDecoder(schedule, frames[1:]), actions[1:]):
                cells, logits = step.sinks[step.sinks != NO_SINK], seen.logits.astype(np.float32)
                top = logits.max(1, initial=-np.inf)
                total = np.log(np.exp(logits - top[:, None]).sum(1)) + top
                row[cells] = total - logits[np.arange(len(cells)), stream[cells]]
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


def _parts(stream: NDArray[np.int64], layout: StreamLayout) -> tuple[Int, Int]:
    """Frames int32 [F, rows, columns] and actions [F, 1] of a stream."""
    rows = stream.reshape(-1, layout.frame_length).astype(np.int32)
    return rows[:, 1:].reshape(len(rows), layout.rows, layout.columns), rows[:, :1]


def _generate(
    session: Session,
    stream: NDArray[np.int64],
    prompt: int,
    schedule: Schedule,
    sampling: SamplingSettings,
    seed: int,
) -> Int:
    """Tokens int32 [F - prompt, rows, columns] generated under the actions of ``stream``."""
    frames, actions = _parts(stream, session.layout)
    session.start(frames[:prompt], actions[:prompt])
    decoded = session.frames(ScheduledDecoder(schedule), actions[prompt:], sampling=sampling, seed=seed)
    return np.stack([frame.tokens for frame in decoded])
