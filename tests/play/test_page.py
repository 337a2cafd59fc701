"""The page in a real browser."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path

import av
import numpy as np
import pytest

from diagd.play.opening import GameOptions
from diagd.play.record import read_record
from diagd.play.server import Client
from tests.play.browser import CHROMIUM, Tab
from tests.play.conftest import Serve, table_of

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"
)

PIXELS = "document.getElementById('screen').toDataURL()"
LIVE = "document.getElementById('status')?.className === 'live'"
KNOWN = "Number(document.getElementById('hud-known').textContent)"
BUSY = (
    "new Promise((done) => { const end = performance.now() + 400; while (performance.now() < end); "
    "setTimeout(done, 400); })"
)
TOUCH = "document.getElementById('touch').hidden && document.getElementById('touch-toggle').click()"
PAD = (
    "(({left, top, width}) => [left + width / 2, top + width / 2, width / 2])"
    "(document.getElementById('pad').getBoundingClientRect())"
)
CHANGE = (
    "((form, name, value) => {{ form[name].value = value; "
    "form[name].dispatchEvent(new Event('change', {{bubbles: true}})); }})"
    "(document.getElementById('settings').elements, {!r}, {!r})"
)
OVERTAKEN = """(() => {
  const decode = createImageBitmap;
  let calls = 0;
  window.createImageBitmap = async (picture) => {
    const made = await decode(picture);
    if (!calls++) await new Promise((done) => { window.release = done; });
    return made;
  };
})()"""
FULL = """(() => {
  for (let size = 1 << 22; size; size >>= 1)
    try { for (;;) sessionStorage[Math.random()] = "x".repeat(size); } catch {}
})()"""
CONTRAST = """(() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const part = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const ground = (one) => { // the nearest colour behind
    const color = one ? numbers(getComputedStyle(one).backgroundColor) : [255, 255, 255];
    return color[3] === 0 ? ground(one.parentElement) : color;
  };
  const contrast = (one, other) => {
    const [dark, bright] = [light(one), light(other)].sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
  };
  const all = [...document.querySelectorAll("body *")].filter((one) => one.offsetParent && !one.disabled);
  const said = (node) => node.nodeType === 3 && node.textContent.trim();
  const texts = all.filter((one) => [...one.childNodes].some(said));
  const plain = "button:not(.link), select, input:not([type=radio], [type=checkbox], [type=file])";
  const edge = (one) => contrast(numbers(getComputedStyle(one).borderTopColor), ground(one.parentElement));
  return [
    texts.map((one) => [one.textContent, contrast(numbers(getComputedStyle(one).color), ground(one))]),
    all.filter((one) => one.matches(plain)).map((one) => [one.outerHTML, edge(one)]),
  ];
})()"""
THUMBNAILS = "document.querySelectorAll('#tree canvas')"
HELD = "[...document.querySelectorAll('kbd.held')].map((key) => key.dataset.code).join()"
ALT, CTRL, META = 1, 2, 4  # as the protocol of the browser numbers them
COVER = "document.getElementById('cover').hidden"


def click(tab: Tab, selector: str) -> None:
    tab.evaluate(f"document.querySelector({selector!r}).click()")


def enter(tab: Tab, url: str, mode: str = "live") -> None:
    tab.resize(1280, 900)
    tab.open(url)
    tab.until(LIVE)
    tab.until(f"{THUMBNAILS}.length")  # which come with how things stand: what is chosen before is lost
    click(tab, f"[value={mode}]")
    tab.until(f"{KNOWN} >= 1")


def marked(tab: Tab, number: int) -> str:
    """Waits for a mark in the tree; the expression that clicks it."""
    button = f"[...document.querySelectorAll('#tree button')][{number}]"
    tab.until(f"{button}?.getAttribute('aria-current') === 'true'")
    return f"{button}.click()"


def test_a_held_key_moves_the_world_and_time_can_be_gone_back_in(
    tab: Tab, serve: Serve, tmp_path: Path
) -> None:
    record = tmp_path / "played.ndjson"
    with serve(GameOptions(record=record)) as (url, _):
        enter(tab, url, "step")
        tab.until("document.activeElement.id === 'screen'")
        began = tab.until(f"{THUMBNAILS}[0].dataset.seen && {THUMBNAILS}[0].toDataURL()")
        before, known = tab.evaluate(PIXELS), tab.evaluate(KNOWN)
        tab.key("ArrowLeft", down=True)
        tab.until(f"{KNOWN} > {known + 3}")
        assert tab.evaluate("document.querySelector('kbd[data-code=ArrowLeft]').className") == "held"
        tab.key("ArrowLeft", down=False)
        tab.until("document.querySelector('kbd.held') === null")
        assert tab.evaluate(PIXELS) != before
        click(tab, "[value=pause]")
        tab.key("KeyB", down=True)
        back = marked(tab, 1)
        seen = tab.until(f"{THUMBNAILS}[1].dataset.seen")
        here, known = tab.evaluate(PIXELS), tab.evaluate(KNOWN)
        assert seen == str(known)
        click(tab, "[data-frames='1']")
        tab.until(f"{KNOWN} === {known - 1}")
        assert tab.evaluate(PIXELS) != here
        tab.evaluate(back)
        tab.until(f"{KNOWN} === {known} && {PIXELS} === {here!r}")
        click(tab, "#gallery button:nth-child(2)")
        tab.until(f"{KNOWN} === 1 && {PIXELS} !== {here!r}")
        tab.until("document.querySelectorAll('#tree button').length === 1")
        tab.until(f"{THUMBNAILS}[0].toDataURL() !== {began!r}")
        assert not tab.messages
    kinds = {type(line).__name__ for _, line in read_record(record)[1]}
    assert kinds == {"Start", "Settings", "Played", "Branch", "Rewind", "Visit"}


def test_no_key_stays_held_that_was_let_go_of_beside_another(tab: Tab, serve: Serve) -> None:
    """Keys beside Ctrl, Alt and Meta are the browser's; beside Meta macOS tells of no release."""
    with serve() as (url, _):
        enter(tab, url, "step")
        tab.until("document.activeElement.id === 'screen'")
        tab.key("ArrowLeft", down=True)
        tab.until(f"{HELD} === 'ArrowLeft'")
        tab.key("ControlLeft", down=True, modifiers=CTRL)
        tab.key("ArrowLeft", down=False, modifiers=CTRL)
        tab.until(f"{HELD} === ''")
        for beside in (ALT, CTRL, META):
            tab.key("ArrowDown", down=True, modifiers=beside)
        tab.key("ControlLeft", down=False)
        tab.key("ArrowLeft", down=True)
        tab.until(f"{HELD} === 'ArrowLeft'")
        tab.key("MetaLeft", down=True, modifiers=META)
        tab.until(f"{HELD} === ''")
        tab.key("MetaLeft", down=False)
        tab.key("ArrowLeft", down=True, autoRepeat=True)
        tab.until(f"{HELD} === 'ArrowLeft'")


