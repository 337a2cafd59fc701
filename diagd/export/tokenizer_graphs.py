"""Writes the encoder and decoder graphs of a video tokenizer and their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from diagd.bundle.manifest import Tokenizer
from diagd.export import weights
from diagd.export.checkpoints import Checkpoint
from diagd.export.known_graphs import traced_once
from diagd.export.tokenizers.base import TokenizerGraphs
from diagd.export.tracing import link_weights, save, trace
from diagd.export.weights import Placement

if TYPE_CHECKING:
    import onnx_ir as ir

WEIGHTS_NAME = "tokenizer.bin"
OPSET = 20
FILES = {"encoder": "encoder.onnx", "decoder": "decoder.onnx"}


def placements(graphs: TokenizerGraphs) -> dict[str, Placement]:
    """Where each tensor of both modules lies in the tokenizer's weights file."""
    return weights.plan(
        {
            name: (tuple(tensor.shape), np.dtype(str(tensor.dtype).removeprefix("torch.")))
            for module in _modules(graphs).values()
            for name, tensor in module.state_dict().items()
        }
    )


def write_tokenizer(
    graphs: TokenizerGraphs, source: Checkpoint, directory: Path, progress: Callable[[int], None]
) -> Tokenizer:
    """Write both graphs beside one weights file.

    ``source``: tensors under the modules' names, checked. ``progress`` is called with bytes written.

    Returns:
        What the manifest records.
    """
    places = placements(graphs)
    sources = {name: weights.copied(source[name]) for name in places}
    weights.write(directory / WEIGHTS_NAME, places, sources, progress)
    for role, module in _modules(graphs).items():
        model = _traced(graphs, role, module)
        link_weights(model, weights.external_tensors(places, WEIGHTS_NAME, directory))
        save(model, directory / FILES[role])
    return Tokenizer(
        **FILES,
        weight_files=(WEIGHTS_NAME,),
        parameters=graphs.parameter_count(),
        height=graphs.height,
        width=graphs.width,
        temporal_factor=graphs.temporal_factor,
        chunk_frames=graphs.chunk_frames,
        cover=graphs.cover,
    )


def _traced(graphs: TokenizerGraphs, role: str, module: nn.Module) -> ir.Model:
    encodes = role == "encoder"
    shape = (graphs.frames(3), graphs.height, graphs.width, 3) if encodes else (3, *graphs.grid)
    source, result = ("pixels", "tokens") if encodes else ("tokens", "pixels")
    example = torch.zeros(shape, dtype=torch.uint8 if encodes else torch.int32, device="meta")
    return traced_once(
        module,
        [role, shape, graphs.temporal_factor],
        lambda: trace(
            module,
            (example,),
            input_names=[source],
            output_names=[result],
            opset=OPSET,
            dynamic_shapes=_dynamic_frames(graphs, role),
        ),
    )


def _modules(graphs: TokenizerGraphs) -> dict[str, nn.Module]:
    with torch.device("meta"):
        modules = {"encoder": graphs.build("Encoder"), "decoder": graphs.build("Decoder")}
    return {role: module.to("meta") for role, module in modules.items()}


def _dynamic_frames(graphs: TokenizerGraphs, role: str) -> tuple[dict[int, object]]:
    if role == "encoder" and graphs.temporal_factor > 1:
        return ({0: graphs.temporal_factor * torch.export.Dim("latents", min=1) + 1},)
    return ({0: torch.export.Dim("frames", min=1)},)
