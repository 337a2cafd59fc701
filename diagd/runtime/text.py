"""Text that a model attends to: from a file of embeddings to the keys and values of every layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, Manifest
from diagd.bundle.manifest import TextConditioning
from diagd.engines.backend import Backend, find
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError, require
from diagd.runtime.arrays import read_array

Float = NDArray[np.float32]


class TextReader:
    """Runs a bundle's text graph."""

    def __init__(
        self, bundle: Bundle, spec: TextConditioning, options: CpuOptions, backend: Backend | None = None
    ) -> None:
        self.spec, self._backend = spec, backend or find("cpu")
        self._bundle, self._options = bundle, options

    def rows(self, text: Float) -> dict[str, NDArray[np.generic]]:
        """Keys and values [kv_heads, length, head_size] by graph input, for embeddings that fit.

        The graph is loaded for the call: a text is read once for a clip.
        """
        length, width = self.spec.length, self.spec.width
        filled = np.zeros((length, width), np.float32)
        filled[: len(text)] = text
        bundle, names = self._bundle, (self.spec.graph, *self.spec.weight_files)
        bundle.check_unchanged(*names)
        graph = self._backend.open_graph(bundle.file(names[0]), bundle.digest_of(*names), self._options)
        return graph({"text": filled})


def check_text(manifest: Manifest, text: Float | None) -> None:
    """Refuse (UsageError) embeddings float32 [n, width] that do not fit a model: any where it has no text."""
    spec, name = manifest.text, manifest.name
    if spec is None:
        if text is not None:
            raise UsageError(f"{name} attends to no text; leave it out")
        return
    length, width = spec.length, spec.width
    if text is None:
        raise UsageError(f"{name} needs text embeddings [n, {width}], n up to {length}: --set text=FILE")
    if np.shape(text)[1:] != (width,) or not 1 <= len(text) <= length:
        raise UsageError(
            f"text embeddings have shape {list(np.shape(text))}; this model takes [n, {width}] with n from 1 "
            f"to {length}"
        )
    if not np.isfinite(text).all():
        raise UsageError("text embeddings hold nan or infinity; expected finite numbers")


def read_embeddings(path: Path) -> Float:
    """Embeddings float32 [n, width] from a .npy file, or the one tensor of a .safetensors file.

    Raises:
        UsageError: the file cannot be read, holds no matrix or more than one tensor, or is not finite.
    """
    try:
        found = _tensors(path)
    except (OSError, ValueError, EOFError, UsageError) as error:
        raise UsageError(
            f"{path} holds no text embeddings: {error}; expected .npy or .safetensors"
        ) from error
    if len(found) != 1:
        raise UsageError(f"{path} holds {len(found)} tensors; expected one, text embeddings [n, width]")
    with np.errstate(over="ignore"):  # what is too large is infinite, which is refused
        text = np.ascontiguousarray(found[0], dtype=np.float32)
    text = text[0] if text.ndim == 3 and len(text) == 1 else text
    if text.ndim != 2 or not np.isfinite(text).all():
        raise UsageError(
            f"{path} holds an array of shape {list(text.shape)}; expected finite text embeddings [n, width]"
        )
    return text


def _tensors(path: Path) -> list[NDArray[np.generic]]:
    if path.suffix.lower() != ".safetensors":
        return [read_array(path, "text embeddings")]
    safetensors = require("safetensors", extra="export", purpose="read .safetensors files")
    try:
        with safetensors.safe_open(path, "np") as file:
            return [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
