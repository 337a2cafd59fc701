"""Every verb that reports on a bundle, over one with quantised graphs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import Bundle, read_manifest
from diagd.cli.main import main
from diagd.runtime.load import Measurement, Measurements, keep_measured
from tests.cli.conftest import Workplace
from tests.models import LATER_RUNTIME

pytestmark = LATER_RUNTIME
PRECISIONS = ("fp8", "int4-weight-kv8")


@pytest.fixture(scope="module")
def quantised(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("quantised") / "world.diagd"
    forms = ("--form", "prefix,portable")
    source = ("--model", "world", "--checkpoint", str(workplace.world), "--output", str(bundle))
    assert main(["export", *source, *forms]) == 0
    data = ("--data", str(workplace.prompt), "--budget", "none", "--set", "steps=64")
    for precision in PRECISIONS:
        scheme, _, cache = precision.partition("-kv8")
        cached = () if precision == scheme else ("--kv-cache", "int8")
        assert main(["calibrate", str(bundle), "--precision", scheme, *cached, *data]) == 0, cache
    return bundle


@pytest.mark.parametrize("precision", ["fp32", *PRECISIONS])
def test_profiles_name_the_precision(
    quantised: Path,
    precision: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "perf_counter", time.thread_time)  # whatever else the machine does
    options = ("--k", "1", "--frames", "2", "--set", f"precision={precision}", "--output", str(tmp_path))
    assert main(["profile", str(quantised), *options, "--set", "threads=1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["precision"] == precision
    form = "portable" if precision.endswith("kv8") else "prefix"
    (graph, *_) = (
        g for g in read_manifest(quantised).graphs if (g.precision, g.form.value) == (precision, form)
    )
    stored = sum((quantised / name).stat().st_size for name in _weights(quantised, graph.file))
    assert 0.5 * stored < report["model"]["weight_bytes"] <= stored
    for run in report["runs"]:
        stages = sum(stage["seconds"]["total"] for stage in run["stages"])
        assert stages == pytest.approx(run["wall"], rel=0.1)


def _weights(bundle: Path, graph: str) -> list[str]:
    """The graph and its weights file."""
    stem = graph.removeprefix("step.").removesuffix("onnx").rstrip(".")
    return [graph, f"weights.{stem}.bin" if (bundle / f"weights.{stem}.bin").is_file() else "weights.bin"]


def test_every_precision_is_verified(quantised: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it passes is for the weights to say; that each is run is for us."""
    assert main(["verify", str(quantised), "--k", "1", "--frames", "1", "--json"]) in (0, 1)
    verdicts = json.loads(capsys.readouterr().out)["verdicts"]
    engines = {verdict["engine"] for verdict in verdicts}
    forms = ("prefix", "portable")
    assert engines == {f"{form} {p}" for form in forms for p in ("fp32", "fp8")} | {
        "portable int4-weight-kv8"
    }
    assert all(verdict["passed"] for verdict in verdicts if verdict["engine"].endswith("fp32"))


def test_graphs_and_caches_are_told_apart(quantised: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(quantised)]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(float16: portable fp8)" in shown
    assert "(int8: portable int4-weight-kv8)" in shown
    assert "float8e4m3fn" in shown
    assert main(["doctor", str(quantised), "--json"]) in (0, 1)
    assert "digests agree" in capsys.readouterr().out


def test_a_plan_has_the_bytes_that_are_stored(quantised: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(quantised), "--device", "h200", "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)["stored"]
    assert len(stored) == 5
    whole = stored["portable fp32"]
    assert stored["portable fp8"]["cache"] == whole["cache"] / 2
    assert stored["portable int4-weight-kv8"]["cache"] == whole["cache"] / 4
    for name, share in (("fp8", 0.25), ("int4-weight-kv8", 0.125)):
        assert stored[f"portable {name}"]["weights"] == pytest.approx(share * whole["weights"], rel=0.3)
    assert main(["plan", str(quantised), "--device", "h200"]) == 0
    assert "portable int4-weight-kv8" in capsys.readouterr().out


def test_what_was_fastest_generates_and_says_so(
    quantised: Path,
    workplace: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path / "cache"))
    entry = Measurement(backend="cpu", precision="fp8", computed="fp8", threads=1, seconds=0.1, passed=True)

    def made(name: str, *options: str) -> np.ndarray:
        given = ["--prompt", str(workplace.prompt), "--actions", str(workplace.actions), "--frames", "2"]
        output = tmp_path / f"{name}.npy"
        assert main(["generate", str(quantised), *given, *options, "--output", str(output)]) == 0
        made: np.ndarray = np.load(output)
        return made

    usual = made("usual")
    keep_measured(
        Bundle.open(quantised), Measurements(date="2026-01-01", order="k=1 serial", entries=(entry,))
    )
    named = [made(precision, "--set", f"precision={precision}") for precision in ("fp32", "fp8")]
    assert not caplog.messages
    fastest = made("fastest")
    (told,) = caplog.messages
    assert "decoding by cpu fp8, the fastest on this machine" in told
    assert "--set backend=cpu --set precision=fp32" in told
    np.testing.assert_array_equal(usual, named[0])
    np.testing.assert_array_equal(fastest, named[1])
    assert (usual != fastest).any()
