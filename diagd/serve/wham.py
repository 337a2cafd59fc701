"""What the clients of WHAM's released server say, and what they are answered, by HTTP."""

from __future__ import annotations

import io
import json
import re
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence
from email.parser import BytesParser
from email.policy import HTTP
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import parse_qs, urlsplit
from zipfile import ZipFile, ZipInfo

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from typing_extensions import override

from diagd.bundle import Manifest
from diagd.bundle.actions import ActionCodec, EdgesSlot, FirstPressedSlot, OnlyPressedSlot
from diagd.engines.engine import Int
from diagd.errors import DiagdError, UsageError
from diagd.play.messages import without_paths
from diagd.play.pictures import png
from diagd.play.site import Site, cannot_listen
from diagd.runtime.actions import encode
from diagd.runtime.pictures import sized
from diagd.runtime.pixels import PixelCodec, Pixels
from diagd.runtime.sampling import SamplingSettings
from diagd.serve.dreamer import Context, Dreamer, Dreamt, Job

PREDICTIONS: Final = "predictions.json"
MAX_PIXELS: Final = 1 << 24
"""Of a picture that is taken."""

_MAX_SEED: Final = 1 << 53


def _number(value: object) -> object:
    """Numbers come as text, "none" in place of one that is not given."""
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


NONE = BeforeValidator(_number)
Vector = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1, max_length=64)]


class _Said(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Step(_Said):
    """A known frame: the name of its picture, the action at it, and its tokens where they are known."""

    image_name: Annotated[str, Field(max_length=200)] = ""
    action: Vector
    tokens: Annotated[list[int], Field(max_length=1 << 16)] = []


class Future(_Said):
    """An action in place of the model's own."""

    action: Vector


class Order(_Said):
    """What ``/new_job`` is asked for."""

    num_steps_to_predict: Annotated[int, Field(ge=1)]
    num_parallel_predictions: Annotated[int, Field(ge=1, le=1000)] = 1
    temperature: Annotated[Annotated[float, Field(ge=0, le=100)] | None, NONE] = 0.9
    top_k: Annotated[Annotated[float, Field(ge=0, le=1 << 24)] | None, NONE] = None
    top_p: Annotated[Annotated[float, Field(gt=0, le=1)] | None, NONE] = 1.0
    max_context_length: Annotated[Annotated[float, Field(ge=1)] | None, NONE] = 10
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=100)]
    future_actions: Annotated[tuple[Future, ...], Field(max_length=1000)] = ()

    @property
    def settings(self) -> SamplingSettings:
        """How tokens are drawn."""
        return SamplingSettings(self.temperature or 0.0, int(self.top_k or 0), self.top_p or 1.0)


class Wham:
    """Between the wire and a bundle.

    ``most_steps`` are frames of a dream; ``seed`` is that of the first one, later ones in order, None: any.

    Raises:
        UsageError: the model's actions are no vectors.
    """

    def __init__(
        self, manifest: Manifest, pixels: PixelCodec, window: int, most_steps: int, seed: int | None = None
    ) -> None:
        codec = manifest.actions
        if codec is None or not any(isinstance(slot, EdgesSlot) for slot in codec.slots):
            raise UsageError(
                f"{manifest.name} is no WHAM: its actions are no vectors of buttons and sticks; "
                "play it with diagd-play"
            )
        self.manifest, self._codec, self._pixels = manifest, codec, pixels
        self._window, self.most_steps = window, most_steps
        self._seeds = iter(partial(secrets.randbelow, _MAX_SEED), None) if seed is None else count(seed)
        self._encoding = threading.Lock()

    def jobs(self, kind: str, body: bytes) -> list[Job]:
        """The dreams that a form orders.

        ``kind`` is its Content-Type.

        Raises:
            UsageError: something of it is missing or wrong.
        """
        fields = _form(kind, body)
        if "json" not in fields:
            raise UsageError("the form has no field json")
        order = _order(fields["json"])
        if order.num_steps_to_predict > self.most_steps:
            raise UsageError(f"num_steps_to_predict too large. Max {self.most_steps}")
        context = self._context(order, fields)
        return [Job(context, seed) for seed in islice(self._seeds, order.num_parallel_predictions)]

    def _context(self, order: Order, fields: Mapping[str, bytes]) -> Context:
        known = order.steps[: int(order.max_context_length or self._window)]
        known = known[-(self._window - 1) :]
        actions = np.stack([self._ids(step.action) for step in known])
        led = np.concatenate([encode(self._codec, {})[None], actions[:-1]])
        future = [self._ids(step.action) for step in order.future_actions]
        tokens = np.stack([self._tokens(step, fields) for step in known])
        done = np.stack([actions[-1], *future])
        return Context(tokens, led, done, order.settings, order.num_steps_to_predict)

    def _tokens(self, step: Step, fields: Mapping[str, bytes]) -> Int:
        """Those that are given, else those of the picture."""
        layout = self.manifest.layout
        if step.tokens:
            tokens, most = np.array(step.tokens), self.manifest.sampling.ranges[0].high
            if len(tokens) != layout.cells or tokens.min() < 0 or tokens.max() >= most:
                raise UsageError(
                    f"tokens of {step.image_name or 'a step'}: expected {layout.cells}, 0..{most - 1} each"
                )
            return tokens.astype(np.int32).reshape(layout.rows, layout.columns)
        if step.image_name not in fields:
            raise UsageError(f"no file has the image_name {step.image_name[:80]!r}")
        picture = _picture(fields[step.image_name], step.image_name)
        name, size = Path(step.image_name), self._pixels.spec.size
        picture = sized(picture[None], name, size, resize=True, cover=False)
        with self._encoding:
            encoded: Int = self._pixels.encode(picture)[0]
        return encoded

    def _ids(self, vector: Sequence[float]) -> Int:
        """Ids [n] of an action as the wire has it: buttons 0 or 1, then sticks from -1 to 1."""
        slots, values = self._codec.slots, list(vector)
        if len(values) != len(slots):
            raise UsageError(f"an action has {len(values)} numbers; expected {len(slots)}")
        record: dict[str, Any] = {}
        for slot, value in zip(slots, values, strict=True):
            if isinstance(slot, EdgesSlot):
                record.setdefault(slot.field, []).append(value)
            elif isinstance(slot, FirstPressedSlot | OnlyPressedSlot):
                record[slot.buttons[0].name] = value
        return encode(self._codec, record)


