"""Trains tokenizer and transformer of a world model on recorded episodes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from diagd.cluster.workers import Processes, WorkersKilledError
from diagd.errors import UsageError, unknown
from diagd.export.families.world import DESCRIPTION, WorldDescription
from diagd.export.transformer import Transformer
from diagd.progress import started
from diagd.schedule import Schedule, StreamLayout
from diagd.tuning.align import Ranks, check_converges, together
from diagd.tuning.recordings import (
    FrameEncoder,
    TokenDataset,
    cached_tokens,
    episode_paths,
    episodes,
    load_episode,
)
from diagd.tuning.teacher_forcing import ForcedPasses, forced_loss
from worlds.folder import World, save_prompts, save_world
from worlds.options import MIXTURES, TrainOptions
from worlds.progress import Checkpoint, Progress, Report, learning_rate, log
from worlds.recordings import recorded_actions
from worlds.tokenizer import Tensors, fit_tokenizer, reconstruct

CHECKPOINT = "checkpoint.pt"
"""What a training goes on from; it is there until somebody removes it."""

_PROMPTS = 12
"""Recordings out of whose middle a world starts."""

Share = tuple[float, Schedule]
"""Share of the training windows, and the schedule they are decoded by."""


def mixture_shares(name: str, layout: StreamLayout) -> list[Share]:
    """Schedules of a mixture with the share of windows that each one gets.

    Raises:
        UsageError: a name outside `MIXTURES`.
    """
    raster, chained = Schedule.next_token(layout), Schedule.chained(layout, 1)
    if name == "ntp":
        return [(1.0, raster)]
    if name == "diagonal":
        return [(1.0, chained)]
    if name == "mixture":
        serial = Schedule.serial(layout, 1)
        return [(0.4, raster), (0.25, serial), (0.25, chained), (0.1, Schedule.serial(layout, 2))]
    raise unknown("mixture", name, MIXTURES)


def train(options: TrainOptions, report: Report | None = None) -> Path:
    """Train, resuming from the checkpoint in ``options.output`` if there is one; returns that folder.

    Deterministic given options and device. Every report is also a line of ``log.jsonl``, or of
    ``tokenizer.jsonl``; with several processes ``report`` must be picklable, as it runs in the first of them.

    Raises:
        UsageError: no episodes, episodes too short, a checkpoint of another recipe, or a model without one.
    """
    recorded_actions(options.data)  # before a folder is made, and a tokenizer trained
    if (options.output / DESCRIPTION).exists() and not (options.output / CHECKPOINT).exists():
        raise UsageError(
            f"{options.output} holds a finished model and no {CHECKPOINT} of its training, so it is not "
            "replaced; give another folder, or remove it yourself"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    if started() > 1:
        _train_together(options, report)
        return options.output
    prepared = _prepare(options, report)
    prepared.tokens(options.data, report)
    processes = len(options.devices)
    if processes == 1:
        with together(options.devices[0]) as ranks:
            _Trainer(options, prepared, ranks).run(report)
        return options.output
    with tempfile.TemporaryDirectory() as folder:
        worker = partial(partial, _worker, options, prepared, f"file://{folder}/rendezvous", report)
        _run_together(worker, processes)
    return options.output


def _train_together(options: TrainOptions, report: Report | None) -> None:
    """Be one of the processes that torchrun started; the first fits the tokenizer, which the others read."""
    with together(options.device) as ranks:
        if ranks.is_first:
            _prepare(options, report).tokens(options.data, report)
        ranks.wait()
        _Trainer(options, _prepare(options, None), ranks).run(report if ranks.is_first else None)


def _run_together(worker: Callable[[], Callable[[int], None]], processes: int) -> None:
    """Run the worker of every rank in a process of its own; all end when one fails or this one is stopped.

    Raises:
        UsageError: the system killed one.
    """
    try:
        with Processes(worker, processes, tries=1) as pool:  # where one fails, the others would wait for it
            list(pool.map(range(processes)))
    except WorkersKilledError as error:
        raise UsageError(
            "a training process was killed, mostly for want of memory; use a smaller --batch, or the "
            "same command again to go on"
        ) from error


def _worker(
    options: TrainOptions, prepared: _Prepared, meeting: str, report: Report | None, rank: int
) -> None:
    size = len(options.devices)
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank))
    with together(options.device, meeting) as ranks:
        _Trainer(options, prepared, ranks).run(report if ranks.is_first else None)


@dataclass(frozen=True)
class _Prepared:
    """What the transformer is trained on: the world to be, and the tensors of its tokenizer."""

    description: WorldDescription
    tokenizer: Tensors

    def tokens(self, data: Path, report: Report | None = None) -> TokenDataset:
        """The recording, encoded."""
        encoder = FrameEncoder.of_graphs(self.description.pixel_graphs(), self.tokenizer)
        episodes, began = len(episode_paths(data)), time.monotonic()

        def encoded(count: int) -> None:
            if report is not None:
                report(Progress(count, episodes, None, time.monotonic() - began, part="encoding"))

        return cached_tokens(data, encoder, encoded)


def _prepare(options: TrainOptions, report: Report | None) -> _Prepared:
    """Fit the tokenizer, or read the one that was fitted."""
    fitted = fit_tokenizer(options, report)
    height, width = next(episodes(options.data)).frames.shape[1:3]
    description = WorldDescription(
        size=options.size,
        rows=height // options.patch,
        columns=width // options.patch,
        patch=options.patch,
        codes=options.codes,
        used_codes=fitted.used,
        actions=recorded_actions(options.data),
        context_frames=options.frames,
        tokenizer=fitted.config,
    )
    return _Prepared(description, fitted.tensors)


class _Trainer:
    """The loop of one process."""

    def __init__(self, options: TrainOptions, prepared: _Prepared, ranks: Ranks) -> None:
        if ranks.device == "cpu":
            torch.set_num_threads(1)
        self.options, self.prepared, self.ranks, self.device = options, prepared, ranks, ranks.device
        description = prepared.description
        self.model = Transformer(description.transformer_config())
        self.model.initialise(torch.Generator().manual_seed(options.seed)).to(self.device)
        self.optimiser = Optimiser(self.model, options.matrix_rate, options.other_rate)
        self.losses = _Losses(options, prepared.tokens(options.data), description)
        parts = {"model": self.model, "optimiser": self.optimiser}
        self.checkpoint = Checkpoint(options.output / CHECKPOINT, "recipe", options.recipe(), parts)
        self.first_step = self.checkpoint.resumed(self.device)

    def run(self, report: Report | None) -> None:
        """Train to the last step and write the model."""
        options, began = self.options, time.monotonic()
        ranks, shared = self.ranks, self.ranks.wrapped(self.model)
        for step in range(self.first_step, options.steps):
            batch, weight = ranks.batch(*self.losses.windows(step))
            loss = weight * forced_loss(shared, batch)
            loss.backward()
            self.optimiser.step(learning_rate(step + 1, options.steps))
            mean = ranks.mean(loss)
            check_converges(mean, step + 1)
            if ranks.is_first:
                seconds = time.monotonic() - began
                progress = Progress(step + 1, options.steps, mean, seconds, self.first_step)
                log(options.output / "log.jsonl", progress, report)
                if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
                    self.checkpoint.write(step + 1)
        if ranks.is_first:
            self._save_world()

    def _save_world(self) -> None:
        description, tokenizer = self.prepared.description, self.prepared.tokenizer
        frames = asdict(reconstruct(description.pixel_graphs(), tokenizer, self.options.data))
        world = World(description, self.model.cpu().eval(), tokenizer)
        begun = map(load_episode, episode_paths(self.options.data)[-_PROMPTS:])
        save_prompts(self.options.output, (one.frames[len(one.frames) // 2] for one in begun))
        save_world(self.options.output, world, self.options.recipe() | {"reconstruction": frames})


class _Losses:
    """Batches as a function of seed and step."""

    def __init__(self, options: TrainOptions, dataset: TokenDataset, description: WorldDescription) -> None:
        self.options, self.dataset = options, dataset
        shares = mixture_shares(options.mixture, description.layout)
        self.shares = [share for share, _ in shares]
        lengths = {max(2, options.frames // 2), options.frames}
        schedules = [schedule for _, schedule in shares]
        self.passes = {n: ForcedPasses(schedules, n, score_prompt=True) for n in lengths}
        self.starts = {n: dataset.window_starts(n) for n in lengths}

    def windows(self, step: int) -> tuple[ForcedPasses, NDArray[np.int64], NDArray[np.int64]]:
        """Those of a step, with the number of the schedule of each."""
        options = self.options
        is_short = 2 * step < options.steps
        frames = max(2, options.frames // 2) if is_short else options.frames
        windows = options.batch * options.frames // frames
        random = np.random.default_rng((options.seed, step))
        starts = random.choice(self.starts[frames], windows)
        choice = random.choice(len(self.shares), windows, p=self.shares)
        return self.passes[frames], self.dataset.windows(starts, frames), choice


class Optimiser:
    """Two optimisers that step together.

    Muon (Jordan 2024) orthogonalises the momentum of a matrix; it does not suit embeddings, head and gains.
    """

    def __init__(self, model: nn.Module, matrix_rate: float, other_rate: float) -> None:
        matrices = [p for n, p in model.named_parameters() if n.startswith("layers.") and p.dim() == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.01),
            torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.01),
        ]
        self._rates = (matrix_rate, other_rate)

    def step(self, rate: float) -> None:
        """Apply and clear the gradients at ``rate`` times the base learning rates."""
        for part, base in zip(self._parts, self._rates, strict=True):
            for group in part.param_groups:
                group["lr"] = base * rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, object]:
        """State of both optimisers."""
        return {str(n): part.state_dict() for n, part in enumerate(self._parts)}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        """Restore `state_dict`."""
        for n, part in enumerate(self._parts):
            part.load_state_dict(state[str(n)])
