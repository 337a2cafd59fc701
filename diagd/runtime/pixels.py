"""Pixels to tokens and back through a bundle's tokenizer graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle
from diagd.bundle.manifest import Tokenizer
from diagd.engines.backend import CPU, Backend, Graph, find
from diagd.engines.engine import Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.runtime.pictures import read_frames

Pixels = NDArray[np.uint8]


class PixelCodec:
    """Encoder and decoder, each loaded when first used; memory is that of one call's chunk.

    Clips of any length go through: behind the first chunk of a tokenizer that compresses time, each further
    token frame is encoded and decoded with as many before it as a chunk holds, and so never as a still.

    Attributes:
        spec: of the tokenizer.
        mark: that pictures must carry where they are written.
        backend: runs the graphs.

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
        self.mark = bundle.manifest.mark
        self.backend = backend or find(CPU)
        self._bundle, self._options = bundle, options
        self._graphs: dict[str, Graph] = {}

    def close(self) -> None:
        """Give the memory of the graphs back; they are loaded again where they are used again."""
        self._graphs.clear()

    def read(
        self, path: Path, *, start: int | None = None, frames: int | None = None, resize: bool = False
    ) -> Pixels:
        """Pictures uint8 [T, height, width, 3] of a video or image, as `read_frames` gives them."""
        spec = self.spec
        return read_frames(path, spec.size, start=start, frames=frames, resize=resize, cover=spec.cover)

    def encode(self, pixels: Pixels) -> Int:
        """Tokens int32 [t, rows, columns] of frames uint8 [T, height, width, 3]; UsageError for others."""
        expected = (*self.spec.size, 3)
        if pixels.ndim != 4 or pixels.shape[1:] != expected:
            raise UsageError(f"frames of shape {pixels.shape[1:]}; this tokenizer takes {expected}")
        most, factor = self.spec.chunk_frames, self.spec.temporal_factor
        if factor == 1:
            chunks = [pixels[start : start + most] for start in range(0, len(pixels), most)]
            return np.concatenate([self._run(self.spec.encoder, "pixels", chunk) for chunk in chunks])
        if rest := (len(pixels) - 1) % factor:
            raise UsageError(
                f"{len(pixels)} frames; this tokenizer takes 1 + {factor} n frames: give {len(pixels) - rest}"
            )
        tokens = [self._run(self.spec.encoder, "pixels", pixels[:most])]
        for end in range(most + factor, len(pixels) + 1, factor):
            tokens.append(self._run(self.spec.encoder, "pixels", pixels[end - most : end])[-1:])
        return np.concatenate(tokens)

    def decode(self, tokens: Iterable[Int]) -> Iterator[Pixels]:
        """Frames uint8 [height, width, 3] of token frames [rows, columns], as soon as they can be shown.

        The first frames that a tokenizer of time can take are given to it at once, which takes the least
        work; ``stream`` does not wait for them.
        """
        source = iter(tokens)
        window = list(islice(source, self.latents))
        if window:
            yield from self._pictures(window)
        for images in self._further(window, source):
            yield from images

    def stream(self, tokens: Iterable[Int]) -> Iterator[Pixels]:
        """Frames uint8 [n, height, width, 3] of each token frame [rows, columns] before the next is drawn.

        A tokenizer that compresses time gives a token frame's pictures from it and those before it, as many
        as it takes: its decoder is causal, but attends that far back. They are those that ``decode`` gives.
        """
        source = iter(tokens)
        for first in islice(source, 1):
            yield self._pictures([first])
            yield from self._further([first], source)

    def _further(self, window: list[Int], tokens: Iterator[Int]) -> Iterator[Pixels]:
        """Pictures of each token frame behind those in the window: none is a still, as a first one is."""
        for frame in tokens:
            window = [*window, frame][-self.latents :]
            yield self._pictures(window)[-self.spec.temporal_factor :]

    def _pictures(self, window: list[Int]) -> Pixels:
        pictures: Pixels = self._run(self.spec.decoder, "tokens", np.stack(window))
        return pictures

    @property
    def latents(self) -> int:
        """Most token frames of one call of the decoder."""
        spec = self.spec
        return 1 + (spec.chunk_frames - 1) // spec.temporal_factor if spec.temporal_factor > 1 else 1

    def pictures_of(self, frames: int) -> int:
        """How many pictures so many token frames are."""
        return 1 + (frames - 1) * self.spec.temporal_factor

    def _run(self, graph: str, name: str, array: NDArray[np.generic]) -> NDArray[Any]:
        if graph not in self._graphs:
            bundle, names = self._bundle, (graph, *self.spec.weight_files)
            bundle.check_unchanged(*names)
            opened = self.backend.open_graph(bundle.file(graph), bundle.digest_of(*names), self._options)
            self._graphs[graph] = opened
        (result,) = self._graphs[graph]({name: np.ascontiguousarray(array)}).values()
        return result
