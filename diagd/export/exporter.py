"""A checkpoint to a bundle: stream the weights, trace the graphs, seal the directory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from diagd.bundle import Bundle, atomic_bundle, put_prompts, seal
from diagd.bundle.manifest import (
    CacheShape,
    GraphWeights,
    Manifest,
    Provenance,
    StepGraph,
    TextConditioning,
    Tokenizer,
    sliding_context,
)
from diagd.bundle.precision import FLOATING, PRECISIONS
from diagd.bundle.targets import bundle_target
from diagd.errors import CheckpointError, UsageError
from diagd.export import weights
from diagd.export.checkpoints import Checkpoint, RandomCheckpoint, check, open_checkpoint, select
from diagd.export.families import TOLD, Family
from diagd.export.known_graphs import traced_once
from diagd.export.onnx_file import read_onnx
from diagd.export.options import GraphOptions
from diagd.export.step_graph import step_tensors, trace_step, trace_text
from diagd.export.tokenizers.base import TokenizerGraphs
from diagd.export.tracing import save
from diagd.export.transformer import position_tables
from diagd.export.weights import WEIGHTS_NAME, Placement, ResumableWeights, WeightSource
from diagd.progress import Progress
from diagd.schedule import default_widths, fixed_slots
from diagd.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir

TEXT_GRAPH = "text.onnx"

TOKENIZER_WEIGHTS, TOKENIZER_OPSET = "tokenizer.bin", 20
TOKENIZER_FILES = {"encoder": "encoder.onnx", "decoder": "decoder.onnx"}

TRACING_BYTES = 700_000_000
"""Memory of PyTorch, the exporter and a traced graph, whatever the model (measured)."""

BYTES_PER_ELEMENT = 8
"""Memory while a matrix is transposed: as float32, and as the checkpoint maps it."""

TORCH_TYPES: dict[str, torch.dtype] = {name: getattr(torch, PRECISIONS[name].kind) for name in FLOATING}
"""Elements of weights and K/V rows by the name of the precision."""


@dataclass(frozen=True)
class Sources:
    """Checkpoints under the family's names; without a tokenizer the bundle has no pixel graphs."""

    transformer: Checkpoint
    tokenizer: Checkpoint | None = None
    random_seed: int | None = None


