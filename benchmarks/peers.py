"""mineworld-300m in every precision, beside OpenVINO and PyTorch: steps and frames on a processor.

Each runs at its best: prefix graphs on ONNX Runtime, whose cost follows the slots in use, and portable
graphs on OpenVINO, whose cost follows the capacity, so each length has a bundle of a window that just fits.
PyTorch has the published form of the runtime (static cache, repeated KV heads, boolean mask) and the best one
we know, on the same weights. All take turns in one process with one thread, so that no idle thread takes
another's core. Times are process CPU time. Bundles are made where they are missing, weights random:

    python -m benchmarks.peers --folder /tmp/diagd-peers [--part steps] [--part frames] [--repeats 3]
    python -m benchmarks.peers --folder /tmp/diagd-peers --runtime diagd --width 1 --width 4
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from rich.table import Table

from benchmarks import CONSOLE, parser
from benchmarks.cpu import Bench, calibrated, canonical_weights
from diagd.bundle import Bundle, Form
from diagd.schedule import Schedule

Times: TypeAlias = dict[tuple[str, str], list[float]]
"""Seconds by runtime and what was timed."""

TorchForm: TypeAlias = Any
"""A runtime in PyTorch of ``benchmarks.baselines``, which is loaded where it is asked for."""

LENGTHS = {2: (512, 347), 8: (2776, 2429)}
"""By window: slots in use ahead of a step, and ahead of a frame."""

SAMPLED = 48
"""Steps of next-token prediction that are timed, of 336."""

WIDTHS = (1, 14)
PRECISIONS = ("int8-weight", "int8", "int8-dynamic", "int4-weight")
RUNTIMES = {
    "diagd, fp32": ("cpu", "fp32"),
    "OpenVINO, fp32": ("openvino_fp32", "fp32"),
    "OpenVINO, bf16": ("openvino", "fp32"),
    "diagd, int8-weight": ("cpu", "int8-weight"),
    "OpenVINO, int8-weight": ("openvino", "int8-weight"),
    "diagd, int8": ("cpu", "int8"),
    "OpenVINO, int8": ("openvino", "int8"),
    "diagd, int8-dynamic": ("cpu", "int8-dynamic"),
    "diagd, int4-weight": ("cpu", "int4-weight"),
}
"""Floating point beside quantised products is bfloat16 in OpenVINO."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, required=True, help="of the bundles")
    options.add_argument("--part", choices=("steps", "frames"), action="append")
    options.add_argument(
        "--runtime", action="append", help="only those whose names begin so; may be repeated"
    )
    options.add_argument("--width", type=int, action="append", help=f"of steps (default: {WIDTHS})")
    options.add_argument("--repeats", type=int, default=3)
    args = options.parse_args()
    parts, chosen, widths = args.part or ("steps", "frames"), args.runtime or [""], args.width or WIDTHS
    for window, (step, frame) in LENGTHS.items():
        bundle = make_bundle(args.folder / f"mineworld-300m-{window}.diagd", window)
        if "steps" in parts:
            compare_steps(bundle, step, args.repeats, widths, chosen)
        if "frames" in parts:
            forms = torch_forms(bundle) if any("PyTorch".startswith(name) for name in chosen) else {}
            compare_frames(bundle, frame, args.repeats, forms, chosen)


def make_bundle(path: Path, window: int) -> Bundle:
    """The model in both forms and all precisions, its fixed buffers for a window of frames."""
    from diagd.export.exporter import export, random_sources
    from diagd.export.families import find
    from diagd.export.options import GraphOptions

    if not path.is_dir():
        family = find("mineworld-300m")
        options = GraphOptions((Form.PREFIX, Form.PORTABLE), widths=(1, 4, 14, 64), window=window)
        export(family, options, replace(random_sources(family, 0), tokenizer=None), path)
    return calibrated(path, PRECISIONS)


