"""The quality of Diagonal Decoding on trained worlds, measured and written as docs/quality.md."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from benchmarks.quality.decoders import DECODERS, PRECISIONS, DecoderFigures, decoder_figures
from benchmarks.quality.figures import SEEDS, CompatRow, Figures, GapRow, SizeFigures, TrainingRow
from benchmarks.quality.page import decoders_plot, quality_page
from diagd.bundle import Bundle
from diagd.bundle.files import atomic_file, write_text
from diagd.bundle.targets import file_target
from diagd.errors import UsageError
from diagd.export.families.world import SHIPPED, load_tokenizer
from diagd.runtime.decoders import ScheduledDecoder
from diagd.runtime.load import open_session
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.schedule import RowSeed, Schedule, StreamLayout
from diagd.tuning.prefer import PreferReport
from diagd.tuning.recordings import FrameEncoder, cached_tokens
from diagd.tuning.reward import Probe
from worlds.evaluate import Evaluation, measure_drift
from worlds.folder import load_world
from worlds.geometry import Geometry
from worlds.metrics import Estimate
from worlds.model import BundleModel, WorldModel, open_model
from worlds.options import EvalOptions
from worlds.pareto import plot_points
from worlds.report import save_contact_sheet
from worlds.run_eval import fit_probe, pictures, recorded_walks, walk_actions

PARTS = ("shipped", "compat", "sizes", "training", "speed", "decoders", "worlds", "preferences")
SHIPPED_SIZE = "3m"
ROW_LAGS = (1, 2, 4)
DEFAULTS = {
    "model": SHIPPED / "crafter-3m",
    "data": Path("recordings/valid"),
    "geometry": Path("recordings/train"),
    "output": Path("docs"),
}
SECOND = {
    "doom-3m": (SHIPPED / "doom-3m", Path("walks/valid")),
}
"""The second world, and its recording as docs/world.md makes it."""

PROBE_STEPS = 600

Report = Callable[[str], None]

Pictures = dict[str, NDArray[np.uint8]]
"""Frames uint8 [T, H, W, 3] by schedule."""


@dataclass(frozen=True)
class StudyOptions:
    """What the study covers.

    Attributes:
        data: recording that no model was trained on.
        geometry: recording that the rules of the world are learned from.
        output: folder of quality.md, quality.json and the pictures.
        sizes: folders of other sizes trained like the shipped model, by name.
        training: folders of the same size trained otherwise, by what was done; of the world whose tokenizer
            they have.
        worlds: beside the shipped one: model, data and, where there is one, the recording that its rules and
            probe are learned from, by name.
        world_rollouts, world_windows: of each of them.
        preferences: reports of `diagd prefer`, by world.
        parts: what to measure; the rest is taken from quality.json.
        speed_rounds, speed_frames: of the measurement of frames per second; the median round counts.
        long_frames, long_rollouts: of the drift measurement.
    """

    model: Path
    data: Path
    geometry: Path
    output: Path
    sizes: Mapping[str, Path] = field(default_factory=dict)
    training: Mapping[str, Path] = field(default_factory=dict)
    worlds: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    preferences: Mapping[str, Path] = field(default_factory=dict)
    world_rollouts: int = 24
    world_windows: int = 48
    decoder_rollouts: int = 12
    decoders: tuple[str, ...] = DECODERS
    precisions: tuple[str, ...] = PRECISIONS
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
        self._probes: dict[str, Probe | None] = {}
        encoder = FrameEncoder.of_graphs(*load_tokenizer(options.model))
        self._recording = cached_tokens(options.data, encoder)
        self._geometry = Geometry.learn(cached_tokens(options.geometry, encoder), encoder.codes)

    def run(self) -> Path:
        """Measure part by part, saving the figures after each; returns the page."""
        options = self._options
        options.output.mkdir(parents=True, exist_ok=True)
        figures = self._known()
        with tempfile.TemporaryDirectory() as scratch:
            self._scratch = Path(scratch)
            for part in options.parts:
                figures = self._measure(part, figures)
                write_text(options.output / "quality.json", json.dumps(asdict(figures), indent=1) + "\n")
        _plot(options.output / "quality-speed.png", figures)
        for world, compared in figures.decoders.items():
            plot_points(options.output / decoders_plot(world), compared.points)
        page = options.output / "quality.md"
        write_text(page, quality_page(figures, SHIPPED_SIZE, options.model.name))
        return page

    def _known(self) -> Figures:
        file = self._options.output / "quality.json"
        if set(self._options.parts) == set(PARTS) or not file.exists():
            return Figures(self._options.evaluation)
        figures = TypeAdapter(Figures).validate_python(json.loads(file.read_text()))
        if figures.options != self._options.evaluation:
            raise UsageError(f"{file} was measured with other options; measure every part again")
        return figures

    def _measure(self, part: str, figures: Figures) -> Figures:
        """The figures with those of a part: of more models beside those of others."""
        found = getattr(self, f"_{part}")()
        if part == "speed":
            return replace(figures, **found)
        if isinstance(found, dict):
            found = {**getattr(figures, part), **found}
        return replace(figures, **{part: found})

    def _shipped(self) -> SizeFigures:
        options, evaluation = self._options, self._evaluation(open_model(self._options.model))
        actions = walk_actions(options.long_rollouts, options.long_frames, options.evaluation.seed)
        return self._model_figures(SHIPPED_SIZE, evaluation, "quality-contact.png", actions)

    def _worlds(self) -> dict[str, SizeFigures]:
        """Of any world, by what holds for any."""
        options, found = self._options, {}
        long = options.long_rollouts, options.long_frames, options.evaluation.seed
        for name, (folder, data, *learned) in options.worlds.items():
            model = open_model(folder)
            evaluation = self._evaluation_of_any(model, name, data, *learned)
            actions = recorded_walks(model, data, *long)
            found[name] = self._model_figures(name, evaluation, f"quality-{name}.png", actions)
        return found

    def _model_figures(
        self, name: str, evaluation: Evaluation, picture: str, actions: NDArray[np.int64]
    ) -> SizeFigures:
        figures, sheet = size_figures(evaluation, name, self._report)
        save_contact_sheet(self._options.output / picture, sheet)
        self._report(f"{name}: {self._options.long_frames} frames of k=1 chained")
        drift = measure_drift(evaluation, Schedule.chained(evaluation.model.layout, 1), actions)
        return replace(figures, drift=drift)

    def _compat(self) -> dict[str, list[CompatRow]]:
        options = self._options
        compared = {name: (at, self._evaluation(open_model(at))) for name, at in self._folders.items()}
        for name, (folder, data, *_) in options.worlds.items():
            model = open_model(folder)
            recording = cached_tokens(data, model.encoder)
            compared[name] = (folder, Evaluation(model, recording, None, options.evaluation))
        return {
            name: compat_figures(self._bundle(folder), evaluation, options.compat_windows, self._report)
            for name, (folder, evaluation) in compared.items()
        }

    def _sizes(self) -> dict[str, SizeFigures]:
        found = {}
        for name, folder in self._options.sizes.items():
            evaluation = self._evaluation(open_model(folder), rollouts=self._options.size_rollouts)
            found[name], _ = size_figures(evaluation, name, self._report)
        return found

    def _decoders(self) -> dict[str, DecoderFigures]:
        """Of every world on its users' engine; few windows, as no likelihood of true frames is asked for."""
        options, found = self._options, {}
        few = replace(options.evaluation, windows=2, rollouts=options.decoder_rollouts)
        worlds = {options.model.name: (options.model, options.data, options.geometry), **options.worlds}
        for name, (folder, data, *geometry) in worlds.items():
            bundle = self._bundle(folder)
            model, rules = open_model(bundle), None
            if geometry:
                rules = Geometry.learn(cached_tokens(geometry[0], model.encoder), model.codes)
            evaluation = Evaluation(model, cached_tokens(data, model.encoder), rules, few)
            chosen = options.decoders, options.precisions
            found[name] = decoder_figures(bundle, evaluation, self._report, *chosen)
        return found

    def _training(self) -> dict[str, list[TrainingRow]]:
        trained: dict[str, list[TrainingRow]] = {}
        for name, folder in self._options.training.items():
            world, evaluation = self._evaluation_in_its_world(open_model(folder))
            trained.setdefault(world, []).append(training_row(evaluation, name, self._report))
        return trained

    def _preferences(self) -> dict[str, PreferReport]:
        return {name: read_preferences(path) for name, path in self._options.preferences.items()}

    def _speed(self) -> dict[str, Any]:
        options, folders = self._options, self._folders
        bundles = {name: self._bundle(folder) for name, folder in folders.items()}
        rates = speeds(bundles, options.speed_rounds, options.speed_frames, self._report)
        return {
            "frames_per_second": rates,
            "parameters": {name: parameters(at) for name, at in folders.items()},
        }

    @property
    def _folders(self) -> dict[str, Path]:
        """Of the shipped model and of other sizes."""
        return {SHIPPED_SIZE: self._options.model, **self._options.sizes}

    def _evaluation(self, model: WorldModel, rollouts: int | None = None) -> Evaluation:
        """In the shipped world."""
        options = self._options.evaluation
        chosen = replace(options, rollouts=rollouts or options.rollouts)
        return Evaluation(model, self._recording, self._geometry, chosen)

    def _evaluation_of_any(
        self, model: WorldModel, world: str, data: Path, learned: Path | None = None
    ) -> Evaluation:
        options = self._options
        sized = replace(options.evaluation, windows=options.world_windows, rollouts=options.world_rollouts)
        if world not in self._probes:
            self._probes[world], _ = fit_probe(model, data, learned, PROBE_STEPS)
        return Evaluation(model, cached_tokens(data, model.encoder), None, sized, self._probes[world])

    def _evaluation_in_its_world(self, model: WorldModel) -> tuple[str, Evaluation]:
        """The world whose tokenizer a model has, and its evaluation there."""
        options, its = self._options, model.encoder.digest
        if open_model(options.model).encoder.digest == its:
            return options.model.name, self._evaluation(model)
        for world, (folder, *recordings) in options.worlds.items():
            if open_model(folder).encoder.digest == its:
                return world, self._evaluation_of_any(model, world, *recordings)
        raise UsageError(
            f"a world of --training has the tokenizer of none of {options.model.name}, "
            f"{', '.join(options.worlds)}: train it with --tokenizer of one, or name its --world"
        )

    def _bundle(self, folder: Path) -> Path:
        if folder not in self._bundles:
            self._report(f"exporting {folder.name}")
            self._bundles[folder] = export_world(folder, self._scratch / f"{len(self._bundles)}.diagd")
        return self._bundles[folder]