@dataclass(frozen=True)
class ExportPlan:
    """What an export would write: bytes by file, and the most memory it takes."""

    files: Mapping[str, int]
    peak_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of the bundle."""
        return sum(self.files.values())


class Exporter:
    """Writes bundles of one model, with graphs of pixels where the family has a tokenizer."""

    def __init__(self, family: Family, options: GraphOptions) -> None:
        self.family, self.options = family, options
        self._dtype: np.dtype[np.generic] = np.dtype(PRECISIONS[options.precision].kind)
        self._graphs = self._step_graphs()
        self._placements = weights.plan(step_tensors(family.transformer, self._dtype))

    def plan(self) -> ExportPlan:
        """Sizes and memory, from dimensions alone."""
        graph_bytes = 40_000 + 12_000 * self.family.transformer.layers
        files = {WEIGHTS_NAME: weights.total_bytes(self._placements)}
        files |= {graph.file: graph_bytes for graph in self._graphs}
        if self.family.transformer.text:
            files[TEXT_GRAPH] = graph_bytes
        if self.family.tokenizer:
            places = _tokenizer_placements(self.family.tokenizer)
            files[TOKENIZER_WEIGHTS] = weights.total_bytes(places)
            files |= dict.fromkeys(TOKENIZER_FILES.values(), 20_000)
        largest = max(np.prod(p.shape, dtype=np.int64) for p in self._placements.values())
        return ExportPlan(files, TRACING_BYTES + int(largest) * BYTES_PER_ELEMENT)

    def run(self, sources: Sources, output: Path, progress: Progress) -> Manifest:
        """Write the bundle at ``output``; one that is there is replaced when everything is written.

        Nothing is left of a failed attempt. One that is interrupted leaves its weights beside the bundle,
        hidden: the same export goes on with them.

        Raises:
            CheckpointError: the checkpoint does not fit.
            UsageError: the disk has not enough room, or something other than a bundle is there.
        """
        place = bundle_target(output)
        self.check(sources)
        self._check_disk(output)
        with ExitStack() as until_in_place, atomic_bundle(place) as directory:
            partial = ResumableWeights(place, weights.export_key(sources.transformer, self._placements))
            until_in_place.enter_context(partial)
            self._write_weights(partial, sources.transformer, progress)
            manifest = self._write_rest(directory, partial, sources, progress)
            if self.family.prompts is not None:
                put_prompts(self.family.prompts, directory, place)
            return manifest

    def check(self, sources: Sources) -> None:
        """Raise CheckpointError where tensors do not fit; none is read."""
        check(sources.transformer, self.family.expected)
        if self.family.tokenizer and sources.tokenizer is not None:
            if not sources.tokenizer:
                raise CheckpointError(
                    f"{sources.tokenizer.source} holds no tokenizer of {self.family.name}; give --set "
                    "tokenizer=FILE, or --set tokenizer=none to leave the pixel graphs out"
                )
            check(sources.tokenizer, self.family.tokenizer.expected_shapes(), also=("uint8",))

    def _write_rest(
        self, directory: Path, partial: ResumableWeights, sources: Sources, progress: Progress
    ) -> Manifest:
        """Graphs, tokenizer, the weights and the manifest."""
        config, dtype = self.family.transformer, TORCH_TYPES[self.options.precision]
        tensors = weights.external_tensors(self._placements, WEIGHTS_NAME, partial.path.parent)
        files = {graph.file: graph for graph in self._graphs}  # one file serves every width
        for graph in progress.each(list(files.values()), "tracing step graphs"):
            capacity, streams = graph.capacity or 0, graph.streams
            traced = trace_step(config, graph.form, dtype=dtype, capacity=capacity, streams=streams)
            save(traced, tensors, directory / graph.file)
        read = {file: read_onnx(directory / file).weights for file in files}
        if config.text:
            traced = trace_text(config, dtype)
            save(traced, tensors, directory / TEXT_GRAPH)
        tokenizer = None
        if self.family.tokenizer and sources.tokenizer is not None:
            tokenizer = write_tokenizer(self.family.tokenizer, sources.tokenizer, directory, progress)
        partial.place(directory / WEIGHTS_NAME)
        with progress.task("hashing"):
            return seal(directory, self._manifest(sources, read, tokenizer))

    def _step_graphs(self) -> list[StepGraph]:
        """Records of the graphs to be, whose weights are not known yet."""
        layout = self.family.transformer.layout
        frames = self.family.transformer.context_frames
        window = frames if self.options.window is None else self.options.window
        if window != frames and not 2 <= window <= frames:
            raise UsageError(f"window {window} is outside 2..{frames}, the context of {self.family.name}")
        widths = sorted(self.options.widths or default_widths(layout))
        streams = self.options.streams
        capacity = fixed_slots(layout, window, widths[-1], streams)
        unknown = GraphWeights(files=(), streamed=0, looked_up=0)
        return [
            StepGraph(
                file=f"step.{form.value}.onnx" if form.traits.fixed else "step.onnx",
                form=form,
                precision=self.options.precision,
                weights=unknown,
                width=width,
                capacity=capacity if form.traits.fixed else None,
                streams=streams if form.traits.fixed else 1,
            )
            for form in sorted(dict.fromkeys(self.options.forms), key=lambda form: form.traits.fixed)
            for width in (widths if form.traits.fixed else [None])
        ]

    def _check_disk(self, output: Path) -> None:
        needed = self.plan().total_bytes
        parent = next(p for p in (output.absolute(), *output.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise UsageError(
                f"the bundle needs {needed / 1e9:.2f} GB at {parent}, {free / 1e9:.2f} GB are free; "
                "free some space or give another --output"
            )

    def _write_weights(self, partial: ResumableWeights, source: Checkpoint, progress: Progress) -> None:
        sources: dict[str, WeightSource] = {
            f"transformer.{name}": weight for name, weight in self.family.weights(source).items()
        }
        for name, table in position_tables(self.family.transformer).items():
            sources[f"transformer.{name}"] = weights.constant(table.numpy())
        total = sum(p.length for p in self._placements.values())
        with progress.bytes("weights", total) as advance:
            weights.write(partial.path, self._placements, sources, advance, partial.done, partial.finished)
        partial.sync()

    def _manifest(
        self,
        sources: Sources,
        read: Mapping[str, GraphWeights],
        tokenizer: Tokenizer | None,
    ) -> Manifest:
        family, config, source = self.family, self.family.transformer, sources.transformer.source
        return Manifest(
            **{name: getattr(family, name) for name in TOLD},
            context=sliding_context(config),
            cache=CacheShape(
                layers=config.layers,
                kv_heads=config.kv_heads,
                head_size=config.head_size,
                dtype=self._dtype.name,
            ),
            tokenizer=tokenizer,
            text=TextConditioning(
                graph=TEXT_GRAPH,
                weight_files=(WEIGHTS_NAME,),
                length=config.text.length,
                width=config.text.width,
            )
            if config.text
            else None,
            graphs=tuple(g.model_copy(update={"weights": read[g.file]}) for g in self._graphs),
            provenance=Provenance(
                source=weights.shown_source(source),
                digest=weights.source_digest(source),
                diagd_version=__version__,
                random_seed=sources.random_seed,
            ),
        )


def _tokenizer_placements(graphs: TokenizerGraphs) -> dict[str, Placement]:
    """Where each tensor of both modules lies in the tokenizer's weights file."""
    return weights.plan(
        {
            name: (tuple(tensor.shape), np.dtype(str(tensor.dtype).removeprefix("torch.")))
            for module in graphs.modules().values()
            for name, tensor in module.state_dict().items()
        }
    )


