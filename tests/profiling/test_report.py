"""Reports: schema, comparison, page and trace."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from diagd.bundle import Bundle
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.profiling.compare import compare
from diagd.profiling.measure import measure, random_workload
from diagd.profiling.page import page, write_page
from diagd.profiling.profile import Profile
from diagd.profiling.report import Report, read_report
from diagd.profiling.svg import Axis, Plot
from diagd.profiling.trace import trace_events, write_trace
from diagd.runtime.load import open_session
from diagd.schedule import Schedule
from tests.profiling.conftest import LAYOUT
from tests.profiling.reports import report, run

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)


def lognormal(median: float, seed: int, count: int = 60) -> list[float]:
    return list(np.random.default_rng(seed).lognormal(np.log(median), 0.05, count))


def test_a_report_reads_back_and_holds_its_schema(profiled: Profile, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    profiled.report.write(file)
    assert read_report(file) == profiled.report
    content = json.loads(file.read_text())
    schema = Report.model_json_schema()
    assert set(content) == set(schema["properties"])
    for field in list(content):
        broken = {name: value for name, value in content.items() if name != field}
        if field in schema["required"]:
            with pytest.raises(ValidationError):
                Report.model_validate(broken)
    with pytest.raises(ValidationError):
        Report.model_validate(content | {"extra": 1})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": 2}'])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UsageError):
        read_report(tmp_path / "r.json")
    with pytest.raises(UsageError):
        read_report(tmp_path / "absent.json")


def test_noise_is_no_regression_and_a_slowdown_is() -> None:
    before = report(run("a", lognormal(1e-3, 0)), run("b", lognormal(2e-3, 1)))
    again = report(run("a", lognormal(1e-3, 2)), run("b", lognormal(2e-3, 3)))
    slower = report(run("a", lognormal(1.15e-3, 4)), run("b", lognormal(1.7e-3, 5)))
    assert [change.verdict for change in compare(before, again).changes] == ["same", "same"]
    assert not compare(before, again).regressions
    first, second = compare(before, slower).changes
    assert (first.verdict, second.verdict) == ("slower", "faster")
    assert first.low <= first.ratio <= first.high
    assert first.ratio == pytest.approx(first.after / first.before)


def test_few_samples_and_other_machines_are_told() -> None:
    before = report(run("a", [1e-3] * 3))
    after = report(run("a", [9e-3] * 3), processor="other")
    comparison = compare(before, after)
    assert comparison.changes[0].verdict == "too few"
    assert comparison.notes == ("processor differs: test and other",)
    with pytest.raises(UsageError, match="in common"):
        compare(before, report(run("b", [1e-3])))


class Outline(HTMLParser):
    """Tags in order, and whether each is closed."""

    VOID = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(profiled: Profile) -> None:
    html = page(profiled.report)
    outline = Outline()
    outline.feed(html)
    assert outline.open == []
    assert outline.seen.count("svg") == 4
    assert "script" not in outline.seen
    assert not re.search(r"(src|href)=|@import|url\(|https?://", html)
    for run_ in profiled.report.runs:
        assert run_.order in html
    assert not re.search(r"\bnan\b|\binf\b", html)


def test_names_are_escaped() -> None:
    html = page(report(run("a", lognormal(1e-3, 0)), run("b", lognormal(1e-3, 0))))
    assert "m <b>" not in html
    assert "m &lt;b&gt;" in html


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_sideways_scrolling(profiled: Profile, tmp_path: Path, width: int) -> None:
    """A frame of a phone's width holds the page; its screenshot has the colours of the plots."""
    write_page(tmp_path / "report.html", profiled.report)
    probe = (
        f"<body style='margin:0'><iframe id=f src='report.html' style='width:{width}px;height:2400px'>"
        "</iframe><script>onload=()=>{const d=document.getElementById('f').contentDocument.documentElement;"
        "document.title=d.scrollWidth+' '+d.clientWidth+' '+d.querySelectorAll('svg').length+' '+"
        "Math.min(...[...d.querySelectorAll('svg')].map(s=>s.getBoundingClientRect().width))}</script>"
    )
    (tmp_path / "probe.html").write_text(probe)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    flags += [f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={max(width, 500)},2400"]
    command = [str(CHROMIUM), *flags, "--dump-dom", (tmp_path / "probe.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    scroll, client, plots, narrowest = (float(n) for n in re.findall(r"<title>(.*?)</title>", dom)[0].split())
    assert scroll <= client
    assert plots == 4
    assert narrowest > 0.6 * min(width, 480)
    shot = tmp_path / "shot.png"
    subprocess.run(
        [str(CHROMIUM), *flags, f"--screenshot={shot}", (tmp_path / "report.html").as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    from diagd.runtime.video import read_frames

    colours = read_frames(shot)[0].reshape(-1, 3)
    for colour in ((0x3B, 0x82, 0xC4), (0xE0, 0x89, 0x2B), (0x3F, 0x9D, 0x63)):
        assert (np.abs(colours.astype(int) - colour).max(axis=1) < 8).sum() > 300


def test_axes() -> None:
    linear, logarithmic = Axis("", 0, 10), Axis("", 0.5, 50, logarithmic=True)
    assert linear.ticks() == [0, 5, 10]
    assert logarithmic.ticks() == pytest.approx([0.5, 1, 2, 5, 10, 20, 50])
    assert linear.share(5) == 0.5
    assert logarithmic.share(5) == pytest.approx(0.5)
    assert linear.share(20) == 1.0
    plot = Plot("t", linear, linear)
    plot.bar(5, 1, 10, "#000000")
    assert 'height="222.0"' in plot.svg()


def test_a_trace_nests_and_adds_up(profiled: Profile, tmp_path: Path) -> None:
    names = [run_.order for run_ in profiled.report.runs]
    runs = list(zip(names, profiled.runs, strict=True))
    events = [event for event in trace_events(runs, profiled.timeline) if event["ph"] == "X"]
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in events)
    for thread, name in enumerate(names, start=1):
        whole, *parts = [event for event in events if event["tid"] == thread]
        assert whole["name"] == name
        for part in parts:
            assert whole["ts"] - 1 <= part["ts"]
            assert part["ts"] + part["dur"] <= whole["ts"] + whole["dur"] + 1
        engine = [part for part in parts if part["name"].startswith(("steps", "prefill"))]
        assert len(engine) == profiled.report.runs[thread - 1].passes
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1 for a, b in itertools.pairwise(engine))
    write_trace(tmp_path / "trace.json", runs, profiled.timeline)
    content = json.loads((tmp_path / "trace.json").read_text())
    assert len(content["traceEvents"]) == len(events) + len(names) + 1


def test_nvtx_marks_steps_where_it_is_installed(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of that name stands in for nvtx, which needs no GPU to be imported but is not required."""
    package = tmp_path / "nvtx.py"
    package.write_text(
        "from contextlib import contextmanager\nseen = []\n\n@contextmanager\ndef annotate(name):\n"
        "    seen.append(name)\n    yield\n"
    )
    session = open_session(bundle, cpu=CpuOptions(threads=1))
    monkeypatch.syspath_prepend(str(tmp_path))
    run_ = measure(session, Schedule.serial(LAYOUT, 1), random_workload(session, 1, 1), 1, marks=True)
    import nvtx

    assert nvtx.seen == [f"step w={step.rows}" for step in run_.steps]
    assert len(nvtx.seen) == session.timing.steps
    assert nvtx.seen[1].startswith("step w=")


def test_a_report_of_an_earlier_version_is_read(profiled: Profile, tmp_path: Path) -> None:
    """It had the optimisations as well."""
    file = tmp_path / "report.json"
    profiled.report.write(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ladder": []}))
    assert read_report(file) == profiled.report
