"""What the verbs of worlds can be told."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field

from diagd.cluster import ClusterOptions
from diagd.engines.backend import CHOICES
from diagd.errors import UsageError, unknown
from diagd.options import NAMES, SEED, SIZE, File, Flag, checked, flag, positional, setting
from diagd.progress import started
from diagd.runtime.options import DraftOptions, TextOptions
from diagd.runtime.sampling import SamplingSettings
from diagd.tuning.options import check_device

_MAX_ACTIONS = 256
GAMES = ("crafter", "doom")
MIXTURES = ("ntp", "diagonal", "mixture")
"""Next-token prediction alone; the chained k = 1 diagonal alone; both with k = 2 and serial frames."""
TOKENIZERS = ("auto", "patches", "learned")
"""Patches if they can be enumerated; patches, by k-means if need be; a trained network."""


@checked
class CollectOptions:
    """What `diagd world collect` records.

    Attributes:
        move_share: share of decisions that start a walk of 1 to 8 steps in Crafter; the others interact.
    """

    output: File = positional("folder; episodes already there are kept")
    game: str = flag("crafter or doom (default crafter)", "crafter")
    episodes: int = flag("how many, each a shard and a world, freshly generated where the game does", 720)
    steps: int = flag("longest episode, in frames", 200)
    seed: int = flag(
        "episode n plays in world seed + n: disjoint sets need seeds that many apart (default 0)", 0
    )
    move_share: float = Field(0.72, ge=0, le=1)
    who: ClusterOptions = ClusterOptions(workers=2)

    def __post_init__(self) -> None:
        if self.game not in GAMES:
            raise unknown("game", self.game, GAMES)
        if self.episodes < 1 or self.steps < 2 or self.seed < 0:
            raise UsageError(
                f"episodes {self.episodes}, steps {self.steps}, seed {self.seed}: expected 1, 2 and 0 or more"
            )


@checked
class ImportOptions:
    """What `diagd world import` reads."""

    videos: File = flag(
        'folder of run.mp4 beside run.jsonl, with a line such as {"action": "left"} for the '
        "action that led to each frame; the first has no effect"
    )
    output: File = positional("folder of the episodes")
    actions: Annotated[tuple[str, ...], NAMES] = flag(
        "names in the order of their ids, the first is the default: noop,left,right"
    )
    size: Annotated[tuple[int, int], SIZE] = flag("HEIGHTxWIDTH in pixels that frames are resized to")

    def __post_init__(self) -> None:
        if not 1 <= len(self.actions) <= _MAX_ACTIONS:
            raise UsageError(f"{len(self.actions)} actions; expected 1 to {_MAX_ACTIONS} names")
        if len({*self.actions}) < len(self.actions):
            raise UsageError(f"--actions {','.join(self.actions)}: a name is given twice; give it once")


@checked
class TrainOptions:
    """What `diagd world train` does.

    Attributes:
        matrix_rate, other_rate: base learning rates of Muon and AdamW.
        checkpoint_every: steps between checkpoints.
    """

    data: File = flag("folder of episodes")
    output: File = positional("folder of the trained model, and of the checkpoint that training resumes from")
    size: str = flag("0.3m, 0.7m, 3m or 10m (default 3m)", "3m")
    mixture: str = flag("ntp, diagonal or mixture (default mixture)", "mixture")
    frames: int = setting(
        "of a window; the first half of training sees windows half as long, twice as many", 8
    )
    batch: int = flag("windows of a step, over all processes", 10)
    steps: int = flag("optimiser steps", 1200)
    tokenizer: str = flag("auto, patches (by k-means if need be) or learned (default auto)", "auto")
    codes: int = setting("ids of the tokenizer", 512, ge=1)
    patch: int = setting("pixels along a side of a cell", 8, ge=1)
    tokenizer_steps: int = setting("optimiser steps of a learned tokenizer", 3000, ge=1)
    matrix_rate: float = Field(0.02, gt=0)
    other_rate: float = Field(3e-3, gt=0)
    seed: int = flag("of tokenizer, weights and batches (default 0)", 0, **SEED)
    device: str = flag("cpu, cuda for every GPU, or cuda:1 for one", "cpu")
    processes: int | None = setting(
        "that share each batch (default: two of one thread each on a CPU, one a GPU; under "
        "torchrun those that it starts)",
        None,
        le=1024,
    )
    checkpoint_every: int = Field(100, ge=1)

    def __post_init__(self) -> None:
        from diagd.export.families.world import SIZES

        for name, known in (("tokenizer", TOKENIZERS), ("size", SIZES), ("mixture", MIXTURES)):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        processes = len(self.devices)
        if self.frames < 2 or self.steps < 1 or self.batch < 1 or self.batch % processes:
            raise UsageError(
                f"frames {self.frames}, steps {self.steps}, batch {self.batch}, processes {processes}: "
                "expected at least 2 frames, 1 step, and a batch that the processes share evenly"
            )

    @property
    def devices(self) -> list[str]:
        """Where each process trains; see `worker_devices`."""
        import torch

        check_device(self.device)
        if (ranks := started()) > 1:
            return [self.device] * ranks
        return worker_devices(self.device, self.processes, torch.cuda.device_count())

    def recipe(self) -> dict[str, Any]:
        """The options that decide the result, as JSON data."""
        options = asdict(self)
        for name in ("data", "output", "checkpoint_every", "processes"):
            del options[name]
        return options


def worker_devices(device: str, processes: int | None, gpus: int) -> list[str]:
    """Device of each data-parallel process on a machine of ``gpus`` GPUs; no two share a GPU.

    Raises:
        UsageError: more processes than GPUs, or none.
    """
    if not device.startswith("cuda"):
        count = 2 if processes is None else processes
        most = count
    else:
        most = gpus if device == "cuda" else 1
        count = most if processes is None else processes
    if not 1 <= count <= most:
        raise UsageError(
            f"{count} processes on {device}: expected 1 to {max(1, most)}, each has a device of its own"
        )
    return [f"cuda:{n}" for n in range(count)] if device == "cuda" else [device] * count


@checked
class EvalOptions:
    """What is measured.

    Attributes:
        window_frames: of the windows of the likelihood.
        sampling: temperature, top-k and top-p of the rollouts.
    """

    windows: int = setting("windows of the teacher-forced likelihood", 64)
    window_frames: int = Field(8, ge=2)
    rollouts: int = setting("continuations that are generated", 96)
    prompt: int = setting("known frames of a continuation", 2)
    frames: int = setting("generated frames of a continuation", 4)
    sampling: SamplingSettings = SamplingSettings(1.0, 0, 0.95)
    seed: int = setting("of windows and random numbers (default 0)", 0, **SEED)

    def __post_init__(self) -> None:
        if self.windows < 2 or self.rollouts < 2 or self.prompt < 1 or self.frames < 1:
            raise UsageError(
                f"windows {self.windows}, rollouts {self.rollouts}, prompt {self.prompt}, "
                f"frames {self.frames}: expected at least 2, 2, 1 and 1"
            )


@checked
class FolderOptions:
    """How two folders of videos are compared."""

    videos: int = setting("videos at most", 500, ge=1)
    skip: int = setting("pictures that a video begins with and that do not count", 0, ge=0)
    truth_skip: int | None = setting("likewise of a recording (default: those of skip)", None, ge=0)
    resize: bool = setting("scale recordings to the size of the videos, or of the bundle's pictures", False)
    dynamics: File | None = setting("ONNX network that sees actions in MineWorld's videos", None)
    lines: Literal["led", "followed"] = setting(
        "line t of a recording led to picture t, or was done at it: followed", "led"
    )


@checked
class EvalRun:
    """What `diagd eval` is asked for.

    Attributes:
        long_rollouts: how many of the long continuations.
    """

    model: File = positional(
        "folder of a world model (run in PyTorch), a bundle (run on its engine), or a folder of "
        "videos that were made"
    )
    data: File = flag(
        "what the model was not trained on: recording, or folder of clips; or what videos should show"
    )
    output: File = flag("folder of eval.json and contact.png")
    precision: str | None = flag("of a bundle's step graph (default: its first)", None)
    backend: str = setting(f"of a bundle: {CHOICES}", "cpu")
    order: tuple[str, ...] = flag(
        "of decoding, beside next-token prediction",
        ("k=1 chained", "k=1 serial", "k=2 serial"),
        Flag(count="+"),
    )
    decoders: tuple[str, ...] = flag(
        "compare these by speed and quality instead: orders, jacobi, draft", (), Flag(count="+")
    )
    drafts: DraftOptions = DraftOptions()
    threads: int = setting("CPU threads of one process without workers, 0 for one a core", 0, ge=0)
    long_frames: int = setting(
        "frames of the long continuations that drift is measured on (default 0: none)", 0, ge=0
    )
    long_rollouts: int = Field(8, ge=2)
    probe_steps: int = setting("optimiser steps of the probe that reads actions off frames", 600, ge=1)
    networks: tuple[File, ...] = flag("ONNX file of a metric", (), Flag("network", repeated=True))
    geometry: File | None = setting(
        "recording that the rules of the world are learned from (default: --data)", None
    )
    folders: FolderOptions = FolderOptions()
    condition: TextOptions = TextOptions()
    options: EvalOptions = EvalOptions()
    who: ClusterOptions = ClusterOptions()