def write_tokenizer(
    graphs: TokenizerGraphs, source: Checkpoint, directory: Path, progress: Progress
) -> Tokenizer:
    """Write the encoder and decoder graphs of a tokenizer beside one weights file.

    ``source``: tensors under the modules' names, checked.

    Returns:
        What the manifest records.
    """
    places = _tokenizer_placements(graphs)
    sources = {name: weights.copied(source[name]) for name in places}
    with progress.bytes("tokenizer", sum(p.length for p in places.values())) as advance:
        weights.write(directory / TOKENIZER_WEIGHTS, places, sources, advance)
    tensors = weights.external_tensors(places, TOKENIZER_WEIGHTS, directory)
    for role, module in graphs.modules().items():
        save(_traced_tokenizer(graphs, role, module), tensors, directory / TOKENIZER_FILES[role])
    return Tokenizer(
        **TOKENIZER_FILES,
        weight_files=(TOKENIZER_WEIGHTS,),
        parameters=graphs.parameter_count(),
        height=graphs.height,
        width=graphs.width,
        temporal_factor=graphs.temporal_factor,
        chunk_frames=graphs.chunk_frames,
        cover=graphs.cover,
    )


def _traced_tokenizer(graphs: TokenizerGraphs, role: str, module: nn.Module) -> ir.Model:
    encodes = role == "encoder"
    shape = (graphs.frames(3), graphs.height, graphs.width, 3) if encodes else (3, *graphs.grid)
    source, result = ("pixels", "tokens") if encodes else ("tokens", "pixels")
    example = torch.zeros(shape, dtype=torch.uint8 if encodes else torch.int32, device="meta")
    frames: object = torch.export.Dim("frames", min=1)
    if encodes and graphs.temporal_factor > 1:
        frames = graphs.temporal_factor * torch.export.Dim("latents", min=1) + 1
    return traced_once(
        module,
        (example,),
        input_names=[source],
        output_names=[result],
        opset=TOKENIZER_OPSET,
        dynamic_shapes=({0: frames},),
    )


def random_sources(family: Family, seed: int) -> Sources:
    """Random weights for latency work; the same bytes for the same seed."""
    tokenizer = family.tokenizer
    return Sources(
        RandomCheckpoint(family.expected, seed=seed),
        RandomCheckpoint(tokenizer.expected_shapes(), seed=seed) if tokenizer else None,
        seed,
    )


def open_sources(family: Family, checkpoint: str | None, tokenizer: str | None) -> Sources:
    """Tensors of a released or trained model.

    ``checkpoint`` is a file, folder or ``hf://`` address; None: the family's own. ``tokenizer`` likewise;
    None: the family's own, else the checkpoint itself.

    Raises:
        UsageError: the family ships no weights and none are given.
        CheckpointError: a file cannot be read.
    """
    chosen = family.default_checkpoint if checkpoint is None else checkpoint
    if chosen is None:
        raise UsageError(
            f"{family.name} has no weights of its own ({family.origin}); give --checkpoint FILE, "
            "or --random-weights to measure latency"
        )
    opened = open_checkpoint(chosen)
    images = None
    if family.tokenizer:
        other = family.default_tokenizer if tokenizer is None else tokenizer
        images = select(open_checkpoint(other) if other is not None else opened, family.tokenizer.rename)
    return Sources(select(opened, family.rename), images)


def export(
    family: Family, options: GraphOptions, sources: Sources, output: Path, progress: Progress | None = None
) -> Bundle:
    """Export a model to ``output``; see ``Exporter.run``."""
    written = family if sources.tokenizer is not None else replace(family, tokenizer=None)
    return Bundle(output, Exporter(written, options).run(sources, output, progress or Progress()))
