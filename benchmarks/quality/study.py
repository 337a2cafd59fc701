"""The quality of Diagonal Decoding on trained worlds, measured and written as docs/quality.md."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from matplotlib.figure import Figure
from pydantic import TypeAdapter

from benchmarks.quality import parts
from benchmarks.quality.page import Figures, quality_page
from benchmarks.quality.parts import Report
from diagd.bundle.files import atomic_file
from diagd.errors import UsageError
from diagd.export.families.world import load_codebook
from diagd.tuning.recordings import FrameEncoder, cached_tokens
from worlds.evaluate import EvalOptions, Evaluation
from worlds.geometry import Geometry
from worlds.run_eval import open_subject

PARTS = ("shipped", "compat", "sizes", "training", "speed")
SHIPPED_SIZE = "3m"


@dataclass(frozen=True)
class StudyOptions:
    """What the study covers.

    Attributes:
        model: folder of the shipped world model.
        data: recording that no model was trained on.
        geometry: recording that the rules of the world are learned from.
        output: folder of quality.md, quality.json and the pictures.
        sizes: folders of other sizes trained like the shipped model, by name.
        training: folders of the same size trained otherwise, by what was done.
        parts: what to measure; the rest is taken from quality.json.
        evaluation: sizes and sampling.
        size_rollouts: rollouts of each other size.
        compat_windows: windows of the comparison with the released code.
        speed_rounds, speed_frames: of the measurement of frames per second; the median round counts.
        long_frames, long_rollouts: of the drift measurement.
    """

    model: Path
    data: Path
    geometry: Path
    output: Path
    sizes: Mapping[str, Path] = field(default_factory=dict)
    training: Mapping[str, Path] = field(default_factory=dict)
    parts: tuple[str, ...] = PARTS
    evaluation: EvalOptions = field(default_factory=lambda: EvalOptions(windows=96, rollouts=96))
    size_rollouts: int = 48
    compat_windows: int = 32
    speed_rounds: int = 3
    speed_frames: int = 12
    long_frames: int = 500
    long_rollouts: int = 4


class Study:
    """Measures the parts asked for; see `StudyOptions`."""

    def __init__(self, options: StudyOptions, report: Report = lambda _: None) -> None:
        self._options, self._report = options, report
        self._bundles: dict[Path, Path] = {}
        codebook = load_codebook(options.model)
        encoder = FrameEncoder.of_codebook(codebook)
        self._recording = cached_tokens(options.data, encoder)
        self._geometry = Geometry.learn(cached_tokens(options.geometry, encoder), len(codebook))

    def run(self) -> Path:
        """Measure part by part, saving the figures after each; returns the page."""
        options = self._options
        options.output.mkdir(parents=True, exist_ok=True)
        figures = self._known()
        with tempfile.TemporaryDirectory() as scratch:
            for part in options.parts:
                figures = self._measure(part, figures, Path(scratch))
                _write(options.output / "quality.json", json.dumps(asdict(figures), indent=1) + "\n")
        _plot(options.output / "quality-speed.png", figures)
        page = options.output / "quality.md"
        _write(page, quality_page(figures, SHIPPED_SIZE))
        return page

    def _known(self) -> Figures:
        file = self._options.output / "quality.json"
        if set(self._options.parts) == set(PARTS) or not file.exists():
            return Figures(self._options.evaluation)
        figures = TypeAdapter(Figures).validate_python(json.loads(file.read_text()))
        if figures.options != self._options.evaluation:
            raise UsageError(f"{file} was measured with other options; measure every part again")
        return figures

    def _measure(self, part: str, figures: Figures, scratch: Path) -> Figures:
        options, report = self._options, self._report
        folders = {SHIPPED_SIZE: options.model, **options.sizes}
        if part == "shipped":
            contact = options.output / "quality-contact.png"
            lengths = options.long_frames, options.long_rollouts
            shipped = parts.shipped_figures(self._evaluation(options.model), *lengths, contact, report)
            return replace(figures, shipped=shipped)
        if part == "compat":
            rows = {
                name: parts.compat_figures(
                    self._bundle(folder, scratch), self._evaluation(folder), options.compat_windows, report
                )
                for name, folder in folders.items()
            }
            return replace(figures, compat={**figures.compat, **rows})
        if part == "sizes":
            smaller = replace(options.evaluation, rollouts=options.size_rollouts)
            found = {
                name: parts.size_figures(self._evaluation(folder, smaller), name, report)
                for name, folder in options.sizes.items()
            }
            return replace(figures, sizes={**figures.sizes, **found})
        if part == "training":
            rows_of = parts.training_row
            trained = [rows_of(self._evaluation(f), name, report) for name, f in options.training.items()]
            return replace(figures, training=trained)
        bundles = {name: self._bundle(folder, scratch) for name, folder in folders.items()}
        speeds = parts.speeds(bundles, options.speed_rounds, options.speed_frames, report)
        counts = {name: parts.parameters(folder) for name, folder in folders.items()}
        return replace(figures, frames_per_second=speeds, parameters=counts)

    def _bundle(self, folder: Path, scratch: Path) -> Path:
        if folder not in self._bundles:
            self._report(f"exporting {folder.name}")
            output = scratch / f"{len(self._bundles)}.diagd"
            self._bundles[folder] = parts.export_world(folder, output)
        return self._bundles[folder]

    def _evaluation(self, folder: Path, options: EvalOptions | None = None) -> Evaluation:
        chosen = options or self._options.evaluation
        return Evaluation(open_subject(folder), self._recording, self._geometry, chosen)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as partial:
        partial.write_text(text)


def _plot(path: Path, figures: Figures) -> None:
    """Frames per second against the likelihood that next-token prediction gives to the rollouts."""
    scores = {name: size.schedules for name, size in figures.sizes.items()}
    if figures.shipped:
        scores = {SHIPPED_SIZE: figures.shipped.schedules, **scores}
    points = {
        size: [
            (score.name, figures.frames_per_second[size][score.name], nll.mean, nll.error)
            for score in of_size
            for nll in [score.generated_nll]
        ]
        for size, of_size in scores.items()
        if size in figures.frames_per_second
    }
    save_plot(path, points, "frames/s, one core", "NLL of generated tokens under NTP, nats")


def save_plot(
    path: Path, series: Mapping[str, Sequence[tuple[str, float, float, float]]], across: str, up: str
) -> None:
    """Write a PNG with points (label, x, y, standard error of y) of each series; x is logarithmic."""
    figure = Figure(figsize=(8, 4.6), dpi=120, layout="constrained")
    axis = figure.subplots()
    for name, points in series.items():
        _, x, y, error = zip(*points, strict=True)
        axis.errorbar(x, y, yerr=error, fmt="o", capsize=3, label=name)
        for label, across_point, up_point, _ in points:
            place = (across_point, up_point)
            axis.annotate(label, place, textcoords="offset points", xytext=(5, 4), fontsize=7)
    axis.set(xlabel=across, ylabel=up, xscale="log")
    axis.grid(alpha=0.3)
    if series:
        axis.legend()
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")


def _folders(given: list[str]) -> dict[str, Path]:
    pairs = [item.partition("=") for item in given]
    for name, _, folder in pairs:
        if not name or not folder:
            raise UsageError(f"'{name}': expected NAME=FOLDER")
    return {name: Path(folder) for name, _, folder in pairs}


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main() -> None:
    """Run the study from the command line: ``python -m benchmarks.quality``."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "geometry", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--size", action="append", default=[], help="NAME=FOLDER of a world of another size")
    parser.add_argument("--training", action="append", default=[], help="NAME=FOLDER trained otherwise")
    parser.add_argument("--part", action="append", choices=PARTS, help="measure this again (default: all)")
    args = parser.parse_args()
    options = StudyOptions(
        model=args.model,
        data=args.data,
        geometry=args.geometry,
        output=args.output,
        sizes=_folders(args.size),
        training=_folders(args.training),
        parts=tuple(args.part or PARTS),
    )
    _say(str(Study(options, _say).run()))
