from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch

from diagd.export.families.world import PatchGraphs
from diagd.export.tokenizers.base import loaded


def codebook(codes: int, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, 256, (codes, 8, 8, 3), dtype=np.uint8))


def encoder(book: torch.Tensor) -> torch.nn.Module:
    return loaded(PatchGraphs(8, 8, *book.shape[:2]).build("Encoder"), {"codebook": book})


def decoder(book: torch.Tensor) -> torch.nn.Module:
    return loaded(PatchGraphs(8, 8, *book.shape[:2]).build("Decoder"), {"codebook": book})


def test_tokens_survive_a_round_trip() -> None:
    book = codebook(40)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 40, (3, 9, 12), dtype=np.int32))
    pixels = decoder(book)(tokens)
    assert pixels.shape == (3, 72, 96, 3)
    assert pixels.dtype == torch.uint8
    assert torch.equal(encoder(book)(pixels), tokens)


def test_decoder_places_patches_in_raster_order() -> None:
    book = codebook(6)
    pixels = decoder(book)(torch.arange(6, dtype=torch.int32).reshape(1, 2, 3))
    assert torch.equal(pixels[0, 8:16, 16:24], book[5])


def test_encoder_finds_the_nearest_code_exactly() -> None:
    book = codebook(64)
    random = np.random.default_rng(2)
    pixels = random.integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    patches = pixels.reshape(2, 2, 8, 3, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(12, -1).astype(np.int64)
    distances = ((patches[:, None] - book.numpy().reshape(1, 64, -1)) ** 2).sum(-1)
    tokens = encoder(book)(torch.from_numpy(pixels))
    np.testing.assert_array_equal(tokens.numpy().ravel(), distances.argmin(1))


def test_equal_codes_give_the_lowest_id() -> None:
    book = codebook(5)
    book[3:] = book[1]
    tokens = encoder(book)(decoder(book)(torch.full((1, 2, 2), 4, dtype=torch.int32)))
    assert torch.equal(tokens, torch.ones(1, 2, 2, dtype=torch.int32))


def test_graphs_agree_with_the_modules(tmp_path: Path) -> None:
    book = codebook(32)
    pixels = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8))
    tokens = encoder(book)(pixels)
    for module, given, expected in (
        (encoder(book), pixels, tokens),
        (decoder(book), tokens, decoder(book)(tokens)),
    ):
        path = tmp_path / f"{type(module).__name__}.onnx"
        frames = {0: torch.export.Dim("frames", min=1, max=64)}
        torch.onnx.export(
            module, (given,), path, dynamo=True, opset_version=20, dynamic_shapes=(frames,), verbose=False
        )
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        for data, answer in ((given, expected), (given[:1], expected[:1])):
            np.testing.assert_array_equal(session.run(None, {name: data.numpy()})[0], answer.numpy())