def compare_steps(
    bundle: Bundle, live: int, repeats: int, widths: Sequence[int] = WIDTHS, chosen: Sequence[str] = ("",)
) -> None:
    """Milliseconds of a step behind ``live`` slots, and how far its logits are from ours in FP32."""
    benches, logits = _benches(bundle, chosen), dict[str, np.ndarray]()
    spent: Times = {}
    for repeat in range(2 + 2 * repeats):
        for width in widths:
            for name, bench in benches.items():
                seconds, logits[name] = bench.step(width, live, time.process_time)
                if repeat >= 2:
                    spent.setdefault((name, f"ms, W = {width}"), []).append(1e3 * seconds)
    exact = logits["diagd, fp32"]
    distances = {
        name: float(np.linalg.norm(rows - exact) / np.linalg.norm(exact)) for name, rows in logits.items()
    }
    if distances.get("OpenVINO, fp32", 0.0) > 1e-4:
        raise SystemExit(f"the logits differ: relative errors {distances}")
    show(spent, "diagd, fp32", _title(bundle, live), {n: f"{d:.1e}" for n, d in distances.items()})


def compare_frames(
    bundle: Bundle,
    live: int,
    repeats: int,
    forms: Mapping[str, TorchForm],
    chosen: Sequence[str] = ("",),
) -> None:
    """Seconds of a frame behind ``live`` slots: next-token prediction, by some of its steps, and k=1."""
    benches, layout = _benches(bundle, chosen), bundle.manifest.layout
    spent: Times = {}
    for _ in range(repeats):
        for schedule in (Schedule.next_token(layout), Schedule.serial(layout, 1)):
            table = benches["diagd, fp32"].table(schedule, live)
            stride = -(-table.steps // SAMPLED)
            taken = len(range(0, table.steps, stride))
            for name, bench in benches.items():
                seconds = bench.frame(schedule, live, time.process_time, slice(None, None, stride))
                spent.setdefault((name, f"s, {schedule.name}"), []).append(seconds * table.steps / taken)
            for name, form in forms.items():
                form.prefill(live - 1)
                began = time.process_time()
                form.decode(table.block(0, taken))
                seconds = time.process_time() - began
                spent.setdefault((name, f"s, {schedule.name}"), []).append(seconds * table.steps / taken)
    show(spent, next(iter(forms), "diagd, fp32"), _title(bundle, live))


def torch_forms(bundle: Bundle) -> dict[str, TorchForm]:
    """The runtimes in PyTorch on one thread, on the weights of the bundle."""
    import torch

    from benchmarks.baselines import OptimisedForm, PublishedForm

    torch.set_num_threads(1)
    keep_freed_memory()
    config, weights = bundle.manifest.transformer, canonical_weights(bundle)
    forms = {
        "PyTorch, published form": (PublishedForm, torch.float32),
        "PyTorch, published form, bf16": (PublishedForm, torch.bfloat16),
        "PyTorch, optimised form": (OptimisedForm, torch.float32),
    }
    return {name: form(weights, config, kind, 5552) for name, (form, kind) in forms.items()}


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, where it is glibc.

    The published form allocates some 900 MB anew in every step. Pages that come from the system each time are
    half of its time, and more on a machine with other work; no runtime should be judged by that.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(mmap_threshold, 1 << 25)  # the most that it takes


def show(spent: Times, base: str, title: str, further: Mapping[str, str] = MappingProxyType({})) -> None:
    """Medians, and how many times as fast as ``base``: any number of times where a clock has not moved."""
    columns = list(dict.fromkeys(column for _, column in spent))
    table = Table("runtime", *columns, *(["error of the logits"] if further else []), title=title)
    median = {key: np.median(values) for key, values in spent.items()}
    for name in dict.fromkeys(name for name, _ in spent):
        gains = (median[base, column] / median[name, column] for column in columns)
        cells = (f"{median[name, c]:.3g} ({gain:.2f}x)" for c, gain in zip(columns, gains, strict=True))
        table.add_row(name, *cells, *([further[name]] if further else []))
    CONSOLE.print(table)


def _benches(bundle: Bundle, chosen: Sequence[str]) -> dict[str, Bench]:
    """Of the runtimes whose names begin as one of those chosen, and of what they are compared with."""
    begins = (*chosen, "diagd, fp32")
    return {
        name: Bench(bundle.at_precision(precision), 4096, wall=False, backend=backend)
        for name, (backend, precision) in RUNTIMES.items()
        if name.startswith(begins)
    }


def _title(bundle: Bundle, live: int) -> str:
    return f"{live} live slots, capacity {bundle.manifest.graph(Form.PORTABLE).capacity}, one thread"


if __name__ == "__main__":
    main()
