"""Engines to verify: every form of a bundle on the processor, or one backend of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diagd.bundle import Bundle, Form
from diagd.engines.cuda.engine import DeviceEngine
from diagd.engines.engine import Engine
from diagd.engines.fixed import graphs_of
from diagd.engines.gpu import BACKENDS
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError, unknown
from diagd.profiling.engines import forms_of, open_engine, session_over
from diagd.profiling.targets import DeviceTarget, gpu_target
from diagd.profiling.tensors import TensorVerdict, capture_feeds, compare_tensors, on_device, plain

FIXED = (Form.MODERN, Form.PORTABLE)


@dataclass(frozen=True)
class Subject:
    """An engine over the graphs of one precision.

    Attributes:
        name: for verdicts.
        bundle: at the precision.
        form: of its step graph.
        engine: gives logits.
        window: frames a token may see.
        cpu: for what runs on the processor.
    """

    name: str
    bundle: Bundle
    form: Form
    engine: Engine
    window: int
    cpu: CpuOptions

    @property
    def precision(self) -> str:
        """Of the step graph."""
        return self.bundle.manifest.graphs[0].precision

    def tensors(self) -> list[TensorVerdict]:
        """Every output of one step; none for the prefix form, which only ONNX Runtime's processor runs."""
        if self.form is Form.PREFIX:
            return []
        graph = self.bundle.file(graphs_of(self.bundle, self.form)[0].file)
        source = open_engine(self.bundle, self.form, self.window, self.cpu)
        feeds = capture_feeds(
            session_over(self.bundle, source, self.window, self.cpu), self.engine.padded_width
        )
        device = self.engine if isinstance(self.engine, DeviceEngine) else None
        evaluate = on_device(device, graph) if device else plain(graph, optimise=True)
        return compare_tensors(self.name, evaluate, graph, feeds, self.precision)

    def close(self) -> None:
        """Free what is on a device."""
        if isinstance(self.engine, DeviceEngine):
            self.engine.close()


def subjects(bundle: Bundle, name: str | None, window: int, cpu: CpuOptions) -> Iterator[Subject]:
    """Open one engine after the other.

    Args:
        bundle: of any precisions.
        name: of a form or a backend; None: every form.
        window: frames a token may see.
        cpu: threads and cache.

    Raises:
        UsageError: there is no such form or backend, or the window does not fit.
        EngineError: there is no GPU, or no engine that fits it.
    """
    forms = {form.value for form in forms_of(bundle)}
    if name is not None and name not in (*forms, *BACKENDS):
        raise unknown(f"engine of {bundle.path}", name, (*forms, *BACKENDS))
    precisions = dict.fromkeys(graph.precision for graph in bundle.manifest.graphs)
    kept = [bundle.at_precision(precision) for precision in precisions]
    if name in BACKENDS:
        return on_gpu(kept, gpu_target(name, cpu), name, window)
    return _on_processor(kept, name, window, cpu)


def _on_processor(bundles: list[Bundle], name: str | None, window: int, cpu: CpuOptions) -> Iterator[Subject]:
    for bundle in bundles:
        for form in forms_of(bundle):
            if name in (None, form.value):
                engine = open_engine(bundle, form, window, cpu)
                title = f"{form.value} {bundle.manifest.graphs[0].precision}"
                yield Subject(title, bundle, form, engine, window, cpu)


def on_gpu(bundles: list[Bundle], target: DeviceTarget, name: str, window: int) -> Iterator[Subject]:
    """Engines of a target over every precision that has a graph for GPUs."""
    usable = [bundle for bundle in bundles if set(FIXED) & set(forms_of(bundle))]
    if not usable:
        raise UsageError(f"{bundles[0].path} has no graph for GPUs; export it with --form modern or portable")
    for bundle in usable:
        session = target.open(bundle, window)
        engine = session.engine
        assert isinstance(engine, DeviceEngine)
        engine.keep_logits = True
        title = f"{name} {bundle.manifest.graphs[0].precision}"
        yield Subject(title, bundle, engine.form, engine, window, target.cpu)
