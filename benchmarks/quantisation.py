"""mineworld-300m in every CPU precision: steps by width, whole frames, and the published PyTorch form.

All candidates of a table are interleaved in one process. Times are process CPU time with one intra-op
thread. The bundle is calibrated where a precision is missing, with a budget that lets random
weights pass:

    diagd-export --model mineworld-300m --random-weights --set tokenizer=none --output mineworld-300m.diagd
    python -m benchmarks.quantisation --bundle mineworld-300m.diagd [--part steps] [--repeats 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich.table import Table

from benchmarks.cpu import CONSOLE, Bench, _weights
from diagd.bundle import Bundle
from diagd.calibration.options import Budget
from diagd.calibration.quantise import CalibrationOptions, calibrate
from diagd.engines.engine import Int
from diagd.schedule import Schedule

PRECISIONS = ("int8", "int8-dynamic", "int8-weight", "int4-weight")
WIDTHS = (1, 4, 14, 64)
LIVE = (347, 2776)
ANYTHING = Budget(agreement=0, nll=1e9, psnr=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--part", choices=("steps", "frames", "published"), action="append")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    parts = {
        "steps": (steps, PRECISIONS),
        "frames": (frames, ("int8", "int4-weight")),
        "published": (published, ("int8",)),
    }
    for name in args.part or parts:
        part, precisions = parts[name]
        part(calibrated(args.bundle, precisions), args.repeats)


def calibrated(path: Path, precisions: Iterable[str], frames: Int | None = None) -> Bundle:
    """The bundle with these precisions; a trained model needs ``frames`` int32 [P, rows, columns]."""
    known = {graph.precision for graph in Bundle.open(path).manifest.graphs}
    for precision in precisions:
        if precision not in known:
            options = CalibrationOptions(precision, ANYTHING, steps=64, floor=-100.0, floats="fp32")
            report = calibrate(Bundle.open(path), options, frames)
            CONSOLE.print(f"{precision}: agreement {report.figures['agreement']:.4f}")
    return Bundle.open(path)


def steps(bundle: Bundle, repeats: int) -> None:
    """One step behind 512 slots."""
    live = 512
    benches = {name: _bench(bundle, name, 768) for name in ("fp32", *PRECISIONS)}
    spent: dict[tuple[str, int], list[float]] = {}
    for width in WIDTHS:
        for _ in range(2 + 2 * repeats):
            for name, bench in benches.items():
                spent.setdefault((name, width), []).append(bench.step(width, live, time.process_time)[0])
    table = Table("precision", *(f"W = {width}" for width in WIDTHS), title=f"ms a step, {live} live slots")
    median = {key: 1e3 * float(np.median(values[2:])) for key, values in spent.items()}
    for name in benches:
        cells = [f"{median[name, w]:.1f} ({median['fp32', w] / median[name, w]:.2f}x)" for w in WIDTHS]
        table.add_row(name, *cells)
    CONSOLE.print(table)


def frames(bundle: Bundle, repeats: int) -> None:
    """One 14 x 24 frame: DiagD k=1 against NTP (48 of its 336 steps), in FP32 and static INT8."""
    benches = {name: _bench(bundle, name, 4096) for name in ("fp32", "int8", "int4-weight")}
    layout = next(iter(benches.values())).layout
    sampled, diagonal = slice(8, None, 7), Schedule.serial(layout, 1)
    scale = layout.cells / len(range(layout.cells)[sampled])
    ratio = layout.cells / diagonal.total_steps(1)
    for live in LIVE:
        table = Table(
            "precision", "NTP", "k=1", "gain", "share of the step ratio", title=f"{live} live slots"
        )
        for bench in benches.values():
            bench.frame(diagonal, live, time.process_time)
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in benches}
        for _ in range(repeats):
            for name, bench in benches.items():
                ntp = scale * bench.frame(Schedule.next_token(layout), live, time.process_time, sampled)
                spent[name].append((ntp, bench.frame(diagonal, live, time.process_time)))
        for name, pairs in spent.items():
            ntp, fast = np.median(pairs, axis=0)
            table.add_row(
                name, f"{ntp:.2f} s", f"{fast:.2f} s", f"{ntp / fast:.2f}x", f"{ntp / fast / ratio:.2f}"
            )
        CONSOLE.print(table)


def published(bundle: Bundle, repeats: int) -> None:
    """The k=1 frame against the published runtime in PyTorch, bfloat16 and float32."""
    import torch

    from benchmarks.baselines import PublishedForm
    from diagd.export.families import find

    torch.set_num_threads(1)
    config, weights = find(bundle.manifest.name).transformer, _weights(bundle)
    bench = _bench(bundle, "int8", 4096)
    diagonal = Schedule.serial(bench.layout, 1)
    forms = {
        f"published form, {name}": PublishedForm(weights, config, dtype, config.context_length)
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
    }
    for live in LIVE:
        spent: dict[str, list[float]] = {name: [] for name in ("diagd, int8", *forms)}
        bench.frame(diagonal, live, time.process_time)
        for _ in range(repeats):
            spent["diagd, int8"].append(bench.frame(diagonal, live, time.process_time))
            for name, form in forms.items():
                form.prefill(live - 1)
                began = time.process_time()
                form.decode(bench.table(diagonal, live))
                spent[name].append(time.process_time() - began)
        ours = float(np.median(spent["diagd, int8"]))
        table = Table("runtime", "s a frame", "times ours", title=f"k=1 frame, {live} live slots")
        for name, values in spent.items():
            table.add_row(name, f"{np.median(values):.2f}", f"{np.median(values) / ours:.2f}x")
        CONSOLE.print(table)


def _bench(bundle: Bundle, precision: str, slots: int) -> Bench:
    return Bench(bundle.at_precision(precision), slots, wall=False)


if __name__ == "__main__":
    main()
