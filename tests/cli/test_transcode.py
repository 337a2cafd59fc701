"""``diagd encode`` and ``diagd decode``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diagd.cli.main import main
from diagd.runtime.pictures import read_frames
from diagd.runtime.video import VideoWriter
from tests.cli.conftest import Workplace


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    with VideoWriter(tmp_path / "clip.gif", 10, (36, 48)) as video:
        video.write(np.random.default_rng(2).integers(0, 256, (4, 36, 48, 3), dtype=np.uint8))
    return tmp_path / "clip.gif"


def test_a_video_goes_to_tokens_and_back(
    workplace: Workplace, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PSNR is that of the pictures, and the tokens of what was decoded are the same."""
    tokens, again, back = (tmp_path / name for name in ("a.npy", "b.npy", "back.gif"))
    assert main(["encode", str(workplace.bundle), str(clip), "--output", str(tokens)]) == 0
    shown = capsys.readouterr().out
    assert "4 pictures to 4 token frames" in shown
    assert np.load(tokens).shape == (4, 9, 12)
    assert (
        main(["decode", str(workplace.bundle), str(tokens), "--output", str(back), "--against", str(clip)])
        == 0
    )
    said = float(capsys.readouterr().out.split("PSNR ")[1].split(" dB")[0])
    assert said == float(shown.split("PSNR ")[1].split(" dB")[0])
    assert read_frames(back).shape == (4, 36, 48, 3)
    options = ("--start", "1", "--frames", "2", "--output", str(again))
    assert main(["encode", str(workplace.bundle), str(clip), *options]) == 0
    np.testing.assert_array_equal(np.load(again), np.load(tokens)[1:3])


def test_decoded_pictures_are_exact_where_the_code_book_has_them(
    workplace: Workplace, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diagd.bundle import Bundle
    from diagd.engines.onnxruntime_session import CpuOptions
    from diagd.runtime.pixels import PixelCodec

    codec = PixelCodec(Bundle.open(workplace.bundle), CpuOptions())
    shown = np.stack(list(codec.decode(codec.encode(read_frames(clip)))))
    error = np.mean(np.square(shown.astype(float) - read_frames(clip)))
    assert main(["encode", str(workplace.bundle), str(clip), "--output", str(tmp_path / "a.npy")]) == 0
    assert f"PSNR {10 * np.log10(255**2 / error):.2f} dB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encode", "{bundle}", "{clip}", "--output", "a.mp4"], "ending in .npy"),
        (["encode", "{bundle}", "none.mp4", "--output", "a.npy"], "no such video"),
        (["encode", "{bundle}", "{clip}", "--start", "4", "--output", "a.npy"], "no frame 4"),
        (["decode", "{bundle}", "{clip}", "--output", "a.mp4"], "no .npy array"),
        (["decode", "{bundle}", "tokens.npy", "--output", "a.npy"], "ending in .mp4 or .gif"),
        (
            ["decode", "{bundle}", "tokens.npy", "--output", "a.gif", "--against", "{clip}"],
            "the tokens have 5",
        ),
        (["decode", "{bundle}", "flat.npy", "--output", "a.gif"], "expected [frames, 9, 12]"),
    ],
)
def test_mistakes_are_told(
    workplace: Workplace,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("tokens.npy", np.zeros((5, 9, 12), np.int32))
    np.save("flat.npy", np.zeros((5, 108), np.int32))
    before = sorted(tmp_path.iterdir())
    assert main([word.format(bundle=workplace.bundle, clip=clip) for word in words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
