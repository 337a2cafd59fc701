"""``diagd build``: a bundle's step graph to a TensorRT engine."""

from __future__ import annotations

import argparse
import time
from types import ModuleType
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from diagd.bundle.targets import is_where_one_works
from diagd.cli import terminal
from diagd.cli.paths import path
from diagd.cli.settings import add_set_option, parse_settings
from diagd.errors import UsageError
from diagd.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from diagd.bundle import Bundle
    from diagd.engines.tensorrt.opening import Request

EPILOG = """examples:
  diagd-build mineworld.diagd
  diagd-build mineworld.diagd --widths 16,64 --force
  diagd-build mineworld.diagd --target sm86,sm89    (TensorRT-RTX, on a machine without a GPU)

Precision is the graph's own: export with --precision fp16 --form modern (or portable), or quantise with
diagd-calibrate, first. Engines are kept in BUNDLE/engines and fit one graph, TensorRT, GPU and driver; what
does not fit is named on loading.
"""


class BuildSettings(BaseModel):
    """Options behind ``--set``."""

    model_config = ConfigDict(extra="forbid")
    optimization_level: int | None = Field(
        None, ge=0, le=5, description="0 builds fast, 5 runs fast (default: TensorRT's own)"
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=path)
    parser.add_argument("--precision", help="of the step graph, as fp16 (default: the bundle's first)")
    parser.add_argument("--form", choices=("modern", "portable"), help="default: what suits this TensorRT")
    parser.add_argument("--widths", help="rows of a step, as 16,64 (default: the bundle's)")
    parser.add_argument("--target", help="build for other GPUs, as sm86,sm89 (TensorRT-RTX only)")
    parser.add_argument("--runtime", choices=("tensorrt", "tensorrt_rtx"), help="default: the one installed")
    parser.add_argument("--force", action="store_true", help="build even if memory seems too small")
    parser.add_argument("--dry-run", action="store_true", help="print sizes and memory; build nothing")
    add_set_option(parser, BuildSettings)


def run(args: argparse.Namespace) -> int:
    """Build, or say what would be built."""
    from diagd.bundle import Bundle
    from diagd.engines.tensorrt.capabilities import import_tensorrt
    from diagd.engines.tensorrt.opening import compile_engine

    settings = parse_settings(BuildSettings, args.settings)
    if is_where_one_works(args.bundle):
        raise UsageError(
            f"bundle {args.bundle}: the folder one works in is not written to; name it from outside"
        )
    console, bundle = terminal.console(), Bundle.open(args.bundle).at_precision(args.precision)
    trt = import_tensorrt(args.runtime)
    request = _request(args, settings, bundle)
    if args.dry_run:
        _print_plan(console, bundle, request, trt)
        return 0
    began = time.perf_counter()
    stored, log = compile_engine(bundle, request, trt, progress=Progress(console), force=args.force)
    for line in log:
        console.print(f"{line.severity.lower()}: {line.text}", style="dim")
    seconds, fingerprint = time.perf_counter() - began, stored.record.fingerprint
    console.print(
        f"built {fingerprint.form.value} {fingerprint.precision} widths "
        f"{','.join(map(str, fingerprint.widths))} for {','.join(fingerprint.targets)} in {seconds:.1f} s: "
        f"{stored.record.bytes / 1e6:,.1f} MB at {stored.plan}"
    )
    return 0


def _request(args: argparse.Namespace, settings: BuildSettings, bundle: Bundle) -> Request:
    from diagd.bundle import Form
    from diagd.engines.tensorrt.opening import Request
    from diagd.runtime.session import token_places

    manifest = bundle.manifest
    form = Form(args.form) if args.form else None
    return Request(
        tokens=token_places(manifest.layout, manifest.context.frames).size,
        form=form,
        widths=_widths(args.widths),
        targets=_targets(args.target),
        optimization_level=settings.optimization_level,
    )


def _targets(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    targets = {part.strip().lower() for part in text.split(",") if part.strip()}
    if not targets:
        raise UsageError(f"--target takes GPUs as sm86,sm89, got '{text}'")
    return tuple(sorted(targets, key=lambda target: (len(target), target)))


def _widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        widths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise UsageError(f"--widths takes numbers as 16,64, got '{text}'") from error
    if widths[0] < 1:
        raise UsageError(f"--widths {text}: a step has at least one row")
    return widths


def _print_plan(console: Console, bundle: Bundle, request: Request, trt: ModuleType) -> None:
    from rich.table import Table

    from diagd.engines.host import available_bytes
    from diagd.engines.tensorrt.capabilities import capabilities
    from diagd.engines.tensorrt.memory import estimate
    from diagd.engines.tensorrt.opening import choose

    form, graph, widths = choose(bundle, request, capabilities(trt))
    needed = estimate(bundle, graph, widths)
    table = Table("what", "GB", title=f"{bundle.path}: {form.value} form, nothing was built")
    table.add_row("weights", f"{needed.weights / 1e9:.2f}")
    table.add_row("host memory while building, about", f"{needed.build / 1e9:.2f}")
    table.add_row("host memory free", f"{(available_bytes() or 0) / 1e9:.2f}")
    table.add_row("device memory while running, about", f"{needed.run / 1e9:.2f}")
    console.print(table)