@pytest.fixture
def mouse_world(world: Path, tmp_path: Path) -> Path:
    """A world of Ctrl, of buttons of the mouse and of no motion."""
    path = tmp_path / "mouse.diagd"
    shutil.copytree(world, path)
    names = {"ControlLeft": "left", "KeyW": "right", "Mouse0": "up", "Mouse2": "down"}
    keys = {code: {"action": name} for code, name in names.items()}
    (path / "controls.json").write_text(json.dumps({"keys": keys}))
    return path


def test_every_button_of_a_mouse_counts_beside_others(tab: Tab, serve: Serve, mouse_world: Path) -> None:
    with serve(bundle=mouse_world) as (url, _):
        enter(tab, url, "step")
        x, y = tab.evaluate(
            "(({x, y}) => [x + 20, y + 20])(document.getElementById('screen').getBoundingClientRect())"
        )

        def told(kind: str, button: str, buttons: int, x: float = x) -> None:
            place = {"x": x, "y": y, "button": button, "buttons": buttons}
            tab.call("Input.dispatchMouseEvent", type=kind, clickCount=1, **place)

        told("mousePressed", "left", 1)
        tab.until(f"{HELD} === 'Mouse0'")
        told("mousePressed", "right", 3)
        tab.until(f"{HELD} === 'Mouse0,Mouse2'")
        told("mouseReleased", "left", 2)
        tab.until(f"{HELD} === 'Mouse2'")
        told("mouseReleased", "right", 0, x=2)  # beside the picture
        tab.until(f"{HELD} === ''")
        tab.key("ControlLeft", down=True, modifiers=CTRL)
        tab.key("KeyW", down=True, modifiers=CTRL)
        tab.until(f"{HELD} === 'ControlLeft,KeyW'")


