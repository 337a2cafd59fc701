"""``diagd calibrate``: quantised step graphs for a bundle, accepted by a quality gate."""

from __future__ import annotations

import time

import numpy as np
from pydantic import Field

from diagd.bundle import Bundle
from diagd.bundle.targets import bundle_target
from diagd.calibration.options import CalibrationOptions
from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.engines.engine import Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import require
from diagd.options import File, checked, flag, positional, setting
from diagd.progress import Progress
from diagd.runtime.clip import EPISODE, read_recording, read_tokens
from diagd.runtime.pixels import PixelCodec

EXAMPLES = """examples:
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


@checked
class CalibrateOptions:
    """What to calibrate, on which frames, and how."""

    calibration: CalibrationOptions = Field()
    bundle: File = positional("changed in place, and only on success")
    data: File | None = flag(
        "frames of prompts: video, episode, .npy tokens [P, h, w], or a folder of clips or of recordings",
        None,
    )
    frames: int = setting("frames taken from a file, a video's last ones", 256, ge=1, le=1_000_000)
    resize: bool = setting("resize frames of another size", False)

    def tokens(self, bundle: Bundle) -> Int | None:
        """Frames of prompts, int32 [P, rows, columns].

        Raises:
            UsageError: they are not of the bundle's grid, or cannot be read.
        """
        if self.data is None:
            return None
        if self.data.suffix.lower() == ".npy":
            return read_tokens(self.data, bundle.manifest)
        if self.data.is_dir():
            from diagd.tuning.source import Source

            layout = bundle.manifest.layout
            streams = Source(str(bundle.path), bundle, resize=self.resize).windows(self.data, 1)
            cells = streams[:, layout.first_cell(0) :][:, : layout.cells]
            return cells.reshape(-1, layout.rows, layout.columns).astype(np.int32)
        pixels = PixelCodec(bundle, CpuOptions(self.calibration.threads))
        if self.data.suffix.lower() == EPISODE:
            return read_recording(self.data, bundle.manifest, pixels, self.frames, resize=self.resize).tokens
        return pixels.encode(pixels.read(self.data, frames=self.frames, resize=self.resize))


def run(options: CalibrateOptions) -> None:
    """Quantise and judge; the bundle changes only on success."""
    require("torch", extra="export", purpose="trace quantised graphs")
    from diagd.calibration.quantise import RejectedError, calibrate
    from diagd.calibration.report import figure_table, layer_table

    bundle, console, began = Bundle.open(options.bundle), terminal.console(), time.perf_counter()
    bundle_target(options.bundle, "bundle")
    how = options.calibration
    try:
        report = calibrate(bundle, how, options.tokens(bundle), Progress(console))
    except RejectedError as error:
        console.print(layer_table(error.report), figure_table(bundle.manifest.name, error.report))
        raise
    console.print(layer_table(report), figure_table(bundle.manifest.name, report))
    verdict = "accepted" if how.budget else "written, not judged,"
    console.print(
        f"{how.name} {verdict} in {time.perf_counter() - began:.1f} s, "
        f"{report.bytes_after / 1e6:,.1f} MB of weights: {options.bundle}"
    )


VERB = Verb(CalibrateOptions, run, EXAMPLES)