def diagonal_schedules(layout: StreamLayout) -> list[Schedule]:
    return [named(layout, k) for k in ROW_LAGS for named in (Schedule.serial, Schedule.chained)]


def _gap_row(evaluation: Evaluation, schedule: Schedule, report: Report) -> GapRow:
    name = schedule.name
    report(f"likelihood of {name}")
    gaps = {seed.value: evaluation.gap(replace(schedule, row_seed=seed)) for seed in SEEDS}
    without = evaluation.gap(replace(schedule, refeed=False))
    return GapRow(name, schedule.total_steps(evaluation.options.frames), gaps, without)


def size_figures(evaluation: Evaluation, name: str, report: Report) -> tuple[SizeFigures, Pictures]:
    """Every metric of one size under each schedule, and the pictures of a rollout under each."""
    layout = evaluation.model.layout
    gaps = [_gap_row(evaluation, schedule, report) for schedule in diagonal_schedules(layout)]
    scores, sheet = [], {"truth": pictures(evaluation.model, evaluation.truth[:1])[0]}
    schedules = [Schedule.next_token(layout), *diagonal_schedules(layout)]
    report(f"{name}: rollouts")
    evaluation.rollouts(schedules)
    for schedule in schedules:
        report(f"{name}: {schedule.name}")
        score, rolled = evaluation.score(schedule.name, schedule)
        scores.append(score)
        sheet[score.name] = pictures(evaluation.model, rolled[:1])[0]
    return SizeFigures(gaps, scores), sheet


