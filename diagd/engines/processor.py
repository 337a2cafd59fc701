"""The processor: ONNX Runtime's CPU provider, for every form; and plainly run, to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from typing_extensions import override

from diagd.bundle import Bundle, Form
from diagd.engines.backend import Backend, Graph, StepOptions, as_graph, choose_form, graphs_of, widths_of
from diagd.engines.ceilings import Ceilings, processor_ceilings
from diagd.engines.devices.host import HostDevice
from diagd.engines.engine import Engine, Float
from diagd.engines.executor import Executor
from diagd.engines.fingerprint import graph_digest
from diagd.engines.onnxruntime_session import CpuOptions, OnnxRuntimeProgram, open_plainly, open_session
from diagd.engines.prefix import PlainPrefix, PrefixEngine
from diagd.errors import BundleError


class Processor(Backend):
    """Runs the prefix form, whose cost follows the slots in use; the forms of GPUs too, to compare with."""

    name = "cpu"
    forms = (Form.PREFIX, Form.MODERN, Form.PORTABLE)

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
        return as_graph(open_session(path, digest, options))

    @override
    def ceilings(self, threads: int = 0) -> Ceilings:
        return processor_ceilings(threads)


def open_fixed(bundle: Bundle, form: Form, options: StepOptions) -> Executor:
    """The executor over memory of the host, on one session that runs at every width."""
    graphs = graphs_of(bundle, form)
    cpu = options.cpu.suiting(graphs[0].precision)
    digest = graph_digest(bundle, graphs[0]) if cpu.prepack else ""
    session = open_session(bundle.file(graphs[0].file), digest, cpu)
    widths = widths_of(graphs)
    bind = partial(OnnxRuntimeProgram, session, widths=widths, kind="cpu")
    return Executor(bundle.manifest, graphs[0], widths, options, HostDevice(), bind)


class ReferenceEngine(PlainPrefix):
    """FP32 on ONNX Runtime's CPU provider with everything off that could go wrong.

    No graph optimisation, no packed weights, no cache in place, no live prefix, one thread: arrays in,
    arrays out, the whole capacity every time. ``max_width`` is another engine's where both are to run the
    same steps.

    Raises:
        BundleError: the bundle has no such graph.
    """

    def __init__(self, bundle: Bundle, capacity: int, tokens: int, max_width: int) -> None:
        manifest = bundle.manifest
        graph = next((g for g in manifest.graphs if g.form is Form.PREFIX and g.precision == "fp32"), None)
        if graph is None:
            raise BundleError(
                f"{bundle.path} has no FP32 graph in the prefix form to compare with; export the same "
                "weights with --form prefix and give that bundle as --reference"
            )
        session = open_plainly(bundle.file(graph.file))
        super().__init__(manifest, capacity, tokens, max_width)
        self._session = session

    @override
    def forward(self, feeds: Mapping[str, NDArray[Any]], live: int) -> Float:
        """The whole capacity, into new buffers."""
        past = {f"past_{name}": buffer[:, None] for name, buffer in self.buffers.items()}
        outputs = self.evaluate({**feeds, **past}, ["logits", *(f"present_{name}" for name in self.buffers)])
        logits = outputs.pop("logits")
        self.buffers = {name: rows[:, 0] for name, rows in zip(self.buffers, outputs.values(), strict=True)}
        return logits
