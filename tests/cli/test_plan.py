"""``diagd plan``."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from diagd.bundle import read_manifest
from diagd.cli.main import main
from tests.cli.conftest import Workplace


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    content: dict[str, object] = json.loads(capsys.readouterr().out)
    return content


def test_a_named_model_on_a_named_device(capsys: pytest.CaptureFixture[str]) -> None:
    """The first example of the help."""
    assert main(["plan", "mineworld-300m", "--device", "orin-agx"]) == 0
    shown = capsys.readouterr().out
    assert "fits" in shown
    assert "k=2 chained" in shown
    assert "204.8 GB/s" in shown


def test_sessions_are_counted_at_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    """As many as hold two thirds of a ceiling: one more would not."""
    command = ["plan", "mineworld-300m", "--device", "rtx4090", "--json", "--set"]
    assert main([*command, "fps=20"]) == 0
    most = printed(capsys)["most_sessions"]
    assert isinstance(most, int)
    assert 1 < most < 256
    rates = []
    for sessions in (most, most + 1):
        assert main([*command, f"sessions={sessions}"]) == 0
        rows = printed(capsys)["ceilings"]
        assert isinstance(rows, list)
        rates.append(
            max(
                row["frames_per_second"]
                for row in rows
                if row["precision"] == "fp16" and "chained" not in row["order"]
            )
        )
    assert 2 / 3 * rates[0] >= 20 > 2 / 3 * rates[1]
    assert main([*command, "fps=100000"]) == 0
    assert printed(capsys)["most_sessions"] == 0
    command[1] = "cosmos-5b-video2world"  # whose engine holds one text
    assert main([*command, "fps=0.1"]) == 0
    assert printed(capsys)["most_sessions"] == 1


def test_a_drafter_is_judged_beforehand(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "mineworld-1200m", "--device", "rtx4090", "--set", "drafter=mineworld-300m"]
    assert main(command) == 0
    assert "drafting pays where more than" in " ".join(capsys.readouterr().out.split())
    assert main([*command, "--set", "guess=0.999", "--json"]) == 0
    found = printed(capsys)["drafting"]
    assert isinstance(found, dict)
    assert found["least_kept"] > 1


def test_a_bundle_takes_no_checkpoint(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(workplace.bundle), "--checkpoint", "other.ckpt"]) == 2
    assert "a bundle says itself what it holds" in capsys.readouterr().err


def test_a_bundle_on_this_machine(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    """The second example: dimensions from headers, limits measured here."""
    assert main(["plan", str(workplace.bundle), "--device", "this", "--json"]) == 0
    content = printed(capsys)
    manifest = read_manifest(workplace.bundle)
    model, device = content["model"], content["device"]
    assert isinstance(model, dict)
    assert isinstance(device, dict)
    assert content["fits"] is True
    assert model["layers"] == manifest.cache.layers
    assert 1e8 < device["bandwidth"] < 1e13
    assert 1e8 < device["peak"] < 1e15
    assert 1e8 < device["memory"] < 1e14


def test_a_model_by_name_and_its_bundle_agree(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    device = ["--device", "h200", "--json"]
    assert main(["plan", str(workplace.bundle), *device]) == 0
    bundle = printed(capsys)["model"]
    assert main(["plan", "world", "--checkpoint", str(workplace.world), *device]) == 0
    named = printed(capsys)["model"]
    assert isinstance(bundle, dict)
    assert isinstance(named, dict)
    assert bundle["streamed"] == pytest.approx(named["streamed"], rel=0.01)  # small constants of the graph
    for field in ("layers", "kv_heads", "head_size", "query_width", "context_frames", "output_vocabulary"):
        assert bundle[field] == named[field], field


@pytest.mark.parametrize(
    ("name", "streamed", "refed"),
    [("cosmos-4b", 3.75e9, 0), ("wham-1.6b", 1.57e9, 9 * 556), ("mineworld-300m", 0.3125e9, 0)],
)
def test_released_models_have_the_parameters_of_their_papers(
    name: str, streamed: float, refed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a step reads: WHAM's head is its embedding, and its context is fed again as it slides."""
    assert main(["plan", name, "--device", "h200", "--json"]) == 0
    model = printed(capsys)["model"]
    assert isinstance(model, dict)
    assert model["streamed"] == pytest.approx(streamed, rel=0.01)
    assert model["refed"] == refed


def test_what_does_not_fit_ends_with_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "rtx4090", "--precision", "int8", "--set", "window=8"]
    assert main(["plan", "mineworld-1200m", *options]) == 0  # the third example
    assert "8 frames" in capsys.readouterr().out
    assert main(["plan", "mineworld-1200m", "--device", "orin-nano", "--precision", "fp32", "--json"]) == 0
    content = printed(capsys)
    assert content["fits"] is True
    memory = content["memory"]
    assert isinstance(memory, dict)
    assert content["running"] == pytest.approx(math.fsum(memory.values()) - memory["build_peak"])
    assert content["builds"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mineworld-300m", "--device", "rtx409"], "did you mean 'rtx4090'"),
        (["mineworld-300", "--device", "h200"], "did you mean 'mineworld-300m'"),
        (["mineworld-300m", "--device", "h200", "--set", "k=25"], "row lags 1..24"),
        (["mineworld-300m", "--device", "h200", "--set", "window=17"], "at most 16 frames"),
        (["mineworld-300m", "--device", "h200", "--set", "sessions=257"], "decodes at most 256"),
        (["cosmos-5b-video2world", "--device", "h200", "--set", "sessions=2"], "an engine holds one text"),
        (["mineworld-300m", "--device", "h200", "--set", "clip=16"], "16 frames"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path), "--device", "h200"]) == 2
    assert "no bundle" in capsys.readouterr().err
