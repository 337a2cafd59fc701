"""The released server's protocol, by a scripted client over real sockets."""

from __future__ import annotations

import io
import json
import struct
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diagd.bundle import Bundle
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.export.families.mineworld import mineworld_actions
from diagd.runtime.actions import encode
from diagd.runtime.options import SessionOptions
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.sampling import SamplingSettings
from diagd.serve.dreamer import Dreamer
from diagd.serve.wham import DreamServer, Wham, _picture, vector_of

RUNNING = SessionOptions(cpu=CpuOptions(1, prepack=False))
LIMITS = {"max_concurrent_jobs": 6, "max_dream_steps_per_job": 4, "max_job_lifespan": 60}
MIDDLES = [-1, -0.85, -0.625, -0.375, -0.15, 0, 0.15, 0.375, 0.625, 0.85, 1]
BOUNDARY = "7f3a"


@dataclass
class Client:
    """Asks as the Demonstrator does, from the facts of its protocol."""

    url: str
    dreamer: Dreamer
    headers: dict[str, str] = field(default_factory=dict)

    def get(self, path: str) -> tuple[int, bytes]:
        request = urllib.request.Request(self.url + path, headers=self.headers)
        return self._open(request)

    def order(self, job: object, pictures: dict[str, bytes]) -> tuple[int, Any]:
        parts = [(b'name="json"', job if isinstance(job, bytes) else json.dumps(job).encode())]
        parts += [
            (f'name="{name}"; filename="{name}"\r\nContent-Type: image/png'.encode(), content)
            for name, content in pictures.items()
        ]
        mark = f"--{BOUNDARY}".encode()
        body = b"".join(
            b"%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (mark, head, content)
            for head, content in parts
        )
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        request = urllib.request.Request(f"{self.url}/new_job", body + mark + b"--\r\n", kind | self.headers)
        status, answer = self._open(request)
        return status, json.loads(answer) if status == 200 else answer.decode()

    def _open(self, request: urllib.request.Request) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def results(self, jobs: list[str], count: int) -> dict[tuple[str, int], dict[str, Any]]:
        """All that comes of some jobs, with its pictures, until there is enough."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        asked = "&".join(f"job_ids={job}" for job in jobs)
        for _ in range(30_000):
            status, content = self.get(f"/get_job_results?{asked}")
            if status == 204:
                time.sleep(0.01)
                continue
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                assert {one.date_time[0] for one in archive.infolist()} == {1980}  # by whatever clock
                for one in json.loads(archive.read("predictions.json")):
                    with Image.open(io.BytesIO(archive.read(one["image_filename"]))) as image:
                        one["picture"], one["tags"] = np.asarray(image), image.info
                    assert (one["job_id"], one["dream_step_index"]) not in found
                    found[one["job_id"], one["dream_step_index"]] = one
            if len(found) >= count:
                return found
        raise AssertionError(f"only {len(found)} of {count} results came")


@pytest.fixture
def client(small_wham: Bundle) -> Iterator[Client]:
    session, pixels = RUNNING.open(small_wham), RUNNING.pixels(small_wham)
    dreamer = Dreamer(session, pixels, LIMITS["max_concurrent_jobs"], LIMITS["max_job_lifespan"])
    wham = Wham(small_wham.manifest, pixels, session.window, LIMITS["max_dream_steps_per_job"], seed=11)
    with DreamServer(("127.0.0.1", 0), wham, dreamer) as server:
        dreamer.start()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Client(f"http://127.0.0.1:{server.server_port}", dreamer)
        server.shutdown()
        thread.join()
    dreamer.close()


def picture(seed: int, height: int = 18, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def action(seed: int) -> list[float]:
    """As the wire has it, sticks in the middle of their bins."""
    random = np.random.default_rng(seed)
    return [*random.integers(0, 2, 12).tolist(), *(MIDDLES[n] for n in random.integers(0, 11, 4))]


def ids(bundle: Bundle, vector: list[float]) -> np.ndarray:
    codec = bundle.manifest.actions
    assert codec is not None
    buttons = {f"button_{n}": int(value) for n, value in enumerate(vector[:12])}
    return encode(codec, buttons | {"sticks": vector[12:]})


def expected(
    bundle: Bundle, tokens: np.ndarray, vectors: list[list[float]], future: list[list[float]], seed: int
) -> list[tuple[list[int], np.ndarray]]:
    """(tokens, action) of two steps, by a session of its own."""
    actions = [ids(bundle, vector) for vector in vectors]
    noop = ids(bundle, [0.0] * 16)
    sampling, made = SamplingSettings(0.9), []
    with RUNNING.open(bundle) as session:
        session.start(tokens, np.stack([noop, *actions[:-1]]))
        led = actions[-1]
        for step in range(2):
            frame = session.step(led, sampling=sampling, seed=seed)
            led = ids(bundle, future[step]) if step < len(future) else session.act(seed=seed)
            made.append((frame.tokens.reshape(-1).tolist(), led))
    return made


def test_dreams_are_those_of_the_bundle(client: Client, small_wham: Bundle) -> None:
    """Two continuations of two pictures and their actions; the first action at a dreamt frame is replaced."""
    images, vectors, future = [picture(0), picture(1)], [action(0), action(1)], [action(2)]
    steps = [{"image_name": f"{n}.png", "action": v, "tokens": []} for n, v in enumerate(vectors)]
    job = {
        "num_steps_to_predict": 2,
        "num_parallel_predictions": 2,
        "temperature": "0.9",
        "top_k": "None",
        "steps": steps,
        "future_actions": [{"action": vector} for vector in future],
    }
    status, told = client.order(job, {f"{n}.png": png(image) for n, image in enumerate(images)})
    assert (status, len(told["job_ids"]), told["current_jobs_in_queue"]) == (200, 2, 2)
    found = client.results(told["job_ids"], 4)
    codec = PixelCodec(small_wham, CpuOptions(1, prepack=False))
    assert small_wham.manifest.actions is not None
    for number, name in enumerate(told["job_ids"]):
        made = expected(small_wham, codec.encode(np.stack(images)), vectors, future, 11 + number)
        for index, (tokens, led) in enumerate(made):
            one = found[name, index]
            assert one["tokens"] == tokens
            assert one["action"] == vector_of(small_wham.manifest.actions, led)
            assert one["tags"]["Software"].startswith("Generated by WHAM")
            (shown,) = codec.decode([np.array(tokens, np.int32).reshape(3, 5)])
            np.testing.assert_array_equal(one["picture"], shown)
        assert found[name, 0]["action"] == future[0]
    assert found[told["job_ids"][0], 1]["tokens"] != found[told["job_ids"][1], 1]["tokens"]
    assert client.get(f"/get_job_results?job_ids={told['job_ids'][0]}")[0] == 204


def test_tokens_take_the_place_of_pictures(client: Client, small_wham: Bundle) -> None:
    """Passed back, a dream goes on without going through pixels; a picture of another size is stretched."""
    tokens = np.random.default_rng(3).integers(1, 64, (1, 3, 5)).astype(np.int32)
    step = {"image_name": "a.png", "action": action(4), "tokens": tokens.reshape(-1).tolist()}
    _, told = client.order({"num_steps_to_predict": 2, "steps": [step]}, {"a.png": png(picture(5, 36, 44))})
    found = client.results(told["job_ids"], 2)
    made = expected(small_wham, tokens, [action(4)], [], 11)
    assert [found[told["job_ids"][0], n]["tokens"] for n in range(2)] == [one[0] for one in made]
    job = {"num_steps_to_predict": 1, "steps": [step | {"tokens": []}]}
    _, told = client.order(job, {"a.png": png(picture(5, 36, 44))})
    assert len(client.results(told["job_ids"], 1)) == 1


def test_jobs_can_be_cancelled_and_are_forgotten(client: Client) -> None:
    step = {"action": action(0), "tokens": [1] * 15}
    job = {"num_steps_to_predict": 4, "num_parallel_predictions": 3, "steps": [step]}
    _, told = client.order(job, {})
    last = told["job_ids"][-1]
    assert client.get(f"/cancel_job?job_id={last}") == (200, b"OK")
    client.results(told["job_ids"][:2], 8)
    assert client.get(f"/get_job_results?job_ids={last}&job_ids=unknown")[0] == 204
    _, told = client.order(job | {"num_parallel_predictions": 1}, {})
    while len(client.dreamer._results.get(told["job_ids"][0], (0, []))[1]) < 4:
        time.sleep(0.01)
    client.dreamer.lifespan = -1
    assert client.get(f"/get_job_results?job_ids={told['job_ids'][0]}")[0] == 204


def test_a_dream_that_fails_ends_no_other(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    job = {"num_steps_to_predict": 1, "steps": [{"action": action(0), "tokens": [1] * 15}]}
    engine = client.dreamer._session.engine
    step = engine.step

    def fail(lanes: Sequence[int] = ()) -> None:
        engine.step = step  # type: ignore[method-assign]
        raise RuntimeError("bad allocation")

    engine.step = fail  # type: ignore[method-assign]
    _, told = client.order(job | {"num_parallel_predictions": 2}, {})
    assert len(client.results(told["job_ids"][1:], 1)) == 1
    assert "a dream was given up: bad allocation" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps_to_predict": None}, "num_steps_to_predict"),
        ({"num_steps_to_predict": 5}, "num_steps_to_predict too large. Max 4"),
        ({"num_parallel_predictions": 7}, "at most 6"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"steps": []}, "steps"),
        ({"steps": [{"image_name": "b.png", "action": [0] * 16}]}, "no file has the image_name 'b.png'"),
        ({"steps": [{"image_name": "text", "action": [0] * 16}]}, "text is no picture"),
        ({"steps": [{"tokens": [1] * 14, "action": [0] * 16}]}, "expected 15, 0..63 each"),
        ({"steps": [{"tokens": [64] * 15, "action": [0] * 16}]}, "expected 15, 0..63 each"),
        ({"steps": [{"tokens": [1] * 15, "action": [0] * 15}]}, "15 numbers; expected 16"),
        ({"steps": [{"tokens": [1] * 15, "action": [0] * 15 + [2]}]}, "sticks"),
        ({"steps": [{"tokens": [1] * 15, "action": [2] + [0] * 15}]}, "button_0"),
    ],
)
def test_orders_that_cannot_be_taken(client: Client, change: dict[str, Any], message: str) -> None:
    job = {"num_steps_to_predict": 1, "steps": [{"tokens": [1] * 15, "action": [0] * 16}]} | change
    status, told = client.order(job, {"a.png": png(picture(0)), "text": b"no picture"})
    assert (status, message in told) == (400, True), told
    assert client.dreamer.collect([]) == []


def test_pictures_are_turned_and_laid_over_black_as_everywhere() -> None:
    shown = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    shown.putpixel((0, 0), (255, 255, 255, 0))
    file, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6  # the camera was held on its side
    shown.save(file, "PNG", exif=turned)
    taken = _picture(file.getvalue(), "a.png")
    assert taken.shape == (4, 2, 3)
    assert (taken[0, 1].tolist(), taken[3, 0].tolist()) == ([0, 0, 0], [255, 0, 0])


@pytest.mark.parametrize("size", [(1 << 14, 1 << 14), (5000, 5000)])
def test_pictures_larger_than_their_file_are_refused(size: tuple[int, int]) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    with pytest.raises(UsageError, match=r"big\.png is no picture"):
        _picture(content + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")), "big.png")


def test_whoever_comes_by_another_way_is_refused(client: Client) -> None:
    """A page of another site, a name that was made to lead here, other paths, what is too large, no form."""
    assert json.loads(client.get("/")[1]) == {"model_file": "small-wham"} | LIMITS
    assert client.get("/../etc/passwd")[0] == 404
    assert client.get("/get_job_results")[0] == client.get("/cancel_job")[0] == 400
    assert client.order(b"{", {})[0] == client.order(b"\xff" * 9, {})[0] == 400
    client.headers = {"Content-Type": "application/json"}
    assert client.order({}, {}) == (400, "expected a form, multipart/form-data")
    client.headers = {"Content-Length": str(1 << 40)}
    assert client.order({}, {})[0] == 413
    for headers in ({"Origin": "http://elsewhere.example"}, {"Host": "elsewhere.example:5000"}):
        client.headers = headers
        assert client.get("/")[0] == client.order({}, {})[0] == 403


def test_any_address_of_this_machine_will_do() -> None:
    told: list[Any] = [None, None]
    with DreamServer(("::1", 0), *told) as server:
        assert server.server_port
    for host in ("256.1.1.1", "long" * 20 + ".org"):
        with pytest.raises(UsageError, match=f"cannot listen on {host}, port 0"):
            DreamServer((host, 0), *told)


def test_other_models_are_not_served(small_wham: Bundle) -> None:
    manifest = small_wham.manifest.model_copy(update={"actions": mineworld_actions(), "name": "mineworld"})
    with pytest.raises(UsageError, match="mineworld is no WHAM"):
        Wham(manifest, RUNNING.pixels(small_wham), 4, 10)


def test_the_verb_names_its_address(small_wham: Bundle) -> None:
    import subprocess
    import sys

    command = [
        sys.executable,
        "-m",
        "diagd",
        "serve",
        str(small_wham.path),
        "--protocol",
        "wham",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split(": ")[1].strip()
        status, told = Client(url, None).get("/")  # type: ignore[arg-type]
        process.terminate()
        assert process.wait(120) in (0, -15, 143)
    assert (status, json.loads(told)["max_concurrent_jobs"]) == (200, 30)
