"""The real Hub client against a local server that speaks the Hub's protocol, and its cache offline."""

import json
import multiprocessing
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from diagd.errors import CheckpointError
from diagd.export.checkpoints import open_checkpoint
from diagd.export.checkpoints.location import HubAddress, parse_address

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LITTLE = 1 << 16
"""Bytes of the largest file that a full disk holds."""

Opening = Callable[[dict[str, str], Sequence[str]], list[Any]]


@pytest.mark.parametrize(
    ("spec", "address"),
    [
        ("hf://nvidia/Cosmos-Predict1-4B", ("nvidia/Cosmos-Predict1-4B", None, "")),
        ("hf://microsoft/wham@main", ("microsoft/wham", "main", "")),
        ("hf://microsoft/wham@v1.0/models/a.ckpt", ("microsoft/wham", "v1.0", "models/a.ckpt")),
        ("hf://org/name/models/", ("org/name", None, "models")),
        ("hf://org/name@refs%2Fpr%2F1/", ("org/name", "refs/pr/1", "")),
    ],
)
def test_addresses(spec: str, address: tuple[str, str | None, str]) -> None:
    assert parse_address(spec) == HubAddress(*address)


@pytest.mark.parametrize("spec", ["hf://", "hf:org/name", "hf://name", "hf://org/na me", "hf://org/name@"])
def test_malformed_addresses(spec: str) -> None:
    with pytest.raises(CheckpointError, match="expected hf://org/name@revision"):
        parse_address(spec)


