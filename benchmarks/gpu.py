"""The first hour on a GPU: is it right, and how far is it from its own ceilings and from PyTorch?

One line makes what is missing, runs the stages that have no results yet, and writes the tables; it stops by
itself before ten minutes are over and goes on where it stopped when it is typed again:

    python -m benchmarks.gpu --folder /tmp/diagd-gpu --write docs/benchmarks.md

Of each model: step graphs open with nothing left to the processor; a step has its logits; 1,000 replays of
alternating widths draw what steps without graphs draw; then the tables. Each stage is a process of its own,
which is ended when its time is over: what crashes or hangs takes nothing else with it.

``--folder`` keeps bundles (random weights, float16, about 16 GB for all models) and ``results.json``.
``--model cosmos-4b`` measures that model only, ``--model cosmos-4b:int4-weight`` what it is in another
precision, which PyTorch's form has none of. ``--backend tensorrt`` takes engines made by diagd-build;
``--backend cpu`` is a dry run without a GPU, for which ``--model crafter-3m`` is small enough.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import parser
from benchmarks.gpu_measure import CHECKS, FLOAT, FRAMES, PARTS, Bench, make_bundle, samplers
from benchmarks.gpu_report import Check, Results, around_section, markdown, write_section
from diagd.bundle import Bundle, Form
from diagd.engines.backend import StepOptions, find
from diagd.engines.devices.cuda import CudaDevice
from diagd.engines.devices.host import HostDevice
from diagd.engines.devices.kernels import host_build
from diagd.engines.engine import Engine
from diagd.engines.host import processor_name
from diagd.errors import DiagdError
from diagd.export.families import find as find_family

DRY = "cpu"
BACKENDS = ("cuda", "tensorrt", "tensorrt_rtx", DRY)
MODELS = ("mineworld-300m", "cosmos-4b", "cosmos-4b:int4-weight", "mineworld-700m", "mineworld-1200m")
SAMPLERS = "samplers"
BUDGET = 300.0
"""Seconds after which no further stage begins; the longest takes about four minutes."""

BOX = 290.0
"""Seconds that a stage may take."""


def main() -> int:
    args = arguments().parse_args()
    try:
        if args.write:
            around_section(args.write)  # before anything is measured
        device = find(args.backend).describe() or processor_name()
    except DiagdError as error:
        no_gpu = "no CUDA device" in str(error)
        print(f"skipped: {error}" if no_gpu else f"error: {error}")
        return 0 if no_gpu else 1
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.results or args.folder / "results.json"
    if args.stage:
        return stage(args, device, file)
    failed = run_stages(args, device, file)
    shown = markdown(Results.read(file, device))
    print(shown)
    if args.write:
        write_section(args.write, shown)
    return 1 if failed else 0


def run_stages(args: argparse.Namespace, device: str, file: Path) -> int:
    """Run what has no results, each stage by itself; how many failed."""
    began, failed = time.perf_counter(), 0
    stages = missing(Results.read(file, device), args.model or MODELS, args.backend)
    for number, (model, name) in enumerate(stages):
        if number and time.perf_counter() - began > args.budget:
            print("not everything is measured yet: type the same line again")
            break
        print(f"{model}: {name}", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--model", model, "--stage", name]
        try:
            failed += subprocess.run(command, check=False, timeout=args.box).returncode != 0
        except subprocess.TimeoutExpired:
            print(f"{model}: {name} took more than {args.box:g} s", file=sys.stderr)
            failed += 1
    return failed


def stage(args: argparse.Namespace, device: str, file: Path) -> int:
    """Run one stage and keep its results; 1 where it failed."""
    model, name = args.model[-1], args.stage
    results = Results.read(file, device)
    try:
        if name == SAMPLERS:
            passed, figures = samplers(HostDevice(host_build()) if args.backend == DRY else CudaDevice())
            results.checks.append(Check(model=model, name=name, passed=passed, figures=figures))
        else:
            passed = measure(args, results, model, name)
    except Exception as error:  # of PyTorch, its compiler, ONNX Runtime, the driver
        print(f"{model}: {name} cannot be measured: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    results.write(file)
    return 0 if passed else 1


def measure(args: argparse.Namespace, results: Results, model: str, name: str) -> bool:
    """A check of a model, or a part of its tables; whether it passed."""
    family_name, _, precision = model.partition(":")
    family = find_family(family_name, None)
    bundle = make_bundle(family, args.folder, args.frames, precision or FLOAT)
    make_engine = partial(open_strictly, args.backend)
    if name in CHECKS:
        passed, figures = CHECKS[name](bundle, make_engine)
        results.checks.append(Check(model=model, name=name, passed=passed, figures=figures))
        return passed
    torch_device = "cpu" if args.backend == DRY else "cuda"
    bench = Bench(make_engine, find(args.backend).ceilings(), args.frames, torch_device)
    rows = bench.measure(bundle, family, name)
    results.rows += [row.model_copy(update={"model": model}) for row in rows]
    return True


def arguments() -> argparse.ArgumentParser:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, required=True, help="bundles and results are kept here")
    options.add_argument("--model", action="append", help=f"may be repeated; default: {', '.join(MODELS)}")
    options.add_argument("--backend", choices=BACKENDS, default="cuda")
    options.add_argument("--frames", type=int, default=FRAMES, help="of a diagonal run")
    options.add_argument("--budget", type=float, default=BUDGET, help="seconds after which no stage begins")
    options.add_argument("--box", type=float, default=BOX, help="seconds that a stage may take")
    options.add_argument("--stage", help="run this one alone, of the last model")
    options.add_argument("--results", type=Path, help="default: results.json in the folder")
    options.add_argument("--write", type=Path, help="file whose GPU section is replaced")
    return options


def missing(results: Results, models: Sequence[str], backend: str = "cuda") -> list[tuple[str, str]]:
    """Models and stages that no call has results of yet, in order."""
    stages = [
        (model, name)
        for model in models
        for name in (*CHECKS, *PARTS)
        if not (("compiled" in name and backend == DRY) or ("published" in name and ":" in model))
    ]
    return [(model, name) for model, name in [(models[0], SAMPLERS), *stages] if not results.has(model, name)]


def open_strictly(backend: str, bundle: Bundle, tokens: int, graphs: bool) -> Engine:
    """An engine of which nothing runs on the CPU.

    Raises:
        EngineError: ONNX Runtime leaves part of the step graph to the CPU.
    """
    options = StepOptions(0, tokens, form=Form.MODERN, graphs=graphs, strict=True)
    return find(backend).open_steps(bundle, options)


if __name__ == "__main__":
    sys.exit(main())
