"""Filling modules with known weights and running their graphs in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from diagd.export.tokenizers.base import TokenizerGraphs
from diagd.export.tracing import save, trace

torch.set_num_threads(1)


def load(module: nn.Module, tensors: dict[str, NDArray[np.float32]]) -> nn.Module:
    """The module with its parameters taken from a checkpoint's tensors."""
    names = module.state_dict().keys()
    module.load_state_dict({name: torch.from_numpy(tensors[name]) for name in names})
    return module.eval()


def modules(graphs: TokenizerGraphs, tensors: dict[str, NDArray[np.float32]]) -> tuple[nn.Module, nn.Module]:
    return load(graphs.build("Encoder"), tensors), load(graphs.build("Decoder"), tensors)


def run(module: nn.Module, values: NDArray[np.generic]) -> NDArray[np.generic]:
    with torch.inference_mode():
        made: NDArray[np.generic] = module(torch.from_numpy(values)).numpy()
        return made


def session(
    module: nn.Module, example: NDArray[np.generic], path: Path, opset: int
) -> onnxruntime.InferenceSession:
    """Export with a free number of frames and open the graph; its tensors are called pixels and tokens."""
    names = ("pixels", "tokens") if example.ndim == 4 else ("tokens", "pixels")
    graph = trace(
        module,
        (torch.from_numpy(example),),
        input_names=names[:1],
        output_names=names[1:],
        opset=opset,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )
    save(graph, {}, path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def frames(count: int, height: int, width: int, seed: int = 1) -> NDArray[np.uint8]:
    """Smooth but not constant video, so that codes vary within a frame."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, -(-height // 4), -(-width // 4), 3))
    fine = coarse.repeat(4, 1).repeat(4, 2)[:, :height, :width] + rng.integers(
        -40, 41, (count, height, width, 3)
    )
    return fine.clip(0, 255).astype(np.uint8)


def worst(left: NDArray[np.generic], right: NDArray[np.generic]) -> int:
    """Largest difference between two arrays of small integers of equal shape."""
    assert left.shape == right.shape
    assert left.dtype == right.dtype
    return int(np.abs(left.astype(np.int64) - right.astype(np.int64)).max())


def check_modules(
    graphs: TokenizerGraphs,
    tensors: dict[str, NDArray[np.float32]],
    pixels: NDArray[np.uint8],
    reference_tokens: Callable[[NDArray[np.generic]], NDArray[np.generic]],
    reference_pixels: Callable[[NDArray[np.generic]], NDArray[np.generic]],
) -> None:
    """Both modules against a reference of one frame."""
    encoder, decoder = modules(graphs, tensors)
    tokens = run(encoder, pixels)
    np.testing.assert_array_equal(tokens, np.stack([reference_tokens(frame) for frame in pixels]))
    assert len(np.unique(tokens)) > 8
    decoded = run(decoder, tokens)
    assert decoded.shape == pixels.shape
    assert worst(decoded, np.stack([reference_pixels(frame) for frame in tokens])) <= 1
    assert decoded.std() > 10


def check_graphs(
    graphs: TokenizerGraphs,
    tensors: dict[str, NDArray[np.float32]],
    pixels: NDArray[np.uint8],
    folder: Path,
    opsets: tuple[int, int],
) -> None:
    """Graphs of encoder and decoder against their modules, on one frame and on all."""
    encoder, decoder = modules(graphs, tensors)
    tokens = run(encoder, pixels)
    to_tokens = session(encoder, pixels[:2], folder / "encoder.onnx", opset=opsets[0])
    to_pixels = session(decoder, tokens[:2], folder / "decoder.onnx", opset=opsets[1])
    for count in (1, len(pixels)):
        (found,) = to_tokens.run(None, {"pixels": pixels[:count]})
        assert worst(found, tokens[:count]) == 0
        (images,) = to_pixels.run(None, {"tokens": tokens[:count]})
        assert worst(images, run(decoder, tokens[:count])) <= 1
