"""Rollouts of an evaluation: a bundle's, sixteen in the same passes, against PyTorch's loop.

    python -m benchmarks.rollouts crafter-3m.diagd --world diagd/models/crafter-3m --data recordings

All take turns in one process: CPU time of one thread; with --workers wall time of so many processes of one
thread against PyTorch with as many threads. Beside them the bare products of the same passes, nothing else:
what is left is K/V rows, sampling and the host.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from benchmarks import CONSOLE, parser
from benchmarks.cpu import bare_products
from diagd.bundle import Bundle
from diagd.progress import Progress
from diagd.runtime.pool import Processes
from diagd.schedule import Schedule
from diagd.tuning.recordings import cached_tokens
from diagd.tuning.rollouts import TOGETHER, Streams
from worlds.folder import load_world
from worlds.model import BundleModel, ModelWorker, ParallelModel, TorchModel, WorldModel
from worlds.options import EvalOptions

ORDERS = ("next token", "k=1 chained", "k=1 serial", "k=2 serial")


def main() -> None:
    options = parser(__doc__, "bundle")
    options.add_argument("--world", type=Path, required=True, help="folder that the bundle was exported from")
    options.add_argument("--data", type=Path, required=True, help="recording")
    options.add_argument("--rollouts", type=int, help=f"default: {TOGETHER} for each worker")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--workers", type=int, help="processes that roll out (default: this one)")
    args = options.parse_args()
    torch.set_num_threads(args.workers or 1)
    ours: WorldModel = BundleModel(str(args.bundle), 1)
    with ExitStack() as stack:
        streams = _streams(ours, args.data, args.rollouts or TOGETHER * (args.workers or 1))
        if args.workers:
            make = partial(ModelWorker, args.bundle, None, "cpu")
            ours = ParallelModel(ours, stack.enter_context(Processes(make, args.workers)))
        models = {"PyTorch": TorchModel(load_world(args.world)), "bundle": ours}
        compare(models, streams, args.repeats, Bundle.open(args.bundle), wall=bool(args.workers))


def _streams(model: WorldModel, data: Path, count: int) -> Streams:
    """Windows of a recording, as many frames as an evaluation has them."""
    recording, options = cached_tokens(data, model.encoder), EvalOptions()
    starts = recording.window_starts(options.prompt + options.frames)
    chosen = np.random.default_rng(0).choice(starts, count, replace=False)
    return recording.windows(chosen, options.prompt + options.frames)


def compare(
    models: dict[str, WorldModel], streams: Streams, repeats: int, bundle: Bundle, *, wall: bool
) -> None:
    """Print what rollouts of every order take."""
    now, options = time.perf_counter if wall else time.process_time, EvalOptions()
    spent: dict[tuple[str, str], list[float]] = {(order, name): [] for order in ORDERS for name in models}
    made: dict[tuple[str, str], Streams] = {}
    for order, name in Progress(CONSOLE).each(list(spent) * (repeats + 1), "rolling out"):
        schedule, began = Schedule.parse(order, models[name].layout), now()
        made[order, name] = models[name].roll_out(streams, options.prompt, schedule, options.sampling, 0)
        spent[order, name].append(now() - began)
    table = Table("order", *(f"{name}, s" for name in models), "gain", "equal tokens", "products, s")
    for order in ORDERS:
        theirs, ours = (float(np.median(spent[order, name][1:])) for name in models)
        equal = np.equal(*(made[order, name] for name in models)).mean()
        bound = products(bundle, Schedule.parse(order, bundle.manifest.layout), len(streams))
        table.add_row(
            order, f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.2f}x", f"{equal:.1%}", f"{bound:.2f}"
        )
    CONSOLE.print(table)


def products(bundle: Bundle, schedule: Schedule, rollouts: int) -> float:
    """Seconds of one thread for the products of an order's passes, those of prompts included."""
    options, layout = EvalOptions(), bundle.manifest.layout
    session, inputs = bare_products(bundle, wall=False)
    table = schedule.table(options.prompt, options.frames, layout.first_cell(options.prompt) - 1)
    known = layout.frame_start(options.prompt)
    widths = [TOGETHER * int(width) for width in table.widths] + [TOGETHER * known]
    seconds = 0.0
    for width in dict.fromkeys(widths):
        rows = {name: np.ones((width, size), np.float32) for name, size in inputs.items()}
        times = []
        for _ in range(4):
            began = time.process_time()
            session.run(["y"], rows)
            times.append(time.process_time() - began)
        seconds += float(np.median(times[1:])) * widths.count(width)
    return seconds * rollouts / TOGETHER


if __name__ == "__main__":
    main()
