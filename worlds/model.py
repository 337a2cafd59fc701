"""A world model under evaluation: in PyTorch, as a bundle on its users' engine, or by workers of either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from diagd.bundle import Bundle
from diagd.cluster.workers import Workers
from diagd.engines.backend import find
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.export.families.world import DESCRIPTION
from diagd.export.tokenizers.base import loaded
from diagd.runtime.decoders import Decoder, ForcedDecoder, JacobiDecoder, RasterDecoder, ScheduledDecoder
from diagd.runtime.group import Group
from diagd.runtime.load import open_group
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import NO_SINK, Schedule, StreamLayout
from diagd.tuning.recordings import FrameEncoder
from diagd.tuning.rollouts import TOGETHER, Streams, open_lanes, parts
from diagd.tuning.rollouts import roll_out as roll_out_on_engine
from diagd.tuning.teacher_forcing import ForcedPasses, forced_nll
from worlds.folder import World, load_world
from worlds.rollout import roll_out

VERIFIED, GUESSED = 16, 31
"""Cells of each stream that a pass verifies at most, and where another order guessed them. A frame's windows
are of one size, so that few rows are padded for streams that are further; windows chosen by what passes take
would differ from run to run, and with them how sums are rounded."""


class Rollouts(NamedTuple):
    """Streams [B, N] whose cells behind the ``prompt`` first frames are decoded, by each of some orders.

    Stream b draws with seed ``seed + b``.
    """

    streams: Streams
    prompt: int
    orders: Sequence[Schedule]
    sampling: SamplingSettings
    seed: int


class WorldModel(Protocol):
    """What an evaluation needs of a model, however it is run."""

    layout: StreamLayout
    codes: int
    context_frames: int
    encoder: FrameEncoder

    def nll(self, streams: Streams, schedule: Schedule) -> NDArray[np.float32]:
        """Teacher-forced negative log-likelihood by position [B, N], nats; NaN in the first frame."""

    def roll_out(self, asked: Rollouts) -> list[Streams]:
        """The streams [B, N] as each order decodes them."""

    def pixels(self, tokens: NDArray[np.integer]) -> NDArray[np.uint8]:
        """Frames uint8 [T, H, W, 3] of tokens [T, h, w]."""


def open_model(
    path: Path, precision: str | None = None, backend: str = "cpu", threads: int = 0
) -> WorldModel:
    """The model in a folder, or a bundle on its engine by ``backend``, with so many ``threads``.

    Raises:
        UsageError: a precision is given for a folder, which is run in PyTorch.
    """
    if not (path / DESCRIPTION).exists():
        return BundleModel(str(path), threads, precision=precision, backend=backend)
    if precision is not None:
        raise UsageError(f"{path} is run in PyTorch, in float32; --precision {precision} is for bundles")
    return TorchModel(load_world(path))


class TorchModel:
    """A trained world in PyTorch, in float32."""

    def __init__(self, world: World) -> None:
        graphs = world.description.pixel_graphs()
        self._model, self._decoder = world.model, loaded(graphs.build("Decoder"), world.tokenizer)
        self.context_frames = world.description.context_frames
        self.encoder = FrameEncoder.of_graphs(graphs, world.tokenizer)
        self.layout, self.codes = world.description.layout, world.description.codes

    def nll(self, streams: Streams, schedule: Schedule) -> NDArray[np.float32]:
        """One pass over all windows."""
        frames = streams.shape[1] // self.layout.frame_length
        passes = ForcedPasses([schedule], frames)
        return forced_nll(self._model, passes, streams, 0)

    def roll_out(self, asked: Rollouts) -> list[Streams]:
        """All streams at once."""
        streams, prompt, orders, sampling, seed = asked
        once = partial(roll_out, self._model, streams, prompt, seed=seed, window=self.context_frames)
        return [once(order, sampling) for order in orders]

    def pixels(self, tokens: NDArray[np.integer]) -> NDArray[np.uint8]:
        """By the world's decoder."""
        with torch.inference_mode():
            pixels: NDArray[np.uint8] = self._decoder(torch.from_numpy(tokens).int()).numpy()
        return pixels


