"""Step graphs on one NVIDIA GPU against its own ceilings and against PyTorch in the published form.

One line makes what is missing, measures what is missing, and writes the tables; it stops by itself before ten
minutes are over and goes on where it stopped when it is typed again:

    python -m benchmarks.gpu --folder /tmp/diagd-gpu --write docs/benchmarks.md

``--folder`` keeps bundles (random weights, float16, about 13 GB for all models) and ``results.json``.
``--model cosmos-4b`` measures that model only. ``--backend tensorrt`` takes engines made by diagd-build.
A step graph of which ONNX Runtime leaves a node to the CPU is refused. Without a GPU nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.gpu_measure import FRAMES, PARTS, Bench, make_bundle
from benchmarks.gpu_report import Results, around_section, markdown, write_section
from diagd.bundle import Bundle
from diagd.engines.backend import StepOptions, find
from diagd.engines.ceilings import Ceilings
from diagd.engines.engine import Engine
from diagd.errors import DiagdError
from diagd.export.families.registry import find as find_family

BACKENDS = ("cuda", "tensorrt", "tensorrt_rtx")
MODELS = ("mineworld-300m", "mineworld-700m", "mineworld-1200m", "cosmos-4b")
BUDGET = 300.0
"""Seconds after which no part begins; the longest takes about four minutes."""


def main() -> int:
    args = arguments().parse_args()
    began = time.perf_counter()
    try:
        if args.write:
            around_section(args.write)  # before anything is measured
        device, ceilings = describe(args.backend)
    except DiagdError as error:
        no_gpu = "no CUDA device" in str(error)
        print(f"skipped: {error}" if no_gpu else f"error: {error}")
        return 0 if no_gpu else 1
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.results or args.folder / "results.json"
    results = Results.read(file, device)
    bench = Bench(partial(open_strictly, args.backend), ceilings, args.frames)
    failed = 0
    try:
        for model, part in missing(results, args.model or MODELS):
            if time.perf_counter() - began > args.budget:
                print("not everything is measured yet: type the same line again")
                break
            failed += not measure(bench, results, args.folder, model, part)
            results.write(file)
    finally:
        print(markdown(results))
        if args.write:
            write_section(args.write, markdown(results))
    return 1 if failed else 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, required=True, help="bundles and results are kept here")
    parser.add_argument("--model", action="append", help=f"may be repeated; default: {', '.join(MODELS)}")
    parser.add_argument("--backend", choices=BACKENDS, default="cuda")
    parser.add_argument("--frames", type=int, default=FRAMES, help="of a diagonal run")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds after which no part begins")
    parser.add_argument("--results", type=Path, help="default: results.json in the folder")
    parser.add_argument("--write", type=Path, help="file whose GPU section is replaced")
    return parser


def missing(results: Results, models: list[str] | tuple[str, ...]) -> list[tuple[str, str]]:
    """Models and parts that no call has measured yet, in order."""
    return [(model, part) for model in models for part in PARTS if not results.of(model, part)]


def measure(bench: Bench, results: Results, folder: Path, model: str, part: str) -> bool:
    """Measure one part; whether that went well. What did not is said, and the next part goes on."""
    try:
        family = find_family(model, None)
        bundle = make_bundle(family, folder, bench.frames)
        print(f"{model}: {part}", flush=True)
        results.rows += bench.measure(bundle, family, part)
    except Exception as error:  # of PyTorch, its compiler, ONNX Runtime, the driver
        print(f"{model}: {part} cannot be measured: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True


def describe(backend: str) -> tuple[str, Ceilings]:
    """The GPU and its limits.

    Raises:
        DiagdError: there is none, or the backend is missing.
    """
    chosen = find(backend)
    return chosen.describe(), chosen.ceilings()


def open_strictly(backend: str, bundle: Bundle, tokens: int, graphs: bool) -> Engine:
    """An engine of which nothing runs on the CPU.

    Raises:
        EngineError: ONNX Runtime leaves part of the step graph to the CPU.
    """
    return find(backend).open_steps(bundle, StepOptions(0, tokens, graphs=graphs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
