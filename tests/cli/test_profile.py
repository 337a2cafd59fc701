"""``diagd profile``."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diagd.bundle import read_manifest
from diagd.cli.main import main
from diagd.profiling.report import Report, read_report
from tests.cli.conftest import Workplace

QUICK = ["--frames", "2", "--set", "threads=1"]


@pytest.fixture(scope="module")
def output(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    options = [
        "--k",
        "1,2",
        "--set",
        "fps=10",
        "--output",
        str(folder),
        "--trace",
        str(folder / "trace.json"),
    ]
    assert main(["profile", str(workplace.bundle), *options, *QUICK]) == 0
    return folder


def test_report_page_and_trace_are_written(output: Path) -> None:
    report = read_report(output / "report.json")
    assert report.skipped == ()
    assert [run.order for run in report.runs] == [
        *("next token", "k=1 serial", "k=1 chained", "k=2 serial", "k=2 chained")
    ]
    assert report.runs[0].deadlines is not None
    assert "</html>" in (output / "report.html").read_text()
    assert json.loads((output / "trace.json").read_text())["traceEvents"]


def test_pixels_are_stages_of_their_own(output: Path) -> None:
    report = read_report(output / "report.json")
    assert {"load", "load tokenizer", "prompt encode"} == {stage.name for stage in report.start}
    for run in report.runs:
        stages = {stage.name: stage.seconds for stage in run.stages}
        assert {"prompt", "prefill", "sampling", "pixel decode", "video encode"} <= set(stages)
        assert stages["pixel decode"].count == run.frames


def test_the_defaults_of_the_first_example(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", str(workplace.bundle), "--json", *QUICK]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "world.profile" / "report.json").read_text())


def test_the_fastest_backend_is_found_and_told_by_doctor_and_plan(
    workplace: Workplace, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path))
    assert main(["doctor", str(workplace.bundle)]) == 0
    assert "not measured on this machine" in capsys.readouterr().out
    assert main(["profile", str(workplace.bundle), "--backends", "--json", *QUICK]) == 0
    printed = capsys.readouterr()
    (entry,) = json.loads(printed.out)["entries"]
    chosen = "--set backend=cpu --set precision=fp32 --set threads=1"
    assert (entry["backend"], entry["threads"], entry["passed"]) == ("cpu", 1, True)
    assert chosen in printed.err
    assert "openvino fp32 was skipped: it runs portable graphs" in printed.err
    for verb in ("doctor", "plan"):
        assert main([verb, str(workplace.bundle)]) == 0
        assert chosen in " ".join(capsys.readouterr().out.replace("│", "").split())


def test_a_comparison_with_itself_finds_nothing(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = str(output / "report.json")
    assert main(["profile", "--compare", report, report]) == 0
    assert "slower" not in capsys.readouterr().out


def test_a_regression_ends_with_code_3(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((output / "report.json").read_text())
    for run in content["runs"]:
        for sample in run["samples"]:
            for part in ("engine", "sampling", "host"):
                sample[part] *= 20
    (tmp_path / "after.json").write_text(json.dumps(content))
    reports = [str(output / "report.json"), str(tmp_path / "after.json")]
    assert main(["profile", "--compare", *reports, "--json"]) == 3
    verdicts = {change["verdict"] for change in json.loads(capsys.readouterr().out)["changes"]}
    assert "slower" in verdicts
    assert "faster" not in verdicts
    assert main(["profile", "--compare", *reversed(reports)]) == 0


def test_a_full_disk_is_named_and_leaves_no_folder(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def page(report: Report) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("diagd.cli.profile.page", page)
    output = tmp_path / "report"
    assert main(["profile", str(workplace.bundle), "--k", "1", "--output", str(output), *QUICK]) == 2
    assert f"error: {output}: No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a bundle"),
        (["{bundle}", "--k", "one"], "--k one: expected whole numbers such as"),
        (["{bundle}", "--k", "99"], "k=99"),
        (["{bundle}", "--set", "fps=0"], "--set fps=0: Input should be greater than 0"),
        (["{bundle}", "--set", "fps=nan"], "--set fps=nan: Input should be a finite number"),
        (["{bundle}", "--trace", "{bundle}"], "it is a directory"),
        (["{bundle}", "--output", "{bundle}/manifest.json"], "no directory that can be written"),
        (["{bundle}", "--set", "backend=cude"], "did you mean 'cuda'"),
        (["{bundle}", "--budget", "-1"], "--budget -1: Input should be greater than or equal to 0"),
        (["{bundle}", "--frames", "1"], "two or more"),
        (["{bundle}", "--frames", "1" + "0" * 20], "less than or equal to 1000000"),
        (["{bundle}", "--set", "prompt=1" + "0" * 20], "less than or equal to 1000000"),
        (["{bundle}", "--set", "window=99"], "window 99"),
        (["{bundle}", "--backends", "--output", "report"], "writes no report"),
    ],
)
def test_mistakes_are_told(
    workplace: Workplace, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", *(word.format(bundle=workplace.bundle) for word in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_a_planted_regression_of_a_fifth(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step of a long series takes 20 % more."""
    content = json.loads((output / "report.json").read_text())
    for name, factor in (("before", 1.0), ("after", 1.2)):
        for run in content["runs"]:
            step = run["samples"][0] | {"sampling": 0.0, "host": 0.0}
            noise = [1 + 0.01 * (at % 7) for at in range(200)]
            run["samples"] = [step | {"rows": 4, "engine": 1e-3 * factor * share} for share in noise]
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    reports = [str(tmp_path / name) for name in ("before.json", "after.json")]
    assert main(["profile", "--compare", *reports, "--json"]) == 3
    for change in json.loads(capsys.readouterr().out)["changes"]:
        assert change["verdict"] == "slower"
        assert change["ratio"] == pytest.approx(1.2)
        assert 1.1 < change["low"] <= change["ratio"] <= change["high"] < 1.3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda report: report.pop("schema_version"), "no schema version"),
        (lambda report: report.update(schema_version=99), "reads up to 2"),
        (lambda report: report.update(runs=[]), "no decoding order in common"),
        (lambda report: report["runs"][0].update(wall=float("nan")), "no report"),
    ],
)
def test_damaged_reports_are_told(
    output: Path,
    tmp_path: Path,
    damage: Callable[[dict[str, Any]], object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = json.loads((output / "report.json").read_text())
    damage(content)
    (tmp_path / "damaged.json").write_text(json.dumps(content))
    assert main(["profile", "--compare", str(output / "report.json"), str(tmp_path / "damaged.json")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_orders_that_a_window_cannot_hold_are_skipped(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chained frames of k=1 have three frames under way."""
    options = ("--k", "1", "--set", "window=2", "--set", "prompt=1", "--json")
    assert main(["profile", str(workplace.bundle), *QUICK, *options, "--output", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    layout = read_manifest(workplace.bundle).layout
    under_way = (layout.columns + layout.rows - 1) // layout.rows + 1
    skipped = [entry["order"] for entry in report["skipped"]]
    assert skipped == (["k=1 chained"] if under_way > 2 else [])
