"""Headers of Hub repositories: the real client against a local server that speaks the Hub's protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
from safetensors.numpy import save

from diagd.errors import CheckpointError
from diagd.planning.remote import check_shapes

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One repository with a large file, and one without safetensors."""

    files: ClassVar[dict[str, bytes]] = {}
    sent: ClassVar[int] = 0

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        content = Hub.files.get("/".join(parts[:2] + parts[4:]))
        self.send_response(404 if content is None else 200)
        content = content or b""
        if (span := self.headers.get("range")) and span.startswith("bytes="):
            first, last = (int(edge) for edge in span.removeprefix("bytes=").split("-"))
            content = content[first : last + 1]
        if not content:
            self.send_header("X-Error-Code", "EntryNotFound")
        for name, value in {
            "ETag": '"x"',
            "X-Repo-Commit": COMMIT,
            "Content-Length": str(len(content)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)
            Hub.sent += len(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    tensors = {"big": np.zeros((512, 1024), np.float32), "small": np.zeros(7, np.float16)}
    Hub.files = {"org/model/model.safetensors": save(tensors), "org/other/weights.bin": b"x"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


PROGRAM = """
import json, sys
from diagd.errors import CheckpointError
from diagd.planning.remote import remote_shapes
for repo in sys.argv[1:]:
    try:
        print(json.dumps(remote_shapes(repo, None)))
    except CheckpointError as error:
        print(json.dumps(str(error)))
"""


def read(endpoint: str, *repos: str) -> list[object]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    program = [sys.executable, "-c", PROGRAM, *repos]
    done = subprocess.run(program, check=True, capture_output=True, text=True, env=environment, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_only_headers_are_fetched(endpoint: str) -> None:
    Hub.sent = 0
    shapes, other = read(endpoint, "org/model", "org/other")
    assert shapes == {"big": [512, 1024], "small": [7]}
    assert 0 < Hub.sent < 200_000 < len(Hub.files["org/model/model.safetensors"])
    assert "no model.safetensors" in str(other)


def test_a_hub_out_of_reach_is_told() -> None:
    assert "cannot be read" in str(read("http://127.0.0.1:9", "org/model")[0])


def test_other_shapes_are_refused() -> None:
    check_shapes("org/model", {"a": (1, 2), "extra": (3,)}, {"a": (1, 2)})
    with pytest.raises(CheckpointError, match=r"a \[2, 1\], expected \[1, 2\]; b missing, expected \[3\]"):
        check_shapes("org/model", {"a": (2, 1)}, {"a": (1, 2), "b": (3,)})
