"""A bundle to the same bundle with quantised step graphs, accepted by a gate."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

from diagd.bundle import Bundle, Manifest, atomic_bundle, seal
from diagd.bundle.files import link
from diagd.bundle.manifest import MANIFEST_NAME, Form, OwnLikelihood, StepGraph
from diagd.calibration import search, trajectory
from diagd.calibration.evaluate import ATTEMPTS, GATE_SEED, Evaluator, failures, most_harmful, part_of
from diagd.calibration.graph_writer import GraphWriter, file_names
from diagd.calibration.options import CalibrationOptions
from diagd.calibration.report import (
    AttemptReport,
    CacheReport,
    LayerReport,
    PrecisionReport,
    TrajectoryReport,
    WidthReport,
    add_report,
    read_calibration,
    write_plot,
)
from diagd.calibration.search import Choice
from diagd.engines.engine import Float, Int
from diagd.engines.host import available_bytes
from diagd.errors import QualityError, UsageError
from diagd.export.step_graph import projections
from diagd.export.weights import StoredWeights
from diagd.progress import Progress

DIRECTORY = "calibration"
STATISTICS = f"{DIRECTORY}/statistics.npz"


def calibrate(
    bundle: Bundle, options: CalibrationOptions, frames: Int | None = None, progress: Progress | None = None
) -> PrecisionReport:
    """Add quantised graphs to a bundle, in place and all at once.

    Prompts are cut from ``frames``, int32 [P, rows, columns], which follow each other.

    Raises:
        UsageError: the bundle has the precision already or no graph that can have it, there are no frames for
            a trained model, too few steps, or a name is unknown.
        QualityError: an activation is not finite, or the result is outside the budget; the bundle is
            unchanged, and the error carries the report.
    """
    _check(bundle, options, frames)
    with _workspace(bundle) as (current, copy):
        reference, samples = _check(current, options, frames)
        work = _Calibration(copy, options, reference, samples, progress or Progress())
        report = work.run()
        if report.failures:
            raise RejectedError(report)
        seal(copy.path, work.manifest())
    return report


@contextmanager
def _workspace(bundle: Bundle) -> Iterator[tuple[Bundle, Bundle]]:
    """The bundle as it is once other writers are done, and a copy with every large file linked, not copied.

    Only the manifest of the copy may be written over. What is no file of the manifest comes along once the
    work is done: compiled engines, and whatever the user put there.
    """
    with atomic_bundle(bundle.path, "bundle") as directory:
        current = Bundle.seen(bundle.path)
        for name in current.manifest.files:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            link(current.file(name).resolve(), directory / name)
        shutil.copyfile(current.file(MANIFEST_NAME), directory / MANIFEST_NAME)
        yield current, Bundle(directory, current.manifest)


class RejectedError(QualityError):
    """A quantised model outside its budget; ``report`` says how far."""

    def __init__(self, report: PrecisionReport) -> None:
        super().__init__(
            f"{report.precision} is outside its budget with {len(report.excluded)} of {len(report.layers)} "
            f"products in floating point: {'; '.join(report.failures)}; the bundle is unchanged. "
            "Choose another --precision, or allow more with --budget"
        )
        self.report = report


def _check(
    bundle: Bundle, options: CalibrationOptions, frames: Int | None
) -> tuple[tuple[StepGraph, ...], trajectory.CalibrationSet]:
    """The graphs that others are compared with, and what is decoded."""
    manifest, scheme = bundle.manifest, options.scheme
    read_calibration(bundle.file(DIRECTORY))  # ahead of all work, as a new report is added to it
    search.check_kv_cache(bundle, options)
    if any(graph.precision == options.name for graph in manifest.graphs):
        raise UsageError(f"{bundle.path} has {options.name} graphs already; export it again to start afresh")
    reference = trajectory.find_reference(bundle, search.CACHE_FORMS if options.kv_cache else Form)
    window = trajectory.session_window(manifest, reference)
    decoded = trajectory.trajectories(manifest, window, options.steps, trajectory.widest_step(reference))
    refusal = options.refusal(reference[0].form)
    if refusal and options.kv_cache is None:
        raise UsageError(
            f"{bundle.path} has no prefix graph: {refusal}; export it again with --form prefix too"
        )
    watches = scheme.scaling == "static" or options.kv_cache is not None
    engines = 2 if options.budget else int(watches)
    trajectory.check_memory(bundle, reference[0], engines, available_bytes())
    if engines and frames is None and manifest.provenance.random_seed is None:
        raise UsageError(
            f"{manifest.name} is a trained model: its ranges and its quality need real frames; "
            "give --data VIDEO or --data TOKENS.npy"
        )
    return reference, trajectory.CalibrationSet(decoded, window, options.seed, frames)


class _Calibration:
    """One run over a writable copy of a bundle."""

    def __init__(
        self,
        bundle: Bundle,
        options: CalibrationOptions,
        reference: Sequence[StepGraph],
        samples: trajectory.CalibrationSet,
        progress: Progress,
    ) -> None:
        self._bundle, self._scheme, self._options = bundle, options.scheme, options
        self._reference, self._samples, self._progress = reference, samples, progress
        self._choices: dict[str, Choice] = {}
        self._layers: list[LayerReport] = []
        self._cache: CacheReport | None = None
        self._graphs: tuple[StepGraph, ...] = ()
        self._widths: dict[int, WidthReport] = {}
        self._likelihoods: list[OwnLikelihood] = []

    def run(self) -> PrecisionReport:
        """Statistics, search, graphs, gate, report."""
        directory = self._bundle.path / DIRECTORY
        directory.mkdir(exist_ok=True)
        statistics, options, manifest = self._statistics(), self._options, self._bundle.manifest
        scales: Mapping[str, Float] = {}
        if options.kv_cache is not None:
            scales = search.row_scales(statistics, manifest)
            self._cache = search.describe_cache(scales, statistics, manifest, options.kv_cache)
        self._choose(statistics)
        writer = GraphWriter(self._bundle, options, scales, self._progress)
        written, attempts = self._judged(writer)
        if not attempts or not attempts[-1].failures:
            graphs = writer.write_others(written, self._choices)
            self._graphs = tuple(graph for graph in graphs if options.refusal(graph.form) is None)
        report = self._report(written, attempts)
        add_report(directory, manifest.name, report)
        write_plot(manifest.name, report, directory)
        if options.refusal(self._reference[0].form):  # it only stood for others, whose cache it cannot have
            for name in file_names(self._reference[0].file, options.name):
                self._bundle.file(name).unlink(missing_ok=True)
        return report

    def manifest(self) -> Manifest:
        """The manifest with the new graphs."""
        known = self._bundle.manifest
        likelihoods = (*known.likelihoods, *self._likelihoods)
        return known.model_copy(update={"graphs": (*known.graphs, *self._graphs), "likelihoods": likelihoods})

    def _statistics(self) -> Mapping[str, search.InputStatistics]:
        """Gathered now, or by an earlier run where the scheme can do with those, or none."""
        path = self._bundle.path / STATISTICS
        if self._scheme.scaling != "static" and self._options.kv_cache is None:
            return search.load_statistics(path) if path.is_file() else {}
        threads = self._options.threads
        seen = search.observe(self._bundle, self._reference, self._samples, self._progress, threads)
        search.save_statistics(path, seen)
        return seen

    def _choose(self, statistics: Mapping[str, search.InputStatistics]) -> None:
        """What becomes of each product; those below the floor are left out."""
        stored, found = StoredWeights(self._bundle), projections(self._bundle.manifest.transformer)
        floor = self._scheme.floor if self._options.floor is None else self._options.floor
        grouped = self._scheme.scaling is None and self._reference[0].form.traits.host
        for projection in self._progress.each(found, "searching"):
            choice = search.search(
                projection,
                stored[projection.name],
                statistics.get(projection.name),
                self._scheme,
                grouped=grouped,
            )
            if choice.signal_to_noise >= floor:
                self._choices[projection.name] = choice
            report = LayerReport(
                name=projection.name,
                inputs=projection.inputs,
                outputs=projection.outputs,
                signal_to_noise=choice.signal_to_noise,
                alpha=choice.alpha,
                range=choice.limit,
                excluded=None if projection.name in self._choices else "floor",
            )
            self._layers.append(report)

    def _judged(self, writer: GraphWriter) -> tuple[tuple[StepGraph, ...], list[AttemptReport]]:
        """Graphs of the reference's form inside the budget, or as near as giving up products brings them."""
        budget, attempts = self._options.budget, list[AttemptReport]()
        if budget is None:
            return writer.write(self._reference, self._choices), attempts
        threads, weight = self._options.threads, self._scheme.kind
        evaluator = Evaluator(self._bundle, self._reference, self._samples, threads, self._progress)
        self._measure_layers(writer, evaluator)
        while True:
            written = writer.write(self._reference, self._choices)
            figures, widths = evaluator.compare(written, weight, budget)
            outside = tuple(failures(figures, budget))
            excluded = len(self._layers) - len(self._choices)
            attempts.append(AttemptReport(excluded=excluded, figures=figures, failures=outside))
            if not outside or len(attempts) == ATTEMPTS or not self._choices:
                self._widths = evaluator.step_times(written, weight, widths)
                if not outside:
                    self._measure_likelihoods(evaluator, written)
                return written, attempts
            self._fall_back()

    def _measure_likelihoods(self, evaluator: Evaluator, written: tuple[StepGraph, ...]) -> None:
        """Of what is new, and of the reference where no calibration did; a text is its user's to give."""
        manifest = self._bundle.manifest
        if manifest.text:
            return
        known = {own.precision for own in manifest.likelihoods}
        for graphs, weight in ((self._reference, "fp32"), (written, self._scheme.kind)):
            if graphs[0].precision not in known:
                self._likelihoods.append(evaluator.own_likelihood(graphs, weight))

    def _fall_back(self) -> None:
        harmful = set(most_harmful(self._layers))
        self._choices = {name: choice for name, choice in self._choices.items() if name not in harmful}
        self._layers = [
            layer.model_copy(update={"excluded": "gate"}) if layer.name in harmful else layer
            for layer in self._layers
        ]

    def _measure_layers(self, writer: GraphWriter, evaluator: Evaluator) -> None:
        """Quantise one layer at a time and note the divergence of the predictions."""
        parts = writer.parts(self._reference, self._choices)
        count = len(set(map(part_of, self._choices)))
        with closing(parts):
            found = evaluator.layers(parts, count, self._scheme.kind)
        self._layers = [
            layer.model_copy(update={"divergence": found.get(part_of(layer.name))}) for layer in self._layers
        ]

    def _report(self, written: Sequence[StepGraph], attempts: Sequence[AttemptReport]) -> PrecisionReport:
        options, forms = self._options, {g.form for g in self._bundle.manifest.graphs}
        refusals = {form.value: options.refusal(form) for form in sorted(forms)}
        return PrecisionReport(
            precision=options.name,
            reference=self._reference[0].precision,
            seed=options.seed,
            gate_seed=options.seed + GATE_SEED,
            trajectories=tuple(
                TrajectoryReport(name=t.name, k=t.schedule.k, d=t.schedule.d, steps=t.steps)
                for t in self._samples.trajectories
            ),
            budget=options.budget,
            attempts=tuple(attempts),
            bytes_before=self._reference[0].weights.bytes,
            bytes_after=written[0].weights.bytes,
            widths=self._widths,
            forms={graph.form.value: graph.file for graph in self._graphs},
            left_out={form: reason for form, reason in refusals.items() if reason},
            layers=tuple(self._layers),
            kv_cache=self._cache,
        )
