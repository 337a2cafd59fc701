"""Prompts and the actions between their frames, from small files in the released formats."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import av
import numpy as np
import pytest

from diagd.bundle import Bundle
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.runtime.actions import encode, read_actions
from diagd.runtime.clip import MODEL, Clip, ClipOptions, encode_vectors, read_clip
from diagd.runtime.generate import Made, generate
from diagd.runtime.options import GenerateOptions, SessionOptions
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.video import VideoWriter

STEPS, HEIGHT, WIDTH = 7, 18, 30


@pytest.fixture(scope="module")
def bundle(small_wham: Bundle) -> Bundle:
    return small_wham


@pytest.fixture(scope="module")
def codec(bundle: Bundle) -> PixelCodec:
    return PixelCodec(bundle, CpuOptions(1, prepack=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One recording in every form: episode, images, video of images, and lines."""
    folder, random = tmp_path_factory.mktemp("recording"), np.random.default_rng(3)
    images = random.integers(0, 256, (STEPS, HEIGHT, WIDTH, 3), dtype=np.uint8)
    sticks = random.integers(0, 11, (STEPS, 4))
    actions = np.concatenate([random.integers(0, 2, (STEPS, 12)), sticks], axis=1)
    np.savez(folder / "episode.npz", images=np.moveaxis(images, -1, 1), actions=actions)
    with VideoWriter(folder / "clip.gif", 10, (HEIGHT, WIDTH)) as video:
        video.write(images)
    lines = [{f"button_{n}": int(pressed) for n, pressed in enumerate(row[:12])} for row in actions]
    for name in ("clip.jsonl", "other.jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, lines)))
    return folder


def ids(bundle: Bundle, folder: Path) -> np.ndarray:
    assert bundle.manifest.actions is not None
    with np.load(folder / "episode.npz") as file:
        return encode_vectors(bundle.manifest.actions, file["actions"])


def read(bundle: Bundle, codec: PixelCodec, prompt: Path, **options: object) -> Clip:
    return read_clip(ClipOptions(prompt=prompt, **options), bundle.manifest, codec)  # type: ignore[arg-type]


def test_an_episode_is_prompt_actions_and_truth(bundle: Bundle, codec: PixelCodec, folder: Path) -> None:
    """What is done at a picture leads to the next one; the first of a model's context are the prompt."""
    clip, actions = read(bundle, codec, folder / "episode.npz"), ids(bundle, folder)
    with np.load(folder / "episode.npz") as file:
        images = np.moveaxis(file["images"], 1, -1)
    np.testing.assert_array_equal(clip.tokens, codec.encode(images[:3]))
    assert clip.led is not None
    np.testing.assert_array_equal(clip.led[1:], actions[:2])
    np.testing.assert_array_equal(clip.made, actions[2:])
    np.testing.assert_array_equal(clip.truth, images[3:])


def test_a_start_moves_all_of_it(bundle: Bundle, codec: PixelCodec, folder: Path) -> None:
    whole = read(bundle, codec, folder / "episode.npz", prompt_frames=3)
    clip = read(bundle, codec, folder / "episode.npz", start=1, prompt_frames=2)
    assert clip.led is not None
    assert whole.led is not None
    assert whole.truth is not None
    np.testing.assert_array_equal(clip.tokens, whole.tokens[1:])
    np.testing.assert_array_equal(clip.led, whole.led[1:])
    np.testing.assert_array_equal(clip.made, whole.made)
    np.testing.assert_array_equal(clip.truth, whole.truth)


@pytest.mark.parametrize(("lines", "shift"), [(None, 1), ("followed", 1), ("led", 0)])
def test_lines_of_the_clips_name_are_the_clips(
    bundle: Bundle, codec: PixelCodec, folder: Path, lines: str | None, shift: int
) -> None:
    assert bundle.manifest.actions is not None
    given = [
        encode(bundle.manifest.actions, json.loads(line))
        for line in (folder / "clip.jsonl").read_text().splitlines()
    ]
    clip = read(bundle, codec, folder / "clip.gif", actions=folder / "clip.jsonl", start=2, lines=lines)
    assert clip.led is not None
    np.testing.assert_array_equal(clip.led, given[2 - shift : 5 - shift])
    np.testing.assert_array_equal(clip.made, given[5 - shift :])


def test_lines_of_another_name_lead_to_new_frames(
    bundle: Bundle, codec: PixelCodec, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        clip = read(bundle, codec, folder / "clip.gif", actions=folder / "other.jsonl", prompt_frames=2)
    assert "between the 2 frames of the prompt: no-ops are fed" in caplog.text
    assert bundle.manifest.actions is not None
    assert clip.led is not None
    assert (clip.led == encode(bundle.manifest.actions, {})).all()
    assert clip.made is not None
    assert len(clip.made) == STEPS
    forced = read(bundle, codec, folder / "clip.gif", actions=folder / "other.jsonl", lines="led")
    assert forced.made is not None
    assert len(forced.made) == STEPS - 3


def test_a_folder_of_images_is_one_prompt(bundle: Bundle, codec: PixelCodec, tmp_path: Path) -> None:
    """Frame 10 comes behind frame 9, and a line stands for each image."""
    from matplotlib.image import imsave

    images = np.random.default_rng(4).integers(0, 256, (12, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for n, image in enumerate(images):
        imsave(tmp_path / f"frame{n}.png", image)
    lines = [json.dumps({"button_0": n % 2}) for n in range(12)]
    (tmp_path / "actions.jsonl").write_text("\n".join(lines))
    clip = read(bundle, codec, tmp_path, start=8, prompt_frames=3)
    np.testing.assert_array_equal(clip.tokens, codec.encode(images[8:11]))
    assert bundle.manifest.actions is not None
    pressed, released = (encode(bundle.manifest.actions, {"button_0": n}) for n in (1, 0))
    np.testing.assert_array_equal(clip.led, [pressed, released, pressed])  # of frames 7, 8 and 9
    np.testing.assert_array_equal(clip.made, [released, pressed])


def test_the_window_bounds_the_default(bundle: Bundle, codec: PixelCodec, folder: Path) -> None:
    clip = read_clip(ClipOptions(prompt=folder / "episode.npz"), bundle.manifest, codec, window=3)
    assert len(clip.tokens) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 9}, "has no frame 9"),
        ({"start": 5, "prompt_frames": 3}, "2 frames, 3 are asked for"),
        ({"actions": "short", "lines": "led"}, "has 2 actions; the prompt's 3 frames from 0 on take 3"),
    ],
)
def test_clips_that_are_too_short(
    bundle: Bundle, codec: PixelCodec, folder: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    if "actions" in options:
        options = options | {"actions": tmp_path / "short.jsonl"}
        (tmp_path / "short.jsonl").write_text("{}\n{}\n")
    np.save(tmp_path / "tokens.npy", np.ones((7, 3, 5), np.int32))
    for prompt in (folder / "clip.gif", folder / "episode.npz"):
        with pytest.raises(UsageError, match=message):
            read(bundle, codec, prompt, **options)
    if "actions" in options:
        options = options | {"prompt_frames": 3}  # all of a .npy are the prompt
    with pytest.raises(UsageError, match=message):
        read(bundle, codec, tmp_path / "tokens.npy", **options)


def test_models_without_actions_take_none(bundle: Bundle, codec: PixelCodec, folder: Path) -> None:
    manifest = bundle.manifest.model_copy(update={"actions": None})
    with pytest.raises(UsageError, match="takes no actions"):
        read_clip(ClipOptions(prompt=folder / "clip.gif", actions=folder / "clip.jsonl"), manifest, codec)
    single = bundle.manifest.clips.model_copy(update={"single": "better give more"})
    warned = manifest.model_copy(update={"clips": single})
    assert read_clip(ClipOptions(prompt=folder / "clip.gif"), warned, codec).led is None


def test_a_prompt_of_one_picture_is_warned_of(
    bundle: Bundle, codec: PixelCodec, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rules = bundle.manifest.clips.model_copy(update={"single": "better give more", "last": True})
    manifest = bundle.manifest.model_copy(update={"clips": rules})
    with caplog.at_level(logging.WARNING):
        clip = read_clip(ClipOptions(prompt=folder / "clip.gif", prompt_frames=1), manifest, codec)
    assert "better give more" in caplog.text
    with (
        VideoWriter(folder / "last.gif", 10, (HEIGHT, WIDTH)) as video,
        np.load(folder / "episode.npz") as file,
    ):
        video.write(np.moveaxis(file["images"], 1, -1)[-1])
    last = read_clip(ClipOptions(prompt=folder / "last.gif"), manifest, codec)
    np.testing.assert_array_equal(clip.tokens, last.tokens)


def dreamt(bundle: Bundle, output: Path, prompt: Path, **options: object) -> Made:
    clip = {name: options.pop(name) for name in ("actions", "further", "lines") if name in options}
    (made,) = generate(
        GenerateOptions(
            bundle=bundle.path,
            clip=ClipOptions(prompt=prompt, **clip),  # type: ignore[arg-type]
            output=output,
            session=SessionOptions(cpu=CpuOptions(1, prepack=False)),
            **options,  # type: ignore[arg-type]
        )
    )
    return made


def test_what_the_model_plays_is_an_episode(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    """As the release writes it; the action of the last picture of the prompt is the recorded one."""
    dreamt(bundle, tmp_path / "dream.npz", folder / "episode.npz", actions=MODEL, frames=(3, False))
    with np.load(folder / "episode.npz") as file, np.load(tmp_path / "dream.npz") as dream:
        assert (dream["context_length"], dream["steps_to_dream"]) == (3, 3)
        np.testing.assert_array_equal(dream["raw_context"], file["images"][:3])
        assert dream["dreamt_images"].shape == (3, 3, HEIGHT, WIDTH)
        np.testing.assert_array_equal(dream["all_actions"][:3], file["actions"][:3])
        assert dream["all_actions"].shape == (6, 16)
        assert (dream["all_actions"][3:] != file["actions"][3:6]).any()
        codec = PixelCodec(bundle, CpuOptions(1, prepack=False))
        true = np.moveaxis(file["images"][:6], 1, -1)
        again = np.stack(list(codec.decode(codec.encode(true))))
        np.testing.assert_array_equal(dream["encoded_decoded_ground_truth_images"], np.moveaxis(again, -1, 1))
        played = dict(dream)
    dreamt(bundle, tmp_path / "given.npz", tmp_path / "dream.npz", frames=(3, False))
    with np.load(tmp_path / "given.npz") as given:
        np.testing.assert_array_equal(given["dreamt_images"], played["dreamt_images"])
        np.testing.assert_array_equal(given["all_actions"], played["all_actions"])


def test_the_model_s_actions_are_written_as_those_of_a_recording(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    """Beside the video, under its name: both together are a prompt again."""
    played = {"actions": folder / "clip.jsonl", "further": "model", "frames": (7, False)}
    dreamt(bundle, tmp_path / "a.gif", folder / "clip.gif", **played)
    codec = bundle.manifest.actions
    assert codec is not None
    found, given = (read_actions(path, codec) for path in (tmp_path / "a.jsonl", folder / "clip.jsonl"))
    assert len(found) == 3 + 7 - 1  # what was done at each picture but the last
    np.testing.assert_array_equal(found[: len(given)], given)
    clip = ClipOptions(prompt=tmp_path / "a.gif", actions=tmp_path / "a.jsonl", start=5)
    again = read_clip(clip, bundle.manifest, PixelCodec(bundle, CpuOptions(1, prepack=False)))
    assert again.led is not None
    np.testing.assert_array_equal(again.led, found[4:7])
    dreamt(bundle, tmp_path / "b.npy", folder / "clip.gif", **played)
    np.testing.assert_array_equal(read_actions(tmp_path / "b.jsonl", codec), found[3:])


def test_lines_that_would_be_lost_are_kept(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "clip.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=r"clip\.jsonl, which is there already"):
        dreamt(bundle, tmp_path / "clip.gif", folder / "clip.gif", actions=MODEL, frames=(2, False))
    with pytest.raises(UsageError, match="give --frames"):
        dreamt(bundle, tmp_path / "a.gif", folder / "clip.gif", actions=MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.jsonl"]
    dreamt(bundle, tmp_path / "a.gif", folder / "clip.gif", actions=MODEL, frames=(2, False))
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(
        UsageError, match=r"a\.jsonl, which is there already"
    ):  # also beside an earlier output
        dreamt(bundle, tmp_path / "a.gif", folder / "clip.gif", actions=MODEL, frames=(2, False))
    assert (tmp_path / "a.jsonl").read_text() == "{}\n"


def test_what_a_wham_makes_is_marked(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    """As its licence asks; the mark is no part of what is compared with the recording."""
    made = dreamt(bundle, tmp_path / "a.mp4", folder / "episode.npz", frames=(2, False))
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert file.metadata["ProgramName"] == "Generated by WHAM (World Human-Action Model)"
    dreamt(bundle, tmp_path / "a.npz", folder / "episode.npz", frames=(2, False))
    with np.load(tmp_path / "a.npz") as dream, np.load(folder / "episode.npz") as true:
        error = np.square(dream["dreamt_images"].astype(float) - true["images"][3:5]).mean()
    assert made.psnr == pytest.approx(10 * np.log10(255**2 / error), abs=0.01)
    with pytest.raises(UsageError, match="carry 'Generated by WHAM'"):
        dreamt(bundle, tmp_path / "b.mp4", folder / "episode.npz", frames=(2, False), stamp=False)
