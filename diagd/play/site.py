"""The files of the page, and who may ask for them."""

from __future__ import annotations

import ipaddress
import socket
from http import HTTPStatus
from importlib import resources
from typing import Final

from diagd.errors import UsageError

KINDS: Final = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
SOCKET: Final = "/socket"


def in_url(host: str) -> str:
    """A host as addresses of pages have it."""
    return f"[{host}]" if ":" in host else host


def cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> UsageError:
    """What there is to say where nobody can listen."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UsageError(f"cannot listen on {host}, port {port}: {reason}; choose another --port or --host")


def page_files() -> dict[str, bytes]:
    """The files of the page by name."""
    folder = resources.files("diagd.play") / "page"
    files = (file for file in folder.iterdir() if file.name.rpartition(".")[2] in KINDS)
    return {file.name: file.read_bytes() for file in files}


Answer = tuple[HTTPStatus, dict[str, str], str]
"""Status, headers and text that a request gets."""


class Site:
    """Serves the page's files from the package to those who came by its own address.

    A page of another site can open a socket to this machine, and a name of another site can be made to lead
    here: the first is told by ``Origin``, the second by ``Host``.
    """

    def __init__(self, host: str, port: int) -> None:
        self._port = port
        self._names = {"localhost", host.lower(), socket.gethostname().lower()}
        self._files = {
            f"/{name}": (KINDS[name.rpartition(".")[2]], body.decode()) for name, body in page_files().items()
        }
        self._files["/"] = self._files["/index.html"]

    def refusal(self, path: str, host: str | None, origin: str | None) -> str | None:
        """Why a request is not answered; None: it is."""
        if not self._is_ours(host):
            return "the Host of the request is not this server's"
        if origin is not None and origin != f"http://{host}":
            return "the Origin of the request is another site"
        if path == SOCKET and origin is None:
            return "the request has no Origin"
        return None

    def _is_ours(self, host: str | None) -> bool:
        name, colon, port = (host or "").lower().rpartition(":")
        if not colon or port != str(self._port):
            return False
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name in self._names
        return True  # no name that could be made to lead here

    def answer(self, path: str, host: str) -> Answer:
        """A file of the page, or what there is instead."""
        policy = (
            f"default-src 'self'; connect-src 'self' ws://{host}; frame-ancestors 'none'; base-uri 'none'; "
            "form-action 'none'; object-src 'none'"
        )
        kind, text = self._files.get(path.partition("?")[0], ("", "there is nothing here\n"))
        status = HTTPStatus.OK if kind else HTTPStatus.NOT_FOUND
        headers = {
            "Content-Type": f"{kind or 'text/plain'}; charset=utf-8",
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        return status, headers, text