def vector_of(codec: ActionCodec, ids: Int) -> list[float]:
    """An action as the wire has it; of a stick, the middle of its bin."""
    return [
        round(sum(slot.edges[token - slot.first :][:2]) / 2, 6)
        if isinstance(slot, EdgesSlot)
        else float(token == slot.ids[0])
        for slot, token in zip(codec.slots, ids.tolist(), strict=True)
    ]


def packed(manifest: Manifest, dreamt: Sequence[Dreamt]) -> bytes:
    """The .zip of some frames: what is said of them, and their pictures.

    It tells no time: the format has none for clocks that begin anew in 1970.
    """
    assert manifest.actions is not None
    target, listed = io.BytesIO(), []
    with ZipFile(target, "w") as archive:
        for one in dreamt:
            name = f"{one.job}_{one.index}.png"
            program = manifest.mark.program if manifest.mark else None
            archive.writestr(ZipInfo(name), png(one.picture, program))
            listed.append(
                {
                    "job_id": one.job,
                    "dream_step_index": one.index,
                    "action": vector_of(manifest.actions, one.action),
                    "tokens": one.tokens.reshape(-1).tolist(),
                    "image_filename": name,
                }
            )
        archive.writestr(ZipInfo(PREDICTIONS), json.dumps(listed))
    return target.getvalue()


def _order(text: bytes) -> Order:
    try:
        return Order.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:80]
        problem = "not in request" if first["type"] == "missing" else first["msg"]
        raise UsageError(f"{where} {problem}") from None


def _form(kind: str, body: bytes) -> dict[str, bytes]:
    """Fields and files of a multipart form, by name."""
    head = f"Content-Type: {kind}\r\nMIME-Version: 1.0\r\n\r\n".encode("latin-1", "replace")
    message = BytesParser(policy=HTTP).parsebytes(head + body)
    if message.get_content_type() != "multipart/form-data" or not message.is_multipart():
        raise UsageError("expected a form, multipart/form-data")
    found: dict[str, bytes] = {}
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if isinstance(name, str) and isinstance(content, bytes):
            found[name] = content
    return found


def _picture(content: bytes, name: str) -> Pixels:
    """Turned as its camera was held, and over black where it is transparent, as everywhere."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "BMP", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has more than {MAX_PIXELS >> 20} megapixels")
            shown = ImageOps.exif_transpose(image).convert("RGBA")
            return np.asarray(Image.alpha_composite(Image.new("RGBA", shown.size, "black"), shown))[..., :3]
    except Exception as error:  # Pillow raises whatever its parsers meet
        raise UsageError(f"{name[:80]} is no picture: {error}") from None


MAX_BODY: Final = 64 << 20
"""Bytes of a request: a context of pictures without loss, and more."""

MAX_CONNECTIONS: Final = 32
_SECONDS: Final = 30.0


class DreamServer(ThreadingHTTPServer):
    """Serves one dreamer.

    Port 0 is any that is free; ``public`` is of the `Site`. The dreamer is closed by whoever made it.

    Raises:
        UsageError: nobody can listen there.
    """

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], wham: Wham, dreamer: Dreamer, public: Sequence[str] = ()
    ) -> None:
        try:
            self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
            super().__init__(address, _Handler)
        except (OSError, UnicodeError) as error:
            raise cannot_listen(*address, error) from None
        self.wham, self.dreamer = wham, dreamer
        self.site = Site(address[0], self.server_port, public)
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
        asked, wham, dreamer = parse_qs(url.query, max_num_fields=1000), self.server.wham, self.server.dreamer
        if url.path == "/":
            told = {
                "model_file": wham.manifest.name,
                "max_concurrent_jobs": dreamer.most,
                "max_dream_steps_per_job": wham.most_steps,
                "max_job_lifespan": dreamer.lifespan,
            }
            self._send(HTTPStatus.OK, json.dumps(told).encode(), "application/json")
        elif url.path == "/get_job_results":
            dreamt = dreamer.collect(_needed(asked, "job_ids"))
            if dreamt:
                self._send(HTTPStatus.OK, packed(wham.manifest, dreamt), "application/zip")
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
