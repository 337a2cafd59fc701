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
from diagd.engines.external_data import external_data
from diagd.engines.fixed import Array, graphs_of
from diagd.engines.modern import ModernEngine, ModernStep
from diagd.planning.protobuf import encode, fields, message, text

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
    cache_directory().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache_directory()) as folder:
        target = Path(folder)
        for graph in graphs:
            source = bundle.file(graph.file)
            name = f"{source.stem}-without-sampler.onnx"
            (target / name).write_bytes(without_output(source.read_bytes(), SAMPLED))
            for file in external_data(source).files:
                _link(bundle.file(file), target / file)
            renamed.append(graph.model_copy(update={"file": name}))
        _link(bundle.file(MANIFEST_NAME), target / MANIFEST_NAME)
        yield Bundle(target, bundle.manifest.model_copy(update={"graphs": tuple(renamed)}))


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
        model: a ModelProto whose graph (field 7) has its nodes in topological order (ONNX, "Graphs").
        output: name of the output.
    """
    parts = []
    for number, value in fields(memoryview(model)):
        content = value if isinstance(value, int) else bytes(value)
        parts.append(encode(number, _pruned(message(value), output) if number == 7 else content))
    return b"".join(parts)


def _pruned(graph: memoryview, output: str) -> bytes:
    entries = list(fields(graph))
    outputs = {at: _names(value, 1)[0] for at, (number, value) in enumerate(entries) if number == 12}
    needed, dropped = set(outputs.values()) - {output}, {at for at in outputs if outputs[at] == output}
    for at in reversed(range(len(entries))):
        number, node = entries[at]
        if number != 1:
            continue
        if needed.isdisjoint(_names(node, 2)):
            dropped.add(at)
        else:
            needed.update(_names(node, 1))
    kept = (entry for at, entry in enumerate(entries) if at not in dropped)
    return b"".join(encode(n, value if isinstance(value, int) else bytes(value)) for n, value in kept)


def _names(data: int | memoryview, wanted: int) -> list[str]:
    """Strings of one field of a message: inputs (1) and outputs (2) of a node, the name (1) of a value."""
    return [text(value) for number, value in fields(message(data)) if number == wanted]