class Hub(BaseHTTPRequestHandler):
    """Repositories as dicts of file contents."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    requests: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        Hub.requests.append(self.path)
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        if repo == "nvidia/gated":
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        if repo.startswith("status/"):
            return self.reply(int(repo.removeprefix("status/")), b"", {}, body)
        if repo not in self.repositories:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        files = self.repositories[repo]
        if api and parts[4:] == ["tree", COMMIT]:
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in files]
            return self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        if api:
            if parts[4:] not in ([], ["revision", "main"], ["revision", COMMIT]):
                return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
            siblings = [{"rfilename": name} for name in files]
            content = json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}).encode()
            return self.reply(200, content, {"Content-Type": "application/json"}, body)
        name = "/".join(parts[4:])
        if name not in files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        etag = f'"{name.replace("/", "-")}-{len(files[name])}"'
        return self.reply(200, files[name], {"ETag": etag, "X-Repo-Commit": COMMIT}, body)

    def reply(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "diagd.export.checkpoints"])  # the Hub's client is not of these


def open_all(environment: dict[str, str], specs: Sequence[str]) -> list[Any]:
    os.environ.clear()
    os.environ.update(environment)
    assert "huggingface_hub" not in sys.modules  # it reads the environment once
    return [opened(spec) for spec in specs]


def opened(spec: str) -> list[object] | str:
    try:
        checkpoint = open_checkpoint(spec)
        return [checkpoint.source, {name: float(h.read().sum()) for name, h in checkpoint.items()}]
    except CheckpointError as error:
        return str(error)


def open_where_little_fits(environment: dict[str, str], specs: Sequence[str]) -> list[Any]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LITTLE, LITTLE))
    return open_all(environment, specs)


def open_in_new_process(
    home: Path, endpoint: str, *specs: str, offline: bool = False, opening: Opening = open_all
) -> list[Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    with PROCESSES.Pool(1) as pool:
        return pool.apply(opening, (environment, specs))


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("repositories")
    torch.save({"model": {"model.w": torch.ones(2)}}, folder / "model.pt")
    for shard, name in enumerate("ab"):
        save_file({name: torch.full((2,), float(shard))}, folder / f"{name}.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    Hub.repositories = {
        "nvidia/cosmos": {"model.pt": files["model.pt"], "big.txt": b"x"},
        "org/sharded": {f"weights/{name}": text for name, text in files.items() if name != "model.pt"},
        "org/large": {f"{name}.pt": files["model.pt"] + bytes(LITTLE) for name in "ab"},
        "org/half": {**files, "b.safetensors": files["b.safetensors"] + bytes(LITTLE)},
        "microsoft/wham": {
            f"models/{name}.ckpt": files["model.pt"] for name in ("WHAM_200M", "WHAM_1.6B_v1")
        },
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_then_offline(endpoint: str, tmp_path: Path) -> None:
    specs = [
        "hf://nvidia/cosmos@main",
        "hf://org/sharded/weights",
        "hf://microsoft/wham/models/WHAM_200M.ckpt",
    ]
    expected = [
        [f"hf://nvidia/cosmos@{COMMIT}/model.pt", {"model.w": 2.0}],
        [f"hf://org/sharded@{COMMIT}/weights/model.safetensors.index.json", {"a": 0.0, "b": 2.0}],
        [f"hf://microsoft/wham@{COMMIT}/models/WHAM_200M.ckpt", {"model.w": 2.0}],
    ]
    Hub.requests.clear()
    assert open_in_new_process(tmp_path, endpoint, *specs) == expected
    assert not [path for path in Hub.requests if "big.txt" in path or "1.6B" in path]
    assert open_in_new_process(tmp_path, endpoint, *specs, offline=True) == expected
    unreachable = open_in_new_process(tmp_path, "http://127.0.0.1:1", specs[0], "hf://org/absent@main")
    assert unreachable[0] == expected[0]
    assert "cannot reach the Hugging Face Hub for hf://org/absent@main" in unreachable[1]
    assert "hf download org/absent --local-dir" in unreachable[1]


def test_cached_copy_outlives_its_repository(endpoint: str, tmp_path: Path) -> None:
    spec = "hf://nvidia/cosmos@main"
    before = open_in_new_process(tmp_path, endpoint, spec)
    taken_down = Hub.repositories.pop("nvidia/cosmos")
    try:
        assert open_in_new_process(tmp_path, endpoint, spec) == before
    finally:
        Hub.repositories["nvidia/cosmos"] = taken_down


def test_a_disk_that_holds_no_more_is_told_as_such(endpoint: str, tmp_path: Path) -> None:
    """Also of what is half there, and then by the Hub that cannot be asked."""
    specs = "hf://org/large/a.pt", "hf://org/half/model.safetensors.index.json"
    for found in open_in_new_process(tmp_path, endpoint, *specs, opening=open_where_little_fits):
        assert f"cannot be kept in {tmp_path / 'hub'}: File too large; free some space" in found
    for found in open_in_new_process(tmp_path, endpoint, *specs, offline=True):
        assert "it is not in the local cache" in found


def test_a_damaged_copy_is_named_that_has_to_go_first(endpoint: str, tmp_path: Path) -> None:
    spec = "hf://nvidia/cosmos@main"
    open_in_new_process(tmp_path, endpoint, spec)
    (blob,) = (file for file in tmp_path.rglob("blobs/*") if file.stat().st_size > 100)
    os.truncate(blob, 100)
    (found,) = open_in_new_process(tmp_path, endpoint, spec)
    assert found.endswith(f"download it again: first remove {blob}, the copy that is kept of it")
    blob.unlink()
    assert open_in_new_process(tmp_path, endpoint, spec)[0][1] == {"model.w": 2.0}


def test_refusals_of_the_server_are_no_failed_connection(endpoint: str, tmp_path: Path) -> None:
    token, failed = open_in_new_process(tmp_path, endpoint, "hf://status/401", "hf://status/500")
    assert "does not know the token that asks for hf://status/401" in token
    assert "does not give hf://status/500" in failed and "try again later" in failed


def test_refusals_are_explained(endpoint: str, tmp_path: Path) -> None:
    gated, absent, revision, file, ambiguous = open_in_new_process(
        tmp_path,
        endpoint,
        "hf://nvidia/gated",
        "hf://microsoft/mineworld@main",
        "hf://nvidia/cosmos@v9",
        "hf://nvidia/cosmos@main/weights.pt",
        "hf://microsoft/wham/models",
    )
    assert "is gated: accept its terms at https://huggingface.co/nvidia/gated" in gated
    assert "no repository microsoft/mineworld" in absent and "your own copy" in absent
    assert "no revision 'v9'" in revision
    assert "hf://nvidia/cosmos/weights.pt does not exist; the repository holds big.txt, model.pt" in file
    assert "2 checkpoints (WHAM_1.6B_v1.ckpt, WHAM_200M.ckpt)" in ambiguous
