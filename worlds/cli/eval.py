"""``diagd eval``: the quality of a world model under several schedules."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from diagd.bundle.targets import folder_target
from diagd.cli import terminal
from diagd.cli.paths import path
from diagd.cli.settings import add_set_option, parse_settings
from diagd.errors import UsageError
from diagd.schedule import RowSeed

EPILOG = """examples:
  diagd world collect recordings --episodes 40 --seed 100000
  diagd eval crafter-3m.diagd --data recordings --output quality
  diagd eval crafter-3m.diagd --precision int8 --data recordings --output quality
  diagd eval trained/ --data recordings --output quality --lags 1:9 --lags 2:28 --rollouts 200

MODEL is a bundle (decoded on its engine, recordings encoded by its own encoder) or a folder that `diagd world
train` wrote. The recording must not have been trained on. Writes eval.json and contact.png; every figure has
its standard error.
"""


class EvalSettings(BaseModel):
    """Options behind ``--set``."""

    model_config = ConfigDict(extra="forbid")
    windows: int = Field(64, description="windows of the likelihood")
    prompt: int = Field(2, description="known frames of a continuation")
    frames: int = Field(4, description="generated frames of a continuation")
    seed_policy: RowSeed = Field(RowSeed.PREVIOUS_FRAME, description="row seed")
    geometry: Path | None = Field(None, description="recording of valid tiles (default: --data)")
    seed: int = Field(0, description="of windows and random numbers")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.epilog = EPILOG
    parser.add_argument("model", type=path)
    parser.add_argument("--data", type=path, required=True, help="recording the model was not trained on")
    parser.add_argument("--output", type=path, required=True, help="folder of eval.json and contact.png")
    parser.add_argument("--precision", help="of a bundle's step graph (default: its first)")
    parser.add_argument("--lags", action="append", default=[], help="K:D (default 1 chained, 1, 2 serial)")
    parser.add_argument("--rollouts", type=int, default=96, help="continuations (default %(default)s)")
    parser.add_argument("--long-frames", type=int, default=0, help="frames of the drift measurement")
    parser.add_argument("--network", type=path, action="append", default=[], help="ONNX file of a metric")
    add_set_option(parser, EvalSettings)


def run(args: argparse.Namespace) -> int:
    """Measure, write and print."""
    folder_target(args.output, {"eval.json": b'"schedules"'}, "an evaluation")

    from worlds.evaluate import EvalOptions
    from worlds.geometry import UNKNOWN_GEOMETRY
    from worlds.report import scores_table
    from worlds.run_eval import EvalRun, run_eval

    console, settings = terminal.console(), parse_settings(EvalSettings, args.settings)
    sizes = settings.model_dump(include={"windows", "prompt", "frames", "seed"})
    request = EvalRun(
        model=args.model,
        data=args.data,
        output=args.output,
        precision=args.precision,
        geometry=settings.geometry,
        lags=tuple(map(_lags, args.lags)),
        row_seed=settings.seed_policy,
        options=EvalOptions(rollouts=args.rollouts, **sizes),
        long_frames=args.long_frames,
        networks=tuple(args.network),
    )
    with console.status("measuring") as status:
        scores = run_eval(request, lambda name: status.update(f"measuring {name}"))
    console.print(scores_table(scores))
    if any(score.geometry is None for score in scores):
        console.print(
            "actions followed, walks and invalid tiles are read off the geometry of the world, and "
            f"{UNKNOWN_GEOMETRY}; the other figures hold for any world"
        )
    console.print(f"wrote {args.output / 'eval.json'} and {args.output / 'contact.png'}")
    return 0


def _lags(given: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+:\d+", given):
        raise UsageError(f"--lags {given}: expected K:D, two numbers such as 1:9")
    k, d = given.split(":")
    return int(k), int(d)
