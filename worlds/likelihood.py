"""How likely a bundle finds recorded clips, by order of decoding: teacher forcing through its engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from diagd.bundle import Bundle
from diagd.cluster import ClusterOptions, open_workers
from diagd.engines.engine import Float, Int
from diagd.errors import UsageError
from diagd.runtime.clip import Clip, read_recording
from diagd.runtime.comparison import log_softmax
from diagd.runtime.decoders import Decoder, ForcedDecoder, RasterDecoder
from diagd.runtime.options import SessionOptions
from diagd.runtime.session import Session
from diagd.schedule import NO_SINK, Schedule
from worlds.metrics import Estimate
from worlds.options import EvalOptions
from worlds.videos import videos_in


class ClipScorer:
    """A worker: a bundle on its engine, asked how likely the clip in a file is; see `forced_likelihood`."""

    def __init__(
        self,
        path: Path,
        orders: Sequence[str],
        options: EvalOptions,
        running: SessionOptions,
        text: Float | None = None,
        resize: bool = False,
    ) -> None:
        bundle, self._text, self._resize = Bundle.open(path), text, resize
        self._options, self._pixels, self._session = options, running.pixels(bundle), running.open(bundle)
        self._schedules = [Schedule.parse(order, self._session.layout) for order in orders]

    def __call__(self, path: Path) -> list[float]:
        """By next-token prediction, then by each order."""
        options, session = self._options, self._session
        frames = options.prompt + options.frames
        clip = read_recording(path, session.manifest, self._pixels, frames, resize=self._resize)
        if len(clip.tokens) < frames:
            raise UsageError(
                f"{path} has {len(clip.tokens)} token frames; {options.prompt} known ones and "
                f"{options.frames} to be judged are asked for: lower --set prompt or frames"
            )
        truth = clip.tokens[options.prompt :]
        decoders: list[Decoder] = [RasterDecoder(truth, session.engine.max_width)]
        decoders += [ForcedDecoder(schedule, truth) for schedule in self._schedules]
        return [clip_likelihood(session, clip, options.prompt, decoder, self._text) for decoder in decoders]


def forced_likelihood(
    bundle: Bundle,
    folder: Path,
    orders: Sequence[str],
    options: EvalOptions,
    running: SessionOptions,
    report: Callable[[str], None],
    who: ClusterOptions | None = None,
    text: Float | None = None,
    resize: bool = False,
) -> dict[str, Estimate]:
    """Mean negative log-likelihood of a cell's token, nats, unfiltered and at temperature 1, over clips.

    ``folder`` has videos, each with the actions of its name where the model takes some, or episodes. Each of
    the ``orders`` of decoding is compared to next-token prediction clip by clip. ``text``: float32
    [n, width], embeddings that all clips are decoded under, for models that attend to text. With ``resize``
    pictures of another size are scaled.

    Raises:
        UsageError: a clip cannot be read or is too short, or an order does not fit.
    """
    named = dict.fromkeys(Schedule.parse(order, bundle.manifest.layout).name for order in orders)
    paths = list(videos_in(folder).values())[: options.windows]
    found = np.zeros((len(paths), 1 + len(named)))
    judge = partial(ClipScorer, bundle.path, tuple(named), options, running, text, resize)
    with open_workers(judge, who or ClusterOptions()) as workers:
        for number, likelihoods in workers.map(paths):
            report(paths[number].name)
            found[number] = likelihoods
    names = ("next token", *named)
    figures = {f"NLL {name}": Estimate.of(row) for name, row in zip(names, found.T, strict=True)}
    for column, name in enumerate(named, start=1):
        figures[f"NLL {name} over next token"] = Estimate.of(found[:, column] - found[:, 0])
    return figures


def clip_likelihood(
    session: Session, clip: Clip, known: int, decoder: Decoder, text: Float | None = None
) -> float:
    """Nats a cell, the mean over all behind the first ``known`` frames of a clip."""
    layout, ranges = session.layout, session.manifest.sampling.range_table(session.layout)
    truth: Int = clip.tokens[known:].reshape(len(clip.tokens) - known, -1)
    led = None if clip.led is None else clip.led[known:]
    session.start(clip.tokens[:known], None if clip.led is None else clip.led[:known], text)
    total = 0.0
    for step, result in session.steps(decoder, led, count=len(truth)):
        sinks = step.sinks[step.sinks != NO_SINK]
        frames, cells = np.divmod(sinks - layout.first_cell(known), layout.frame_length)
        limits = ranges[layout.before + cells]
        for logits, (low, high), token in zip(result.logits, limits, truth[frames, cells], strict=True):
            total -= float(log_softmax(logits[None, low:high])[0, token - low])
    return total / truth.size
