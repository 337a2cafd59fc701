"""``diagd eval``: the quality of a world model under several schedules."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

from diagd.bundle.targets import folder_target
from diagd.cli.paths import path
from diagd.errors import UsageError
from diagd.schedule import RowSeed

EPILOG = """examples:
  diagd world collect recordings --episodes 40 --seed 100000
  diagd eval crafter-3m.diagd --data recordings --output quality
  diagd eval trained/ --data recordings --output quality --lags 1:9 --lags 2:28 --rollouts 200

MODEL is a bundle (decoded on its engine) or a folder that `diagd world train` wrote. The recording must not
have been trained on. Writes eval.json and contact.png; every figure has its standard error.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.epilog = EPILOG
    parser.add_argument("model", type=path)
    parser.add_argument("--data", type=path, required=True, help="recording the model was not trained on")
    parser.add_argument("--output", type=path, required=True, help="folder of eval.json and contact.png")
    parser.add_argument("--geometry", type=path, help="recording of valid tiles (default: --data)")
    parser.add_argument("--world", type=path, help="folder of the world a bundle was made from (codebook)")
    parser.add_argument("--lags", action="append", help="K:D beside next-token (default 1:9, 1:20, 2:28)")
    parser.add_argument("--seed-policy", choices=[seed.value for seed in RowSeed], help="row seed")
    parser.add_argument("--rollouts", type=int, default=96, help="continuations (default %(default)s)")
    parser.add_argument("--long-frames", type=int, default=0, help="frames of the drift measurement")
    parser.add_argument("--network", type=path, action="append", default=[], help="ONNX file of a metric")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Measure, write and print."""
    folder_target(args.output, {"eval.json": b'"schedules"'}, "an evaluation")
    from rich.console import Console

    from diagd.export.families.world import SHIPPED
    from worlds.evaluate import EvalOptions
    from worlds.run_eval import EvalRun, run_eval, scores_table

    console = Console()
    world = args.world
    if world is None and (args.model / "manifest.json").exists():
        world = SHIPPED / "crafter-3m"
    request = EvalRun(
        model=args.model,
        data=args.data,
        output=args.output,
        geometry=args.geometry,
        world=world,
        row_seed=RowSeed(args.seed_policy) if args.seed_policy else RowSeed.PREVIOUS_FRAME,
        options=EvalOptions(rollouts=args.rollouts, seed=args.seed),
        long_frames=args.long_frames,
        networks=tuple(args.network),
    )
    if args.lags:
        request = replace(request, lags=tuple(map(_lags, args.lags)))
    args.output.mkdir(parents=True, exist_ok=True)
    with console.status("measuring") as status:
        scores = run_eval(request, lambda name: status.update(f"measuring {name}"))
    console.print(scores_table(scores))
    console.print(f"wrote {args.output / 'eval.json'} and {args.output / 'contact.png'}")
    return 0


def _lags(given: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+:\d+", given):
        raise UsageError(f"--lags {given}: expected K:D, two numbers such as 1:9")
    k, d = given.split(":")
    return int(k), int(d)
