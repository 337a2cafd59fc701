"""Engines to verify: every form of a bundle on the processor, or what a backend runs of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from diagd.bundle import Bundle, Form
from diagd.engines.backend import Backend, find, forms_of, graphs_of, names
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.processor import open_fixed
from diagd.errors import UsageError, unknown
from diagd.profiling.tensors import PlainGraph, Tensors, TensorVerdict, capture_feeds, compare_tensors
from diagd.runtime.load import check_window, open_session, session_over, step_options
from diagd.runtime.session import Session


@dataclass(frozen=True)
class Subject:
    """An engine over the graphs of one precision.

    Attributes:
        name: for verdicts.
        bundle: at the precision.
        session: over the engine.
        cpu: for what runs on the processor.
    """

    name: str
    bundle: Bundle
    session: Session
    cpu: CpuOptions

    @property
    def precision(self) -> str:
        """Of the step graph."""
        return self.bundle.manifest.graphs[0].precision

    def tensors(self) -> list[TensorVerdict]:
        """Every output of one step; none for the prefix form, which only ONNX Runtime's processor runs."""
        engine, window = self.session.engine, self.session.window
        if engine.form is Form.PREFIX:
            return []
        options = step_options(self.bundle.manifest, window, cpu=self.cpu)
        with closing(open_fixed(self.bundle, engine.form, options)) as source:
            plain = session_over(self.bundle, source, window, self.cpu)
            feeds = capture_feeds(plain, source, engine.padded_widths)
        reference = PlainGraph(self.bundle.file(graphs_of(self.bundle, engine.form)[0].file))

        def evaluate(arrays: Tensors) -> Tensors:
            return engine.evaluate(arrays, reference.outputs)

        return compare_tensors(self.name, evaluate, reference, feeds, self.precision)

    def close(self) -> None:
        """Give the engine's memory back."""
        self.session.close()


def subjects(bundle: Bundle, name: str | None, window: int, cpu: CpuOptions) -> Iterator[Subject]:
    """Open one engine after the other.

    Args:
        bundle: of any precisions.
        name: of a form or a backend; None: every form, on the processor.
        window: frames a token may see.
        cpu: threads and cache.

    Raises:
        UsageError: there is no such form or backend, or the window does not fit.
        EngineError: there is no GPU, or no engine that fits it.
    """
    check_window(bundle.manifest, window)
    forms = {form.value for form in forms_of(bundle)}
    if name is not None and name not in (*forms, *names()):
        raise unknown(f"engine of {bundle.path}", name, (*forms, *names()))
    if name is None or name in forms:
        return _of_each_form(bundle, name, window, cpu)
    backend = find(name)
    backend.describe()  # without a device there is nothing to say of the bundle
    return of_backend(bundle, backend, window, cpu)


def _of_each_form(bundle: Bundle, name: str | None, window: int, cpu: CpuOptions) -> Iterator[Subject]:
    for one in _precisions(bundle):
        for form in forms_of(one):
            if name in (None, form.value):
                session = open_session(one, window=window, cpu=cpu, form=form)
                yield Subject(f"{form.value} {one.manifest.graphs[0].precision}", one, session, cpu)


def of_backend(bundle: Bundle, backend: Backend, window: int, cpu: CpuOptions) -> Iterator[Subject]:
    """Engines of a backend over every precision that has a graph for it."""
    usable = [one for one in _precisions(bundle) if set(backend.forms) & set(forms_of(one))]
    if not usable:
        forms = " or ".join(form.value for form in backend.forms)
        raise UsageError(f"{bundle.path} has no graph for {backend.name}; export it with --form {forms}")
    for one in usable:
        session = open_session(one, window=window, cpu=cpu, backend=backend)
        yield Subject(f"{backend.name} {one.manifest.graphs[0].precision}", one, session, cpu)


def _precisions(bundle: Bundle) -> list[Bundle]:
    """The bundle at each of its precisions."""
    precisions = dict.fromkeys(graph.precision for graph in bundle.manifest.graphs)
    return [bundle.at_precision(precision) for precision in precisions]
