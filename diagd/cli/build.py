"""``diagd build``: a bundle's step graph to a TensorRT engine."""

from __future__ import annotations

import time
from dataclasses import replace
from types import ModuleType
from typing import Literal

from rich.console import Console

from diagd.bundle import Bundle
from diagd.bundle.targets import is_where_one_works
from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.engines.host import available_bytes
from diagd.engines.tensorrt import capabilities, import_tensorrt
from diagd.engines.tensorrt.builder import Request, estimate
from diagd.engines.tensorrt.opening import choose, compile_engine
from diagd.errors import UsageError
from diagd.options import File, checked, flag, positional
from diagd.progress import Progress
from diagd.runtime.slots import TokenPlaces

EXAMPLES = """examples:
  diagd-build mineworld.diagd
  diagd-build mineworld.diagd --widths 16,64 --force
  diagd-build mineworld.diagd --targets sm86,sm89    (TensorRT-RTX, on a machine without a GPU)

Precision is the graph's own: export with --precision fp16 --form modern (or portable), or quantise with
diagd-calibrate, first. Engines are kept in BUNDLE/engines and fit one graph, TensorRT, GPU and driver; what
does not fit is named on loading.
"""


@checked
class BuildOptions:
    """What to build of a bundle, and by what."""

    bundle: File = positional("of the step graph; the engine is kept in it")
    precision: str | None = flag("of the step graph, as fp16 (default: the bundle's first)", None)
    runtime: Literal["tensorrt", "tensorrt_rtx"] | None = flag(
        "tensorrt or tensorrt_rtx (default: the one installed)", None
    )
    force: bool = flag("build even if memory seems too small", False)
    dry_run: bool = flag("print sizes and memory; build nothing", False)
    engine: Request = Request()


def run(options: BuildOptions) -> None:
    """Build, or say what would be built."""
    if is_where_one_works(options.bundle):
        raise UsageError(
            f"bundle {options.bundle}: the folder one works in is not written to; name it from outside"
        )
    console, bundle = terminal.console(), Bundle.open(options.bundle).at_precision(options.precision)
    trt, manifest = import_tensorrt(options.runtime), bundle.manifest
    request = replace(options.engine, tokens=TokenPlaces(manifest.layout, manifest.context.frames).size)
    if options.dry_run:
        _print_plan(console, bundle, request, trt)
        return
    began = time.perf_counter()
    stored, log = compile_engine(bundle, request, trt, progress=Progress(console), force=options.force)
    for line in log:
        console.print(f"{line.severity.lower()}: {line.text}", style="dim")
    seconds, fingerprint = time.perf_counter() - began, stored.record.fingerprint
    console.print(
        f"built {fingerprint.form.value} {fingerprint.precision} widths "
        f"{','.join(map(str, fingerprint.widths))} for {','.join(fingerprint.targets)} in {seconds:.1f} s: "
        f"{stored.record.bytes / 1e6:,.1f} MB at {stored.plan}"
    )


def _print_plan(console: Console, bundle: Bundle, request: Request, trt: ModuleType) -> None:
    graph, widths = choose(bundle, request, capabilities(trt))
    needed = estimate(bundle, graph, widths)
    sizes = {
        "weights": needed.weights,
        "host memory while building, about": needed.build,
        "host memory free": available_bytes() or 0,
        "device memory while running, about": needed.run,
    }
    rows = ((name, f"{size / 1e9:.2f}") for name, size in sizes.items())
    title = f"{bundle.path}: {graph.form.value} form, nothing was built"
    terminal.print_table(console, ("what", "GB"), rows, title)


VERB = Verb(BuildOptions, run, EXAMPLES)
