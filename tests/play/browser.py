"""A headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
KEYS = {
    "ArrowLeft": ("ArrowLeft", 37),
    "ArrowRight": ("ArrowRight", 39),
    "ArrowUp": ("ArrowUp", 38),
    "ArrowDown": ("ArrowDown", 40),
    "KeyP": ("p", 80),
    "KeyB": ("b", 66),
    "Backspace": ("Backspace", 8),
    "Tab": ("Tab", 9),
    "ControlLeft": ("Control", 17),
    "MetaLeft": ("Meta", 91),
}


class Tab:
    """One page of the browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.messages: list[str] = []  # of the console, errors included
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=300))
            if message.get("id") == number:
                assert "error" not in message, message
                made: dict[str, Any] = message["result"]
                return made
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.messages.append(json.dumps(message["params"]))

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 300.0) -> Any:
        """Wait until an expression is true; its value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(f"(() => {{ try {{ return {expression}; }} catch {{}} }})()")):
            assert time.monotonic() < end, f"never came true: {expression}; {self.messages[-3:]}"
            time.sleep(0.05)
        return value

    def key(self, code: str, *, down: bool, **further: Any) -> None:
        key, number = KEYS.get(code, (code[-1].lower(), ord(code[-1])))
        kind = "keyDown" if down else "keyUp"
        told = {"type": kind, "code": code, "key": key, "windowsVirtualKeyCode": number}
        self.call("Input.dispatchKeyEvent", **told, **further)

    def mouse(self, kind: str, x: float, y: float, *, held: bool = True) -> None:
        """One of ``mousePressed``, ``mouseMoved`` and ``mouseReleased``."""
        button = {"button": "left", "buttons": int(held), "clickCount": 1} if held else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url="about:blank")
        self.messages.clear()  # of the page before, whose server may be gone
        self.call("Page.navigate", url=url)

    def resize(self, width: int, height: int, *, mobile: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if mobile else 1,
            mobile=mobile,
        )

    def settle(self) -> None:
        """Wait until what was changed is laid out and painted."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(folder: Path, *further: str) -> Iterator[Tab]:
    """A tab of a browser of its own, perhaps with further flags."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--mute-audio"]
    flags += ["--remote-allow-origins=*", "--no-first-run", f"--user-data-dir={folder}"]
    process = subprocess.Popen(
        [str(CHROMIUM), *flags, *further, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield from _tab(folder)
    finally:
        process.terminate()
        process.wait(120)


def _tab(folder: Path) -> Iterator[Tab]:
    port, end = folder / "DevToolsActivePort", time.monotonic() + 300
    while not (port.is_file() and port.read_text().strip()):
        assert time.monotonic() < end, "Chromium did not start"
        time.sleep(0.1)
    number = port.read_text().splitlines()[0]
    pages: list[dict[str, Any]] = []
    while not pages:
        assert time.monotonic() < end, "Chromium has no page"
        with urllib.request.urlopen(f"http://127.0.0.1:{number}/json/list") as answer:
            pages = [page for page in json.load(answer) if page["type"] == "page"]
    patient: dict[str, Any] = {"open_timeout": 120, "max_size": None, "ping_interval": None}
    with connect(pages[0]["webSocketDebuggerUrl"], **patient) as socket:
        yield Tab(socket)
