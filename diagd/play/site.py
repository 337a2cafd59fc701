"""The files of the page, and who may ask for them."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from http import HTTPStatus
from importlib import resources
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator

from diagd.errors import UsageError
from diagd.options import NAMES

KINDS: Final = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
SOCKET: Final = "/socket"

_ANYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
"""All addresses of a machine, by which browsers find no page, and one of them."""


def _public(address: str) -> str:
    if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#]*)?", address):
        raise ValueError(f"expected addresses such as https://play.example.com/worlds, got '{address}'")
    return re.sub(r"^(http://[^/]*):80(?=/|$)|^(https://[^/]*):443(?=/|$)", r"\1\2", address).rstrip("/")


Public = Annotated[tuple[Annotated[str, AfterValidator(_public)], ...], NAMES]
"""Addresses by which a proxy, a tunnel or a container leads to a server."""


def page_address(host: str, port: int, public: Sequence[str]) -> str:
    """Where a page is found; a server at all addresses is, where nothing else is told, on this machine."""
    named = _ANYWHERE.get(host, host)
    in_url = f"[{named}]" if ":" in named else named
    return public[0] if public else f"http://{in_url}:{port}"


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
    here: the first is told by ``Origin``, the second by ``Host``. Both may also be of one of ``public``. What
    sends no ``Host`` is no browser: load balancers ask after health so.
    """

    def __init__(self, host: str, port: int, public: Sequence[str] = ()) -> None:
        urls = [urlsplit(address.lower()) for address in public]
        ports = (f"{url.netloc}:{443 if url.scheme == 'https' else 80}" for url in urls if url.port is None)
        self._port, self._hosts = port, {url.netloc for url in urls} | {*ports}  # as some proxies say it
        self._origins = {f"{url.scheme}://{url.netloc}" for url in urls}
        name = socket.gethostname().lower()
        self._names = {"localhost", host.lower(), name, f"{name}.local"}  # as multicast DNS has it
        self._files = {
            f"/{name}": (KINDS[name.rpartition(".")[2]], body.decode()) for name, body in page_files().items()
        }
        self._files["/"] = self._files["/index.html"]

    def refusal(self, path: str, host: str | None, origin: str | None) -> str | None:
        """Why a request is not answered; None: it is."""
        if host is None and path != SOCKET:
            return None
        if not self._is_ours(host) and (host or "").lower() not in self._hosts:
            return "the Host of the request is not this server's; --set public=ADDRESS tells it of a proxy"
        if origin not in {None, f"http://{host}", *self._origins}:
            return "the Origin of the request is another site"
        if path == SOCKET and origin is None:
            return "the request has no Origin"
        return None

    def _is_ours(self, host: str | None) -> bool:
        match = re.fullmatch(r"(\[[^]]*\]|[^:]*)(?::([0-9]+))?", (host or "").lower())
        if match is None or (match[2] or "80") != str(self._port):  # browsers leave the 80 of HTTP out
            return False
        name = match[1].strip("[]")
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True  # no name that could be made to lead here

    def answer(self, path: str, host: str | None) -> Answer:
        """A file of the page, or what there is instead."""
        own = [f"http://{host}"] if host else []
        sockets = " ".join(f"ws{origin[4:]}" for origin in (*own, *sorted(self._origins)))
        policy = (
            f"default-src 'self'; connect-src 'self' {sockets}; frame-ancestors 'none'; base-uri 'none'; "
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