class BundleModel:
    """A bundle of the world family; ``precision``, ``compat`` and ``backend`` are those of `diagd.load`.

    Raises:
        UsageError: the bundle has no tokenizer, or not exactly one action token ahead of each frame.
    """

    def __init__(
        self,
        path: str,
        threads: int = 0,
        compat: str | None = None,
        precision: str | None = None,
        backend: str = "cpu",
    ) -> None:
        bundle, cpu = Bundle.open(path), CpuOptions(threads)
        options: dict[str, Any] = {"cpu": cpu, "compat": compat, "precision": precision, "backend": backend}
        self._open_lanes: Callable[[], Group] = partial(open_lanes, bundle, **options)
        self._session = open_group(bundle, 1, **options).sessions[0]
        self._codec = PixelCodec(bundle, cpu, find(backend))
        self.layout = self._session.layout
        self.codes = bundle.manifest.output_vocabulary
        self.context_frames = bundle.manifest.context.frames
        self.encoder = FrameEncoder.of_bundle(bundle, cpu)
        if (self.layout.prefix, self.layout.before, self.layout.after) != (0, 1, 0):
            raise UsageError(f"{path} is no world bundle: expected one action token before each frame")

    def nll(self, streams: Streams, schedule: Schedule) -> NDArray[np.float32]:
        """From the logits of steps in which every token is forced; raster order in few wide ones."""
        result, group = np.full(streams.shape, np.nan, np.float32), self._group
        lanes, width = len(group.sessions), group.engine.max_width
        group.forget()
        for first in range(0, len(streams), lanes):
            runs, known = {}, zip(*parts(streams[first : first + lanes], self.layout), strict=True)
            for lane, (frames, actions) in enumerate(known):
                session, truth = group.sessions[lane], frames[1:]
                session.start(frames[:1], actions[:1])
                wide = schedule.is_next_token
                decoder = RasterDecoder(truth, width) if wide else ForcedDecoder(schedule, truth)
                runs[lane] = session.watch(decoder, actions[1:], count=len(truth))
            for lane, (step, seen) in group.together(runs):
                cells, row = step.sinks[step.sinks != NO_SINK], first + lane
                logits = seen.logits.astype(np.float32)
                top = logits.max(1, initial=-np.inf)
                total = np.log(np.exp(logits - top[:, None]).sum(1)) + top
                result[row, cells] = total - logits[np.arange(len(cells)), streams[row, cells]]
        return result

    def roll_out(self, asked: Rollouts) -> list[Streams]:
        """Several streams at once, where the engine has as many, by all orders: their prompts are fed once.

        The tokens of raster order take few passes: they are guessed, by what another order made of them, as
        it mostly draws the same.
        """
        streams, prompt, orders, sampling, seed = asked
        made, lanes = [streams.copy() for _ in orders], len(self._group.sessions)
        quickest = sorted(range(len(orders)), key=lambda number: orders[number].steps_per_frame)
        self._group.forget()
        for first in range(0, len(streams), lanes):
            part, guesses = slice(first, first + lanes), None
            seeds = range(seed + first, seed + len(streams))
            for number in quickest:
                decoder = self._decoder(orders[number], guesses)
                guesses = roll_out_on_engine(self._group, streams[part], prompt, decoder, sampling, seeds)
                made[number][part] = guesses
        return made

    def _decoder(self, schedule: Schedule, guesses: Streams | None) -> Decoder:
        """Draws what an order draws; ``guesses`` are of the streams of the lanes."""
        if schedule != Schedule.next_token(self.layout):
            return ScheduledDecoder(schedule)
        if guesses is None:
            return JacobiDecoder(self._window(VERIFIED))
        frames = parts(guesses, self.layout)[0].reshape(len(guesses), -1, self.layout.cells)
        lanes = {session.stream: lane for lane, session in enumerate(self._group.sessions)}
        return JacobiDecoder(
            self._window(GUESSED), draft=lambda stream: frames[lanes[stream], stream.begun - 1]
        )

    def _window(self, most: int) -> int:
        """Cells of each of as few windows of a frame as have at most so many."""
        return -(-self.layout.cells // -(-self.layout.cells // most))

    @cached_property
    def _group(self) -> Group:
        return self._open_lanes()

    def pixels(self, tokens: NDArray[np.integer]) -> NDArray[np.uint8]:
        """By the bundle's decoder."""
        return np.stack(list(self._codec.decode(tokens.astype(np.int32))))


Likelihoods = tuple[Streams, Schedule]
"""Streams [B, N] whose likelihood is asked for, under an order."""


class ModelWorker:
    """A worker: a model on one thread, so that sums have the same order wherever they are taken."""

    def __init__(self, path: Path, precision: str | None, backend: str) -> None:
        torch.set_num_threads(1)
        self._model = open_model(path, precision, backend, threads=1)

    def __call__(self, asked: Rollouts | Likelihoods) -> Any:
        """As the model answers."""
        return self._model.roll_out(asked) if isinstance(asked, Rollouts) else self._model.nll(*asked)


class ParallelModel(WorldModel):
    """Streams go out `TOGETHER` at a time, however many workers there are.

    Those of a part draw with the seeds that they have in the whole.
    """

    def __init__(self, model: WorldModel, workers: Workers[Rollouts | Likelihoods, Any]) -> None:
        self.layout, self.codes, self.context_frames = model.layout, model.codes, model.context_frames
        self.encoder, self._model, self._workers = model.encoder, model, workers

    @override
    def nll(self, streams: Streams, schedule: Schedule) -> NDArray[np.float32]:
        starts = range(0, len(streams), TOGETHER)
        return np.concatenate(self._do([(streams[first : first + TOGETHER], schedule) for first in starts]))

    @override
    def roll_out(self, asked: Rollouts) -> list[Streams]:
        items = [
            asked._replace(streams=asked.streams[first : first + TOGETHER], seed=asked.seed + first)
            for first in range(0, len(asked.streams), TOGETHER)
        ]
        return [np.concatenate(order) for order in zip(*self._do(items), strict=True)]

    @override
    def pixels(self, tokens: NDArray[np.integer]) -> NDArray[np.uint8]:
        return self._model.pixels(tokens)

    def _do(self, items: Sequence[Rollouts | Likelihoods]) -> list[Any]:
        return [result for _, result in sorted(self._workers.map(items), key=itemgetter(0))]
