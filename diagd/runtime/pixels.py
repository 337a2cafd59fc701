"""Pixels to tokens and back through a bundle's tokenizer graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle
from diagd.bundle.manifest import Tokenizer
from diagd.engines.engine import Int
from diagd.engines.onnxruntime_session import CpuOptions, open_session
from diagd.errors import UsageError

Pixels = NDArray[np.uint8]


class PixelCodec:
    """Encoder and decoder, each loaded when first used; memory is that of one call's chunk.

    Args:
        bundle: checked bundle that has a tokenizer.
        options: of ONNX Runtime.

    Raises:
        UsageError: the bundle has no tokenizer.
    """

    def __init__(self, bundle: Bundle, options: CpuOptions) -> None:
        if bundle.manifest.tokenizer is None:
            raise UsageError(
                f"{bundle.path} has no tokenizer graphs; give the prompt and take the output as .npy tokens, "
                "or export again with the tokenizer"
            )
        self.spec: Tokenizer = bundle.manifest.tokenizer
        self._bundle, self._options = bundle, options
        self._sessions: dict[str, object] = {}

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

        A tokenizer that compresses time needs a chunk of token frames before it gives pixels.
        """
        latents = 1 + (self.spec.chunk_frames - 1) // self.spec.temporal_factor
        wanted = latents if self.spec.temporal_factor > 1 else 1
        pending: list[Int] = []
        for frame in tokens:
            pending.append(frame)
            if len(pending) == wanted:
                yield from self._run(self.spec.decoder, "tokens", np.stack(pending))
                pending = []
        if pending:
            yield from self._run(self.spec.decoder, "tokens", np.stack(pending))

    def _run(self, graph: str, name: str, array: NDArray[np.generic]) -> NDArray[np.generic]:
        if graph not in self._sessions:
            path, digest = self._bundle.file(graph), self._bundle.digest_of(graph, *self.spec.weight_files)
            self._sessions[graph] = open_session(path, digest, self._options)
        return self._sessions[graph].run(None, {name: np.ascontiguousarray(array)})[0]  # type: ignore[no-any-return, attr-defined]
