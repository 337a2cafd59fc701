"""The processor: ONNX Runtime's CPU provider, for every form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from typing_extensions import override

from diagd.bundle import Bundle, Form
from diagd.engines.backend import Backend, Graph, StepOptions, choose_form, graphs_of
from diagd.engines.ceilings import Ceilings, processor_ceilings
from diagd.engines.devices.host import HostDevice
from diagd.engines.engine import Engine
from diagd.engines.executor import Executor
from diagd.engines.fingerprint import graph_digest
from diagd.engines.onnxruntime_program import OnnxRuntimeProgram
from diagd.engines.onnxruntime_session import CpuOptions, open_session
from diagd.engines.prefix import PrefixEngine
from diagd.engines.program import Tensor


class Processor(Backend):
    """Runs the prefix form, whose cost follows the slots in use; the forms of GPUs too, to compare with."""

    name = "cpu"
    forms = (Form.PREFIX, Form.MODERN, Form.PORTABLE)

    @override
    def describe(self) -> str:
        """It needs no name."""
        return ""

    @override
    def open_steps(self, bundle: Bundle, options: StepOptions) -> Engine:
        form = choose_form(bundle, options.form, self.forms)
        if form is Form.PREFIX:
            graphs_of(bundle, form)
            watch, streams = tuple(options.watch or ()), options.streams
            return PrefixEngine(
                bundle, options.slots, options.tokens, options.cpu, watch=watch, streams=streams
            )
        return open_fixed(bundle, form, options)

    @override
    def open_graph(self, path: Path, digest: str, options: CpuOptions) -> Graph:
        session = open_session(path, digest, options)
        names = [output.name for output in session.get_outputs()]
        return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))

    @override
    def ceilings(self, threads: int = 0) -> Ceilings:
        return processor_ceilings(threads)


def open_fixed(
    bundle: Bundle, form: Form, options: StepOptions, device: HostDevice | None = None
) -> Executor:
    """The executor over memory of the host, on one session that runs at every width."""
    graphs = graphs_of(bundle, form)
    widths = tuple(int(graph.width or 0) for graph in graphs)
    cpu = options.cpu.suiting(graphs[0].precision)
    digest = graph_digest(bundle, graphs[0]) if cpu.prepack else ""
    session = open_session(bundle.file(graphs[0].file), digest, cpu)

    def program(tensors: Mapping[str, Tensor]) -> OnnxRuntimeProgram:
        return OnnxRuntimeProgram(session, tensors, widths, "cpu")

    return Executor(
        bundle.manifest,
        form,
        int(graphs[0].capacity or 0),
        widths,
        options.tokens,
        device or HostDevice(),
        program,
        graphs=False,
        watch=options.watch,
        streams=graphs[0].streams,
    )
