"""The ``modern`` form with its sampler taken out, to measure what sampling in the graph is worth."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from diagd.bundle import Bundle, Form, cache_directory
from diagd.bundle.manifest import MANIFEST_NAME
from diagd.engines.fixed import Array, graphs_of
from diagd.engines.modern import ModernEngine, ModernStep

SAMPLED = "next_token_buffer"
"""Output of the sampler."""


class HostSamplingStep(ModernStep):
    """Leaves the tokens to the host."""

    def outputs(self) -> dict[str, Array]:
        """The logits and the K/V buffers."""
        return {name: array for name, array in super().outputs().items() if name != SAMPLED}


class HostSamplingEngine(ModernEngine):
    """Gives back logits for the sampler of the host; its graphs come from ``without_sampler``."""

    samples_in_graph = False
    step_type = HostSamplingStep


@contextmanager
def without_sampler(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle with ``modern`` graphs that end at the logits, over links of its weights.

    ONNX Runtime follows no symbolic link out of a graph's folder, so that these are hard links, or copies
    where the cache directory lies on another file system.

    Raises:
        BundleError: it has no such graphs.
        OSError: there is no room.
    """
    graphs, renamed = graphs_of(bundle, Form.MODERN), []
    with _temporary_folder() as folder:
        target = Path(folder)
        for graph in graphs:
            source = bundle.file(graph.file)
            name = f"{source.stem}-without-sampler.onnx"
            (target / name).write_bytes(without_output(source.read_bytes(), SAMPLED))
            for file in graph.weights.files:
                _link(bundle.file(file), target / file)
            renamed.append(graph.model_copy(update={"file": name}))
        _link(bundle.file(MANIFEST_NAME), target / MANIFEST_NAME)
        yield Bundle(target, bundle.manifest.model_copy(update={"graphs": tuple(renamed)}))


def _temporary_folder() -> TemporaryDirectory[str]:
    """In the cache, which likely shares a disk with bundles; else where the system puts such."""
    try:
        if place := cache_directory():
            place.mkdir(parents=True, exist_ok=True)
            return TemporaryDirectory(dir=place)
    except OSError:
        pass
    return TemporaryDirectory()


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def without_output(model: bytes, output: str) -> bytes:
    """An ONNX model without one of its outputs, and without the nodes that only it needed.

    Args:
        model: a ModelProto whose graph has its nodes in topological order (ONNX, "Graphs").
        output: name of the output.
    """
    import onnx

    whole = onnx.load_from_string(model)
    outputs = [value for value in whole.graph.output if value.name != output]
    needed, nodes = {value.name for value in outputs}, []
    for node in reversed(whole.graph.node):
        if not needed.isdisjoint(node.output):
            nodes.append(node)
            needed.update(node.input)
    del whole.graph.output[:], whole.graph.node[:]
    whole.graph.output.extend(outputs)
    whole.graph.node.extend(reversed(nodes))
    return bytes(whole.SerializeToString())