def compat_figures(bundle: Path, evaluation: Evaluation, windows: int, report: Report) -> list[CompatRow]:
    """Strict and released decoding on the engine, on the first windows of the evaluation."""
    strict, released = BundleModel(str(bundle)), BundleModel(str(bundle), compat="mineworld")
    streams = evaluation.windows[:windows]
    report("strict against compat: NTP")
    baseline = strict.nll(streams, Schedule.next_token(strict.layout))

    def gap(model: BundleModel, schedule: Schedule) -> Estimate:
        return Estimate.of(np.nanmean(model.nll(streams, schedule) - baseline, axis=1))

    rows = []
    for schedule in diagonal_schedules(strict.layout):
        report(f"strict against compat: {schedule.name}")
        bare = replace(schedule, row_seed=RowSeed.DUPLICATE, refeed=False)
        figures = (gap(strict, schedule), gap(strict, bare), gap(released, replace(bare, keep_seeds=True)))
        rows.append(CompatRow(schedule.name, *figures))
    return rows


def training_row(evaluation: Evaluation, name: str, report: Report) -> TrainingRow:
    """Likelihood of one way of training under every schedule, and rollouts by the two ends of them."""
    report(f"'{name}'")
    layout = evaluation.model.layout
    ends = [Schedule.next_token(layout), Schedule.chained(layout, 1)]
    schedules = [*diagonal_schedules(layout), replace(ends[1], refeed=False)]
    gaps = {schedule.name: evaluation.gap(schedule) for schedule in schedules}
    rolled = [evaluation.score(schedule.name, schedule)[0] for schedule in ends]
    return TrainingRow(name, Estimate.of(np.nanmean(evaluation.baseline, axis=1)), gaps, rolled)


