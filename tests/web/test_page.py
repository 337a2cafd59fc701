"""The page in a browser: played, recorded, on a phone, isolated, on a GPU."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from typing_extensions import override

from diagd.bundle import Bundle
from diagd.play.opening import SHIPPED, GameOptions, open_replay
from diagd.play.record import Start, replay
from diagd.web.folder import write_page
from tests.play.browser import CHROMIUM, Tab, browser
from tests.play.test_page import CHANGE, KNOWN, LIVE, PIXELS, THUMBNAILS, TOUCH, click, marked, picture
from tests.web.conftest import Serve

MAX_BYTES = 8_000_000
UPLOAD = """(() => {{
  const files = new DataTransfer(), input = document.getElementById("upload");
  files.items.add(new File([Uint8Array.from({})], "picture.png"));
  input.files = files.files;
  input.dispatchEvent(new Event("change"));
}})()"""


def enter(tab: Tab, url: str) -> None:
    tab.open(url)
    tab.until(LIVE)
    tab.until(f"{THUMBNAILS}.length && {KNOWN} >= 1")


def test_what_is_played_is_played_again_by_python(
    tab: Tab, page: Path, world: Path, serve: Serve, tmp_path: Path
) -> None:
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    with serve(page) as url:
        tab.resize(1280, 900)
        enter(tab, url)
        tab.until(f"{KNOWN} > 20")
        click(tab, "[value=step]")
        tab.evaluate("document.getElementById('screen').focus()")
        known = tab.evaluate(KNOWN)
        tab.key("ArrowLeft", down=True)
        tab.until(f"{KNOWN} > {known + 3}")
        tab.key("ArrowLeft", down=False)
        click(tab, "[value=pause]")
        tab.key("KeyB", down=True)
        back = marked(tab, 1)
        tab.until(f"{THUMBNAILS}[1].dataset.seen")
        here, known = tab.evaluate(PIXELS), tab.evaluate(KNOWN)
        click(tab, "[data-frames='10']")
        tab.until(f"{KNOWN} === {known - 10}")
        for name, value in (("decoder", "diagonal"), ("d", "chained"), ("temperature", "0.8"), ("seed", "9")):
            tab.evaluate(CHANGE.format(name, value))
            tab.until(f"document.getElementById('settings').elements[{name!r}].value === {value!r}")
        click(tab, "[value=live]")
        tab.until(f"{KNOWN} > {known}")
        tab.evaluate(back)
        tab.until(f"{KNOWN} !== {known} || {PIXELS} === {here!r}")
        tab.until(f"{KNOWN} > {known + 5}")
        click(tab, "[value=pause]")
        click(tab, "[data-do=audit]")
        tab.until("document.getElementById('hud-audit').textContent.includes('frames')")
        click(tab, "#gallery button:nth-child(2)")
        tab.until(f"{KNOWN} === 1")
        before = tab.evaluate(PIXELS)
        tab.evaluate(UPLOAD.format(list((world / "prompts" / "2.png").read_bytes())))
        tab.until(f"{PIXELS} !== {before!r}")
        click(tab, "[data-do=save]")
        record = wait_for(tmp_path / "play.ndjson")
        assert not tab.messages
        tab.evaluate(CHANGE.format("k", "99"))
        tab.until("document.getElementById('error').textContent.includes('k=99 is outside 1..6')")
    game, lines = open_replay(world, record, GameOptions())
    with game:
        assert len(list(replay(game, lines))) > 30
    uploaded = [line for _, line in lines if isinstance(line, Start)][-1]
    assert np.ravel(uploaded.start).tolist() == json.loads((page / "world.json").read_text())["prompts"][2][0]
    kinds = {type(line).__name__ for _, line in lines}
    assert kinds >= {"Start", "Settings", "Played", "Branch", "Rewind", "Visit", "Audited"}


def test_from_the_disk_it_says_what_it_takes(tab: Tab, page: Path) -> None:
    tab.open(page.joinpath("index.html").as_uri())
    tab.until("document.getElementById('cover').textContent.includes('Serve its folder')")
    assert tab.evaluate("document.getElementById('cover').hidden") is False


class Keeping(SimpleHTTPRequestHandler):
    """A host that lets browsers keep all for an hour."""

    @override
    def end_headers(self) -> None:
        self.send_header("Cache-Control", "max-age=3600")
        super().end_headers()


def test_a_world_that_took_the_place_of_another_is_played(tab: Tab, page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    shutil.copytree(page, folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Keeping, directory=str(folder))) as host:
        threading.Thread(target=host.serve_forever).start()
        try:
            enter(tab, f"http://127.0.0.1:{host.server_port}/")
            spec = folder / "world.json"
            spec.write_text(json.dumps(json.loads(spec.read_text()) | {"name": "another"}))
            os.utime(spec, (time.time() + 60,) * 2)
            enter(tab, f"http://127.0.0.1:{host.server_port}/")
            assert tab.evaluate("document.getElementById('name').textContent") == "another"
        finally:
            host.shutdown()


def wait_for(file: Path) -> Path:
    for _ in range(3000):
        if file.is_file():
            return file
        threading.Event().wait(0.1)
    raise AssertionError(f"{file} never came")


def test_the_shipped_world_is_small_and_fits_a_phone(
    tab: Tab, runtime: dict[str, bytes], serve: Serve, tmp_path: Path
) -> None:
    made = write_page(Bundle.open(SHIPPED), tmp_path / "page", lambda: runtime)
    assert made.precision == "int8-dynamic"
    assert made.download <= MAX_BYTES
    assert sum(file.stat().st_size for file in made.path.iterdir()) <= MAX_BYTES
    with serve(made.path) as url:
        tab.resize(360, 780, mobile=True)
        enter(tab, url)
        tab.evaluate(TOUCH)
        tab.until(f"{KNOWN} >= 3")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert tab.evaluate("document.getElementById('name').textContent") == "crafter-3m"
        assert tab.evaluate("document.querySelectorAll('#gallery button').length") == 12
        tab.screenshot(tmp_path / "shot.png")
        shot = picture((tmp_path / "shot.png").read_bytes())
        assert len(np.unique(shot.reshape(-1, 3), axis=0)) > 100
        assert not tab.messages


NO_STORAGE = (
    "Object.defineProperty(window, 'sessionStorage', { get() { throw new DOMException('denied'); } });"
)
NO_WORKER = "ServiceWorkerContainer.prototype.register = async () => { throw new DOMException('denied'); };"


@pytest.mark.parametrize(
    ("headers", "blocked"),
    [(True, ""), (False, ""), (False, NO_STORAGE), (False, NO_STORAGE + NO_WORKER)],
    ids=["headers", "service worker", "no storage", "nothing kept"],
)
def test_threads_where_the_page_is_isolated(
    tab: Tab, page: Path, serve: Serve, headers: bool, blocked: str
) -> None:
    script = tab.call("Page.addScriptToEvaluateOnNewDocument", source=blocked)["identifier"]
    if headers:
        tab.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
        with serve(page) as url:
            enter(tab, f"{url}?threads=2")
            assert tab.evaluate("crossOriginIsolated")
            tab.until(f"{KNOWN} >= 3")
            return
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(page))
    ) as plain:
        thread = threading.Thread(target=plain.serve_forever)
        thread.start()
        try:
            enter(tab, f"http://127.0.0.1:{plain.server_port}/?threads=2")
            tab.until("!crossOriginIsolated" if NO_WORKER in blocked else "crossOriginIsolated")
            tab.until(f"{KNOWN} >= 3")
        finally:
            tab.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
            plain.shutdown()
            thread.join()


def test_one_thread_plays_where_memory_is_not_shared(
    tab: Tab, page: Path, serve: Serve, tmp_path: Path
) -> None:
    """As in WebKitGTK, which is isolated without."""
    folder = shutil.copytree(page, tmp_path / "page")
    worker = folder / "worker.js"
    worker.write_text(f"delete self.SharedArrayBuffer;\n{worker.read_text()}")
    with serve(folder) as url:
        enter(tab, f"{url}?threads=2")
        assert tab.evaluate("crossOriginIsolated")
        tab.until(f"{KNOWN} >= 3")


@pytest.mark.slow
def test_a_frame_on_webgpu_is_that_of_wasm(
    page: Path, world: Path, runtime: dict[str, bytes], serve: Serve, tmp_path: Path
) -> None:
    """And one more behind keys that were turned back there; on a device in software."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    made = write_page(Bundle.open(world), tmp_path / "page", lambda: runtime, webgpu=True)
    flags = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    frame = (
        "(async () => { const { World } = await import('./world.js');"
        "const world = await World.open(location.href);"
        "const { session, spec } = world; session.start(spec.prompts[0], [spec.rest]);"
        "await session.follow(() => spec.rest, { ...spec.settings, temperature: 1, seed: 3 });"
        "const decode = world.strategy('k=1 serial'); await decode(session);"
        "await session.context.rebase(1); await decode(session);"
        "return [world.runtime.constructor.name, session.frames.slice(1).map((one) => [...one.tokens])]; })()"
    )
    found = {}
    with browser(tmp_path / "browser", *flags) as tab:
        for folder in (made.path, page):
            with serve(folder) as url:
                tab.open(f"{url}style.css")
                tab.until("document.body.textContent.includes('--ground')")
                name, found[folder] = tab.evaluate(frame)
                assert name == ("GpuRuntime" if folder == made.path else "Runtime")
    assert found[made.path] == found[page]
