"""Long videos through the tokenizer graphs of a bundle, in calls of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from diagd.bundle import Bundle
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import BundleError, UsageError
from diagd.export.exporter import export, random_sources
from diagd.export.families.cosmos import CosmosDvConfig
from diagd.export.options import GraphOptions
from diagd.runtime.pixels import PixelCodec
from diagd.schedule import StreamLayout
from tests.models import small_family
from tests.oracles.models import small_model

TOKENIZER = CosmosDvConfig(
    height=16, width=32, stem_channels=4, channels=(4, 8), res_blocks=1, latent_channels=4
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    family = replace(small_family(small_model(StreamLayout(1, 2), layers=1)), tokenizer=TOKENIZER)
    path = tmp_path_factory.mktemp("pixels") / "a.diagd"
    return Bundle.open(export(family, GraphOptions(), random_sources(family, 0), path).path)


@pytest.fixture
def codec(bundle: Bundle) -> PixelCodec:
    return PixelCodec(bundle, CpuOptions(1, prepack=False))


def video(frames: int) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 256, (frames, 16, 32, 3), dtype=np.uint8)


def test_long_videos_take_calls_of_bounded_size(codec: PixelCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first chunk at once, then a token frame behind those that a chunk holds before it."""
    pixels, sizes = video(33 + 5 * 8), []
    run = codec._run

    def watch(graph: str, name: str, array: np.ndarray) -> np.ndarray:
        sizes.append((name, len(array)))
        return run(graph, name, array)

    monkeypatch.setattr(codec, "_run", watch)
    tokens = codec.encode(pixels)
    assert tokens.shape == (10, *TOKENIZER.grid)
    np.testing.assert_array_equal(tokens[:5], codec.encode(pixels[:33]))
    np.testing.assert_array_equal(tokens[9], codec.encode(pixels[40:])[4])
    sizes.clear()
    frames = np.stack(list(codec.decode(iter(tokens))))
    assert frames.shape == pixels.shape
    assert sizes == [("tokens", 5)] * 6
    assert np.abs(frames[:33].astype(int) - list(codec.decode(tokens[:5]))).max() <= 1
    assert np.abs(frames[-8:].astype(int) - list(codec.decode(tokens[5:]))[-8:]).max() <= 1


@pytest.mark.parametrize(("latents", "pictures"), [(1, 1), (5, 33), (6, 41), (7, 49), (10, 73)])
def test_a_token_frame_behind_the_first_is_never_a_still(
    codec: PixelCodec, latents: int, pictures: int
) -> None:
    tokens = np.random.default_rng(0).integers(0, 1000, (latents, *TOKENIZER.grid), dtype=np.int32)
    assert len(list(codec.decode(tokens))) == codec.pictures_of(latents) == pictures


def test_graphs_of_a_bundle_equal_the_modules(bundle: Bundle, codec: PixelCodec) -> None:
    source = random_sources(replace(small_family(small_model(StreamLayout(1, 2))), tokenizer=TOKENIZER), 0)
    assert source.tokenizer is not None
    state = {name: torch.from_numpy(handle.read().copy()) for name, handle in source.tokenizer.items()}
    encoder, decoder = TOKENIZER.build("Encoder"), TOKENIZER.build("Decoder")
    for module in (encoder, decoder):
        module.load_state_dict({name: state[name] for name in module.state_dict()})
    pixels = video(9)
    with torch.no_grad():
        tokens = encoder(torch.from_numpy(pixels)).numpy()
        shown = decoder(torch.from_numpy(tokens)).numpy()
    np.testing.assert_array_equal(codec.encode(pixels), tokens)
    frames = np.stack(list(codec.decode(iter(tokens))))
    assert np.abs(frames.astype(int) - shown).max() <= 1


def test_each_token_frame_is_shown_before_the_next_is_asked_for(codec: PixelCodec) -> None:
    """One picture for the first token frame, eight for each further one."""
    tokens, asked = codec.encode(video(33 + 5 * 8)), []

    def source() -> Iterator[np.ndarray]:
        for number, frame in enumerate(tokens):
            asked.append(number)
            yield frame

    parts = []
    for number, images in enumerate(codec.stream(source())):
        assert asked == list(range(number + 1))
        parts.append(images)
    assert [len(images) for images in parts] == [1, *[8] * 9]
    together = np.stack(list(codec.decode(iter(tokens))))
    assert np.abs(np.concatenate(parts).astype(int) - together).max() <= 1


@pytest.mark.parametrize(("frames", "give"), [(8, 1), (10, 9), (40, 33), (43, 41)])
def test_counts_that_do_not_fit_name_one_that_does(codec: PixelCodec, frames: int, give: int) -> None:
    with pytest.raises(UsageError, match=f"give {give}$"):
        codec.encode(video(frames))


def test_other_sizes_are_refused(codec: PixelCodec) -> None:
    with pytest.raises(UsageError, match=r"takes \(16, 32, 3\)"):
        codec.encode(np.zeros((1, 16, 16, 3), np.uint8))


def test_graphs_of_a_bundle_that_took_its_place_are_not_read(tmp_path: Path) -> None:
    """They would be kept in the cache as those of the bundle that was opened."""
    family = replace(small_family(small_model(StreamLayout(1, 2), layers=1)), tokenizer=TOKENIZER)

    def exported(seed: int) -> Bundle:
        return Bundle.open(
            export(family, GraphOptions(), random_sources(family, seed), tmp_path / "a.diagd").path
        )

    codec, alike = (PixelCodec(exported(0), CpuOptions(1, prepack=False)) for _ in range(2))
    tokens = codec.encode(video(1))
    exported(1)
    np.testing.assert_array_equal(codec.encode(video(1)), tokens)  # it was loaded
    stale: Callable[[], object]
    for stale in (partial(alike.encode, video(1)), partial(list, codec.decode(tokens))):
        with pytest.raises(BundleError, match="another bundle took the place"):
            stale()


def test_bundles_without_a_tokenizer_say_so(small_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"has no tokenizer graphs"):
        PixelCodec(Bundle.open(small_bundle), CpuOptions(1))
