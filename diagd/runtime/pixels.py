"""Pixels to tokens and back through a bundle's tokenizer graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle
from diagd.bundle.manifest import Tokenizer
from diagd.engines.backend import Backend, Graph, find
from diagd.engines.engine import Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError

Pixels = NDArray[np.uint8]


class PixelCodec:
    """Encoder and decoder, each loaded when first used; memory is that of one call's chunk.

    Args:
        bundle: checked bundle that has a tokenizer.
        options: for what runs on the processor.
        backend: runs the graphs; default: the processor.

    Raises:
        UsageError: the bundle has no tokenizer.
    """

    def __init__(self, bundle: Bundle, options: CpuOptions, backend: Backend | None = None) -> None:
        if bundle.manifest.tokenizer is None:
            raise UsageError(
                f"{bundle.path} has no tokenizer graphs; give the prompt and take the output as .npy tokens, "
                "or export again with the tokenizer"
            )
        self.spec: Tokenizer = bundle.manifest.tokenizer
        self._bundle, self._options, self._backend = bundle, options, backend or find("cpu")
        self._graphs: dict[str, Graph] = {}

    def encode(self, pixels: Pixels) -> Int:
        """Tokens int32 [t, rows, columns] of frames uint8 [T, height, width, 3].

        Raises:
            UsageError: frame size or count does not fit the tokenizer.
        """
        expected = (self.spec.height, self.spec.width, 3)
        if pixels.ndim != 4 or pixels.shape[1:] != expected:
            raise UsageError(f"frames of shape {pixels.shape[1:]}; this tokenizer takes {expected}")
        step, factor = self.spec.chunk_frames, self.spec.temporal_factor
        rest = len(pixels) % step
        if rest and (rest - 1) % factor:
            raise UsageError(
                f"{len(pixels)} frames; this tokenizer takes chunks of {step} and a rest of 1 + {factor} n "
                f"frames: give {len(pixels) - (rest - 1) % factor}"
            )
        chunks = [pixels[start : start + step] for start in range(0, len(pixels), step)]
        return np.concatenate([self._run(self.spec.encoder, "pixels", chunk) for chunk in chunks])

    def decode(self, tokens: Iterable[Int]) -> Iterator[Pixels]:
        """Frames uint8 [height, width, 3] of token frames [rows, columns], as soon as they can be shown.

        A tokenizer that compresses time is given a chunk of token frames at once, which takes the least work;
        ``stream`` does not wait for it.
        """
        wanted = self._latents
        pending: list[Int] = []
        for frame in tokens:
            pending.append(frame)
            if len(pending) == wanted:
                yield from self._run(self.spec.decoder, "tokens", np.stack(pending))
                pending = []
        if pending:
            yield from self._run(self.spec.decoder, "tokens", np.stack(pending))

    def stream(self, tokens: Iterable[Int]) -> Iterator[NDArray[np.generic]]:
        """Frames uint8 [n, height, width, 3] of each token frame [rows, columns] before the next is drawn.

        A tokenizer that compresses time gives a token frame's pictures from it and all those of its chunk
        before it: its decoder is causal, but attends that far back. They are the ones that ``decode`` gives.
        """
        chunk: list[Int] = []
        shown = 0
        for frame in tokens:
            chunk.append(frame)
            images = self._run(self.spec.decoder, "tokens", np.stack(chunk))
            yield images[shown:]
            shown = len(images)
            if len(chunk) == self._latents:
                chunk, shown = [], 0

    @property
    def _latents(self) -> int:
        """Token frames of one call of the decoder."""
        spec = self.spec
        return 1 + (spec.chunk_frames - 1) // spec.temporal_factor if spec.temporal_factor > 1 else 1

    def _run(self, graph: str, name: str, array: NDArray[np.generic]) -> NDArray[np.generic]:
        if graph not in self._graphs:
            path, digest = self._bundle.file(graph), self._bundle.digest_of(graph, *self.spec.weight_files)
            self._graphs[graph] = self._backend.open_graph(path, digest, self._options)
        (result,) = self._graphs[graph]({name: np.ascontiguousarray(array)}).values()
        return result