def speeds(
    bundles: Mapping[str, Path], rounds: int, frames: int, report: Report
) -> dict[str, dict[str, float]]:
    """Frames per second of each bundle's engine by schedule, pixels not included.

    The bundles take turns, and the median of the rounds counts.
    """
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in bundles}
    sessions = {name: open_session(Bundle.open(path)) for name, path in bundles.items()}
    for turn in range(rounds + 1):  # the first one warms up
        for name, session in sessions.items():
            report(f"speed of {name}, round {turn} of {rounds}")
            schedules = [Schedule.next_token(session.layout), *diagonal_schedules(session.layout)]
            for schedule in schedules:
                rate = _frames_per_second(session, schedule, frames)
                samples[name].setdefault(schedule.name, []).append(rate)
    return {
        name: {schedule: float(np.median(rates[1:])) for schedule, rates in found.items()}
        for name, found in samples.items()
    }


def _frames_per_second(session: Session, schedule: Schedule, frames: int) -> float:
    layout = session.layout
    still = np.full((frames, 1), session.manifest.output_vocabulary, np.int32)
    session.start(np.zeros((1, layout.rows, layout.columns), np.int32), still[:1])
    began = time.perf_counter()
    for _ in session.frames(ScheduledDecoder(schedule), still, sampling=SamplingSettings(1.0, 0, 0.95)):
        pass
    return frames / (time.perf_counter() - began)


def export_world(folder: Path, output: Path) -> Path:
    from diagd.export.exporter import export, open_sources
    from diagd.export.families import find
    from diagd.export.options import GraphOptions

    family = find("world", str(folder))
    return export(family, GraphOptions(), open_sources(family, None, None), output).path


def parameters(folder: Path) -> int:
    return sum(parameter.numel() for parameter in load_world(folder).model.parameters())


def read_preferences(path: Path) -> PreferReport:
    """What `diagd prefer --report` wrote.

    Raises:
        UsageError: it is something else.
    """
    try:
        return TypeAdapter(PreferReport).validate_json(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is no report of diagd prefer: {error}") from error


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
    from matplotlib.figure import Figure

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


def _check_there(options: StudyOptions) -> None:
    """List everything that is read and is not there.

    Raises:
        UsageError: something is not.
    """
    folders = [options.model, options.data, options.geometry]
    folders += [*options.sizes.values(), *options.training.values()]
    folders += [path for paths in options.worlds.values() for path in paths]
    missing = [path for path in folders if not path.is_dir()]
    missing += [path for path in options.preferences.values() if not path.is_file()]
    if missing:
        names = ", ".join(dict.fromkeys(map(str, missing)))
        raise UsageError(
            f"no folders or reports {names}: record and train them, or name others; the "
            "commands are in docs/world.md, under The quality page"
        )


def _check_output(folder: Path) -> None:
    """Find out before the measurements whether figures and page can be written.

    Raises:
        UsageError: they cannot, or other files are in their place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file_target(folder / "quality.json", (".json",), begins=b'{\n "options"')
    file_target(folder / "quality.md", (".md",), begins=b"# Quality of Diagonal Decoding")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, place in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=Path, default=place, help=f"default: {place}")
    parser.add_argument("--size", action="append", default=[], help="NAME=FOLDER of a world of another size")
    parser.add_argument("--training", action="append", default=[], help="NAME=FOLDER trained otherwise")
    parser.add_argument(
        "--world",
        action="append",
        help="NAME=MODEL,DATA[,GEOMETRY] of another world (default: doom-3m, on walks/valid)",
    )
    parser.add_argument(
        "--prefer", action="append", default=[], help="WORLD=REPORT.json that diagd prefer --report wrote"
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="measure this again (default: all)")
    args = parser.parse_args()
    others = _folders(args.world or [])
    options = StudyOptions(
        model=args.model,
        data=args.data,
        geometry=args.geometry,
        output=args.output,
        sizes=_folders(args.size),
        training=_folders(args.training),
        preferences=_folders(args.prefer),
        worlds={name: tuple(map(Path, str(paths).split(","))) for name, paths in others.items()} or SECOND,
        parts=tuple(args.part or PARTS),
    )
    try:
        _check_there(options)
        _check_output(options.output)
    except UsageError as error:
        parser.error(str(error))
    _say(str(Study(options, _say).run()))
