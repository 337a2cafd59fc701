"""The page: whole, alone, and readable on a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle.files import write_text
from diagd.errors import DependencyError
from diagd.profiling.page import page
from diagd.profiling.profile import Profile
from diagd.runtime.pictures import read_frames
from tests.profiling.reports import lognormal, report, run

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)


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
    assert not re.search(r"(src|href)=\"(?!#)|@import|url\((?!#)|https?://", html)
    assert set(re.findall(r"(?:href=\"|url\()#(\w+)", html)) <= set(re.findall(r"\bid=\"(\w+)\"", html))
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
    write_text(tmp_path / "report.html", page(profiled.report))
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
    colours = read_frames(shot)[0].reshape(-1, 3)
    for colour in ((0x3B, 0x82, 0xC4), (0xE0, 0x89, 0x2B), (0x3F, 0x9D, 0x63)):
        assert (np.abs(colours.astype(int) - colour).max(axis=1) < 8).sum() > 300


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (package, f"{package}.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyError, match=r"pip install 'diagd\[report\]'"):
        write_text(tmp_path / "report.html", page(report(run("a", lognormal(1e-3, 0)))))
    assert not list(tmp_path.iterdir())
