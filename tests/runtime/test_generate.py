"""Clips of a tokenizer that compresses time, of any length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from diagd.bundle import Bundle
from diagd.errors import UsageError
from diagd.export.exporter import export, random_sources
from diagd.export.families import cosmos
from diagd.export.families.cosmos import CosmosDvConfig
from diagd.export.options import GraphOptions
from diagd.runtime.clip import ClipOptions
from diagd.runtime.generate import Made, generate
from diagd.runtime.options import GenerateOptions
from diagd.runtime.pictures import read_frames
from diagd.runtime.video import VideoWriter
from diagd.schedule import StreamLayout
from tests.export.test_families_cosmos import small

HEIGHT, WIDTH = 16, 32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five latent frames of 2 x 4 tokens, as many as the release sees."""
    base, ids = small(text=False, yarn=False), 64_000
    config = replace(base, layout=StreamLayout(2, 4), context_frames=5, vocabulary=ids, output_vocabulary=ids)
    tokenizer = CosmosDvConfig(
        height=HEIGHT, width=WIDTH, stem_channels=4, channels=(4, 8), res_blocks=1, latent_channels=4
    )
    family = cosmos.family("small-cosmos", config, tokenizer=tokenizer)
    path = tmp_path_factory.mktemp("cosmos") / "cosmos.diagd"
    return export(family, GraphOptions(), random_sources(family, 0), path).path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.gif"
    with VideoWriter(path, 10, (HEIGHT, WIDTH)) as video:
        video.write(np.random.default_rng(0).integers(0, 256, (12, HEIGHT, WIDTH, 3), dtype=np.uint8))
    return path


def make(bundle: Path, clip: Path, output: Path, **options: object) -> Made:
    prompt = ClipOptions(prompt=clip, prompt_frames=options.pop("prompt_frames", None))  # type: ignore[arg-type]
    (made,) = generate(GenerateOptions(bundle=bundle, clip=prompt, output=output, **options))  # type: ignore[arg-type]
    return made


def pictures(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize(
    ("options", "latents", "shown"),
    [
        ({}, 3, 33),
        ({"prompt_frames": 1}, 4, 33),
        ({"frames": "3latents"}, 3, 33),
        ({"frames": "32"}, 4, 41),
        ({"frames": "64"}, 8, 73),
        ({"frames": "64", "beyond": "prompt"}, 8, 73),
    ],
)
def test_a_latent_frame_behind_the_first_is_eight_pictures(
    bundle: Path, clip: Path, tmp_path: Path, options: dict[str, object], latents: int, shown: int
) -> None:
    """The last nine pictures are the prompt, and a clip is as long as the release's unless told otherwise."""
    made = make(bundle, clip, tmp_path / "a.mp4", **options)
    assert made.frames == latents
    assert pictures(tmp_path / "a.mp4") == shown


def test_long_clips_begin_as_short_ones(bundle: Path, clip: Path, tmp_path: Path) -> None:
    for name, frames, beyond in (("a", "24", "stream"), ("b", "40", "stream"), ("c", "40", "prompt")):
        options = {"frames": frames, "beyond": beyond, "decoder": "k=1 serial"}
        make(bundle, clip, tmp_path / f"{name}.gif", **options)
    short, long, again = (read_frames(tmp_path / f"{name}.gif") for name in "abc")
    np.testing.assert_array_equal(short, long[:33])
    np.testing.assert_array_equal(short, again[:33])
    assert len(long) == len(again) == 49
    assert (long[33:] != again[33:]).any()
    with pytest.raises(UsageError, match=r"beyond=prompt.*give \.mp4 or \.gif"):  # of which a stream is none
        make(bundle, clip, tmp_path / "d.npy", frames="40", beyond="prompt")


@pytest.mark.parametrize("beyond", ["stream", "prompt"])
def test_next_tokens_of_long_clips_are_exact(bundle: Path, clip: Path, tmp_path: Path, beyond: str) -> None:
    made = make(bundle, clip, tmp_path / "a.gif", frames="64", beyond=beyond, decoder="ntp", audit=True)
    assert made.exact == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"frames": "20"},
            "a latent frame of small-cosmos is 8 pictures; give 16, or latent frames, as 20latents",
        ),
        ({"prompt_frames": 50}, "has 12 frames, 50 are asked for"),
    ],
)
def test_counts_that_do_not_fit(
    bundle: Path, clip: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make(bundle, clip, tmp_path / "a.mp4", **options)
    assert not list(tmp_path.iterdir())


def test_the_manifest_says_what_a_prompt_is(bundle: Path) -> None:
    clips = Bundle.open(bundle).manifest.clips
    assert (clips.frames, clips.last) == (9, True)
    assert clips.single is not None