def test_a_page_whose_frame_forbids_gamepads_plays(tab: Tab, serve: Serve) -> None:
    count = "window.asked = (window.asked ?? 0) + 1"
    deny = f"{{ value() {{ {count}; throw new DOMException('no', 'SecurityError'); }} }}"
    source = f"Object.defineProperty(navigator, 'getGamepads', {deny})"
    script = tab.call("Page.addScriptToEvaluateOnNewDocument", source=source)["identifier"]
    try:
        with serve() as (url, _):
            enter(tab, url, "step")
            tab.until("window.asked > 2")
    finally:
        tab.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


def test_settings_are_chosen_and_wrong_ones_explained(tab: Tab, serve: Serve) -> None:
    with serve() as (url, server):
        enter(tab, url)
        for name, value, known in (
            ("decoder", "diagonal", "k="),
            ("d", "chained", "k=1 chained"),
            ("seed", "5", ""),  # the next change comes before the page is told of this one
            ("temperature", "0.7", "0.7"),
        ):
            tab.evaluate(CHANGE.format(name, value))
            if not known:
                continue
            field, end = "decoder" if name == "d" else name, time.monotonic() + 300
            while not str(getattr(table_of(server).game.settings, field)).startswith(known):
                assert time.monotonic() < end, table_of(server).game.settings
                time.sleep(0.05)
            frames = tab.evaluate(KNOWN)
            tab.until(f"{KNOWN} > {frames + 1}")  # which come behind what the page is told of its change
        settings = table_of(server).game.settings
        assert (settings.decoder, settings.seed, settings.temperature) == ("k=1 chained", 5, 0.7)
        tab.evaluate(CHANGE.format("k", "99"))
        tab.until("!document.getElementById('error').hidden")
        assert table_of(server).game.settings.decoder == "k=1 chained"
        assert tab.evaluate("document.getElementById('autopilot').disabled")


def pause_at_a_mark(tab: Tab, url: str) -> int:
    """Frames known there, whose thumbnail is drawn."""
    enter(tab, url)
    tab.until(f"{KNOWN} > 6")
    click(tab, "[value=pause]")
    tab.key("KeyB", down=True)
    marked(tab, 1)
    return int(tab.until(f"{THUMBNAILS}[1].dataset.seen"))


def test_it_comes_back_to_its_seat(tab: Tab, serve: Serve) -> None:
    with serve() as (url, server):
        known = pause_at_a_mark(tab, url)
        seen = tab.evaluate(f"{THUMBNAILS}[1].toDataURL()")
        click(tab, "[data-frames='1']")
        tab.until(f"{KNOWN} < {known}")
        tab.open(url)
        tab.until(LIVE)
        tab.until("document.querySelectorAll('#tree button').length === 2")
        tab.until(f"{THUMBNAILS}[1].toDataURL() === {seen!r}")
        assert table_of(server).game.known > 5
        tab.evaluate(FULL)
        tab.key("KeyB", down=True)
        marked(tab, 2)
        tab.until(f"{THUMBNAILS}[2].dataset.seen")
        assert not tab.messages
        tab.call("Network.enable")
        tab.call(
            "Network.emulateNetworkConditions",
            offline=True,
            latency=0,
            downloadThroughput=0,
            uploadThroughput=0,
        )
        tab.call(
            "Network.emulateNetworkConditions",
            offline=False,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )
        tab.until(LIVE)


def test_an_update_that_a_newer_one_overtook_is_not_drawn(tab: Tab, serve: Serve) -> None:
    with serve() as (url, _):
        known = pause_at_a_mark(tab, url)
        tab.evaluate(OVERTAKEN)
        click(tab, "[data-frames='1']")
        tab.until("window.release !== undefined")
        click(tab, "[data-frames='1']")
        tab.until(f"{KNOWN} === {known - 2}")
        tab.evaluate("release()")
        tab.settle()
        assert tab.evaluate(KNOWN) == known - 2


def test_a_slow_browser_gets_fresh_frames(tab: Tab, serve: Serve) -> None:
    with serve(rate=100) as (url, server):
        enter(tab, url)
        tab.call("Emulation.setCPUThrottlingRate", rate=20)
        try:
            for _ in range(5):
                tab.evaluate(BUSY)
                shown = tab.evaluate(KNOWN)
                assert shown > 0
                client = server.tables[0].player
                assert isinstance(client, Client)
                assert len(client._unseen) <= 2
                assert not client._texts
        finally:
            tab.call("Emulation.setCPUThrottlingRate", rate=1)
        tab.until(f"{KNOWN} >= {table_of(server).game.known}")


def picture(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), "r") as file:
        return next(file.decode(video=0)).to_ndarray(format="rgb24")


