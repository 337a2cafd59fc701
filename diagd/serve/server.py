"""HTTP in front of the dreamer, as the released server of WHAM answers it."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from typing_extensions import override

from diagd.bundle import Manifest
from diagd.errors import DiagdError, UsageError
from diagd.play.messages import without_paths
from diagd.play.site import Site, cannot_listen
from diagd.serve.dreamer import Dreamer
from diagd.serve.wham import Wham, packed

MAX_BODY: Final = 64 << 20
"""Bytes of a request: a context of pictures without loss, and more."""

MAX_CONNECTIONS: Final = 32
_SECONDS: Final = 30.0


class DreamServer(ThreadingHTTPServer):
    """Serves one dreamer.

    Port 0 is any that is free. The dreamer is closed by whoever made it; ``limits`` are what ``GET /`` tells,
    by name.

    Raises:
        UsageError: nobody can listen there.
    """

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        wham: Wham,
        dreamer: Dreamer,
        manifest: Manifest,
        limits: Mapping[str, int],
    ) -> None:
        try:
            self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
            super().__init__(address, _Handler)
        except (OSError, UnicodeError) as error:
            raise cannot_listen(*address, error) from None
        self.wham, self.dreamer, self.manifest, self.limits = wham, dreamer, manifest, dict(limits)
        self.site = Site(address[0], self.server_port)
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)

    @override
    def process_request(self, request: Any, client_address: Any) -> None:
        """Leave out whoever comes while too many are here."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    @override
    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


class _Handler(BaseHTTPRequestHandler):
    server: DreamServer
    timeout = _SECONDS
    server_version, sys_version = "diagd", ""

    def do_GET(self) -> None:
        """Details, results, cancelling."""
        self._guarded(self._get)

    def do_POST(self) -> None:
        """New jobs."""
        self._guarded(self._post)

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a client asks for results several times a second."""

    def _guarded(self, answer: Any) -> None:
        site, headers = self.server.site, self.headers
        if refusal := site.refusal(self.path, headers.get("Host"), headers.get("Origin")):
            self._send(HTTPStatus.FORBIDDEN, f"{refusal}\n".encode())
            return
        try:
            answer()
        except DiagdError as error:
            self._send(HTTPStatus.BAD_REQUEST, without_paths(str(error)).encode())
        except OSError:  # whoever asked has gone
            self.close_connection = True
        except Exception as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, f"internal error: {type(error).__name__}\n".encode())

    def _get(self) -> None:
        url = urlsplit(self.path)
        asked, dreamer = parse_qs(url.query, max_num_fields=1000), self.server.dreamer
        if url.path == "/":
            told = {"model_file": self.server.manifest.name} | self.server.limits
            self._send(HTTPStatus.OK, json.dumps(told).encode(), "application/json")
        elif url.path == "/get_job_results":
            dreamt = dreamer.collect(_needed(asked, "job_ids"))
            if dreamt:
                self._send(HTTPStatus.OK, packed(self.server.manifest, dreamt), "application/zip")
            else:
                self._send(HTTPStatus.NO_CONTENT, b"")
        elif url.path == "/cancel_job":
            dreamer.cancel(_needed(asked, "job_id")[0])
            self._send(HTTPStatus.OK, b"OK")
        else:
            self._send(HTTPStatus.NOT_FOUND, b"there is nothing here\n")

    def _post(self) -> None:
        if self.path != "/new_job":
            self._send(HTTPStatus.NOT_FOUND, b"there is nothing here\n")
            return
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,12}", length) or int(length) > MAX_BODY:
            self.close_connection = True
            self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {MAX_BODY} bytes\n".encode())
            return
        body = self.rfile.read(int(length))
        jobs = self.server.wham.jobs(self.headers.get("Content-Type", ""), body)
        waiting = self.server.dreamer.order(jobs)
        told = {"job_ids": [job.name for job in jobs], "current_jobs_in_queue": waiting}
        self._send(HTTPStatus.OK, json.dumps(told).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)


def _needed(asked: Mapping[str, list[str]], name: str) -> list[str]:
    if name not in asked:
        raise UsageError(f"{name} not in request")
    return asked[name]
