"""``diagd calibrate``: quantised step graphs for a bundle, accepted by a quality gate."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from diagd.bundle.targets import bundle_target
from diagd.cli import terminal
from diagd.cli.paths import path
from diagd.cli.settings import add_set_option, parse_settings
from diagd.errors import UsageError, require
from diagd.progress import Progress

if TYPE_CHECKING:
    from diagd.bundle import Bundle
    from diagd.engines.engine import Int

EPILOG = """examples:
  diagd-calibrate crafter-3m.diagd --precision int8 --data walk.mp4
  diagd-calibrate crafter-3m.diagd --precision int4-weight --data tokens.npy --budget agreement=0.9,nll=0.05
  diagd-generate crafter-3m.diagd --set precision=int8 ...

precisions: int8 (weights and activations), int8-dynamic (activations scaled row by row), int8-weight,
int4-weight, fp8 (for GPUs from sm_89).
Ranges are found, and the result is judged, while the model decodes along diagonal schedules. Products that
harm the result go back to floating point; if it stays outside --budget, the bundle is left as it was, the
figures are printed and the exit code is 1. --budget none judges nothing, for models too large to run here.
Bundles of random weights need no --data.
"""


class CalibrateSettings(BaseModel):
    """Options behind ``--set``."""

    model_config = ConfigDict(extra="forbid")
    steps: int = Field(
        320, description="passes of the calibration run, and of each round of the gate, at least 64"
    )
    floor: float | None = Field(
        None, description="dB below which a product is not quantised (default: the scheme's)"
    )
    threads: int = Field(0, ge=0, description="CPU threads, 0 for one a core")
    floats: str = Field("fp16", description="of GPU graphs beside their quantised products: fp16 or fp32")
    frames: int = Field(256, ge=1, le=1_000_000, description="frames taken from a video, its last ones")
    resize: bool = Field(False, description="resize frames of another size")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=path)
    parser.add_argument("--precision", required=True, help="the scheme, see below")
    parser.add_argument("--kv-cache", help="int8: K/V rows of 8 bits too, in portable graphs")
    parser.add_argument("--data", type=path, help="video, or .npy tokens [P, h, w]: frames of prompts")
    parser.add_argument(
        "--budget",
        default="",
        help="what may be lost: agreement=0.97,nll=0.01,psnr=30 (the defaults), or none to judge nothing",
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts and sampling (default %(default)s)")
    add_set_option(parser, CalibrateSettings)


def run(args: argparse.Namespace) -> int:
    """Quantise and judge; the bundle changes only on success."""
    require("torch", extra="export", purpose="trace quantised graphs")
    from diagd.bundle import Bundle
    from diagd.calibration.gate import Budget, parse_budget
    from diagd.calibration.quantise import CalibrationOptions, RejectedError, calibrate
    from diagd.calibration.report_page import figure_table, layer_table

    settings = parse_settings(CalibrateSettings, args.settings)
    bundle_target(args.bundle, "bundle")
    budget = parse_budget(args.budget, Budget())
    options = CalibrationOptions(
        args.precision,
        budget,
        seed=args.seed,
        kv_cache=args.kv_cache,
        **settings.model_dump(include={"steps", "floor", "threads", "floats"}),
    )
    bundle, console, began = Bundle.open(args.bundle), terminal.console(), time.perf_counter()
    try:
        report = calibrate(bundle, options, _frames(args, settings, bundle), Progress(console))
    except RejectedError as error:
        console.print(layer_table(error.report), figure_table(bundle.manifest.name, error.report))
        raise
    console.print(layer_table(report), figure_table(bundle.manifest.name, report))
    verdict = "accepted" if budget else "written, not judged,"
    console.print(
        f"{options.name} {verdict} in {time.perf_counter() - began:.1f} s, "
        f"{report.bytes_after / 1e6:,.1f} MB of weights: {args.bundle}"
    )
    return 0


def _frames(args: argparse.Namespace, settings: CalibrateSettings, bundle: Bundle) -> Int | None:
    from diagd.engines.onnxruntime_session import CpuOptions
    from diagd.runtime.pixels import PixelCodec
    from diagd.runtime.prompt import read_tokens
    from diagd.runtime.video import read_frames

    if args.data is None:
        return None
    if args.data.suffix.lower() == ".npy":
        tokens = read_tokens(args.data, bundle.manifest)
        grid = (bundle.manifest.layout.rows, bundle.manifest.layout.columns)
        if tokens.ndim != 3 or tokens.shape[1:] != grid:
            raise UsageError(f"{args.data} has shape {tokens.shape}; expected [frames, {grid[0]}, {grid[1]}]")
        return tokens
    pixels = PixelCodec(bundle, CpuOptions(settings.threads))
    size = (pixels.spec.height, pixels.spec.width)
    return pixels.encode(read_frames(args.data, size, frames=settings.frames, resize=settings.resize))