@pytest.mark.parametrize(("width", "mobile"), [(360, True), (1280, False)])
def test_it_fits(tab: Tab, serve: Serve, tmp_path: Path, width: int, mobile: bool) -> None:
    """No sideways scrolling; the world is scaled by whole pixels; buttons are large enough for thumbs."""
    with serve() as (url, _):
        enter(tab, url, "pause")
        tab.resize(width, 780, mobile=mobile)
        tab.evaluate(TOUCH)
        tab.settle()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        scale = tab.evaluate(
            "document.getElementById('screen').getBoundingClientRect().width * devicePixelRatio / 24"
        )
        assert scale == pytest.approx(round(scale))
        assert scale > 10
        small = "[...document.querySelectorAll('#touch button')].every((b) => b.offsetHeight >= 48)"
        assert tab.evaluate(small)
        tab.screenshot(tmp_path / "shot.png")
        shot = picture((tmp_path / "shot.png").read_bytes())
        assert len(np.unique(shot.reshape(-1, 3), axis=0)) > 100


def test_text_edges_and_focus_are_seen(tab: Tab, serve: Serve) -> None:
    """As WCAG 2.2 has it: 1.4.3, 1.4.11 and 2.4.7 of level AA."""
    with serve() as (url, _):
        enter(tab, url, "pause")
        texts, edges = tab.evaluate(CONTRAST)
        assert len(texts) > 40
        assert len(edges) > 15
        assert [text for text, contrast in texts if contrast < 4.5] == []
        assert [edge for edge, contrast in edges if contrast < 3] == []
        seen = set()
        for _ in range(12):
            tab.key("Tab", down=True)
            tab.key("Tab", down=False)
            outline = "getComputedStyle(document.activeElement).outlineStyle"
            seen.add(tab.evaluate(f"[document.activeElement.outerHTML.slice(0, 80), {outline}].join()"))
        assert len(seen) > 8  # different ones
        assert all(one.endswith(",solid") for one in seen)


def test_a_thumb_slides_over_the_pad(tab: Tab, serve: Serve) -> None:
    with serve() as (url, _):
        enter(tab, url, "step")
        tab.evaluate(TOUCH)
        tab.settle()
        tab.evaluate("document.getElementById('pad').scrollIntoView({block: 'center'})")
        x, y, reach = tab.evaluate(PAD)
        held = "[...document.querySelectorAll('kbd.held')].map((k) => k.dataset.code).join()"
        tab.call(
            "Input.dispatchMouseEvent",
            type="mousePressed",
            x=x - 0.8 * reach,
            y=y,
            button="left",
            clickCount=1,
        )
        tab.until(f"{held} === 'ArrowLeft'")
        tab.call(
            "Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y - 0.8 * reach, button="left", buttons=1
        )
        tab.until(f"{held} === 'ArrowUp'")
        tab.call(
            "Input.dispatchMouseEvent",
            type="mouseReleased",
            x=x,
            y=y - 0.8 * reach,
            button="left",
            clickCount=1,
        )
        tab.until(f"{held} === ''")


def test_a_browser_that_lets_nothing_be_kept_plays(tab: Tab, serve: Serve) -> None:
    """As browsers do that block the data of sites: storage cannot even be asked for."""
    deny = "{ get() { throw new DOMException('denied', 'SecurityError'); } }"
    source = f"for (const s of ['localStorage', 'sessionStorage']) Object.defineProperty(window, s, {deny})"
    script = tab.call("Page.addScriptToEvaluateOnNewDocument", source=source)["identifier"]
    try:
        with serve() as (url, _):
            enter(tab, url, "step")
            click(tab, "[data-do=branch]")
            tab.until(f"{THUMBNAILS}.length === 2")
        assert not [message for message in tab.messages if "SecurityError" in message]
    finally:
        tab.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


def test_a_proxy_that_passes_pages_alone_is_explained(tab: Tab, serve: Serve) -> None:
    source = "window.WebSocket = class extends WebSocket { constructor(url) { super(`${url}s`); } }"
    script = tab.call("Page.addScriptToEvaluateOnNewDocument", source=source)["identifier"]
    try:
        with serve() as (url, _):
            tab.open(url)
            tab.until(
                "document.getElementById('cover').textContent.includes('pass upgrades to WebSocket on')"
            )
    finally:
        tab.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


def test_a_wrong_token_is_explained(tab: Tab, serve: Serve) -> None:
    with serve() as (url, _):
        tab.open(url.partition("#")[0] + "#wrong")
        tab.until(f"!{COVER} && document.getElementById('cover').textContent.includes('no valid token')")
