"""The page: whole, alone, and readable on a phone."""

from __future__ import annotations

import re
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
from tests.play.browser import Tab
from tests.profiling.reports import lognormal, report, run

SIZES = """(() => {
  const root = document.documentElement, plots = [...document.querySelectorAll("svg")];
  const narrowest = Math.min(...plots.map((plot) => plot.getBoundingClientRect().width));
  return [root.scrollWidth, root.clientWidth, plots.length, narrowest];
})()"""


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


@pytest.fixture(scope="module")
def html(profiled: Profile) -> str:
    return page(profiled.report)


def test_the_page_stands_alone(profiled: Profile, html: str) -> None:
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


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_sideways_scrolling(
    html: str, tmp_path: Path, tab: Tab, width: int
) -> None:
    """Of a phone's width, too; its screenshot has the colours of the plots."""
    write_text(tmp_path / "report.html", html)
    tab.resize(width, 2400)
    tab.open((tmp_path / "report.html").as_uri())
    tab.until("document.readyState === 'complete'")
    scroll, client, plots, narrowest = tab.evaluate(SIZES)
    assert scroll <= client <= width
    assert plots == 4
    assert narrowest > 0.6 * min(width, 480)
    shot = tmp_path / "shot.png"
    tab.screenshot(shot)
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
