"""Inputs that nobody meant: what is wrong with them is said by a DiagdError, whatever it is.

Every kind makes files that are nearly right and reads them as the verbs do. An input that ends otherwise is
shrunk, printed and kept in tests/corpus, which every run of the tests reads again. From the root:

    python -m benchmarks.fuzz --inputs 200000
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from benchmarks import parser
from diagd.bundle import Bundle, atomic_bundle, read_manifest, seal
from diagd.bundle.manifest import MANIFEST_NAME
from diagd.cli import calibrate, export, generate, profile, verify
from diagd.cli.options import entries, parse_options
from diagd.errors import DiagdError
from diagd.export.checkpoints import open_checkpoint
from diagd.export.families import find
from diagd.export.families.world import load_description
from diagd.play.controls import Inputs as Player
from diagd.play.controls import default_controls, read_controls
from diagd.play.game import Game
from diagd.play.messages import Choose, Input, parse
from diagd.play.opening import SHIPPED, GameOptions, open_game
from diagd.play.record import read_record, replay
from diagd.play.terminal import Abilities, Held, presses
from diagd.profiling.report import read_report
from diagd.runtime.actions import encode, read_actions
from diagd.runtime.arrays import read_array, read_arrays
from diagd.runtime.pictures import read_frames
from diagd.runtime.sampling import SAMPLER
from diagd.schedule import slots_needed
from tests.bundle.test_bundle import manifest

CORPUS = Path(__file__).parents[1] / "tests" / "corpus"

Inputs = SearchStrategy[bytes]


@dataclass(frozen=True)
class Kind:
    """Files of a kind, and what reads them: the content of one, and a folder that is the reader's own."""

    inputs: Inputs
    read: Callable[[bytes, Path], object]


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([0, -1, 1 << 31, 1 << 63, 10**30, 1e308, "", "../x", "/etc/passwd", "a\\b", ".", "\0"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value in a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(found for key, value in inner for found in places(value, (*path, key)))]


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The tree with one value replaced."""
    if not path:
        return value
    tree = copy.deepcopy(tree)
    at = tree
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return tree


def json_like(tree: Any) -> Inputs:
    """A JSON file in which a few values are others, and that may be cut, marked or repeated."""
    paths = places(tree)

    def make(changes: list[tuple[int, Any]]) -> bytes:
        content = tree
        for place, value in changes:
            with contextlib.suppress(KeyError, IndexError, TypeError):  # a change before took its place away
                content = changed(content, paths[place], value)
        return json.dumps(content).encode()

    changes = st.lists(st.tuples(st.integers(0, len(paths) - 1), VALUES), min_size=1, max_size=2)
    return damaged(changes.map(make))


def damaged(files: Inputs) -> Inputs:
    """Files, most as they are; some cut, with other bytes in places, or something ahead or behind."""

    def cut(content: bytes, share: float) -> bytes:
        return content[: int(len(content) * share)]

    def flipped(content: bytes, flips: list[tuple[float, int]]) -> bytes:
        data = bytearray(content)
        for share, value in flips:
            if data:
                data[int(share * (len(data) - 1))] = value
        return bytes(data)

    shares, byte = st.floats(0, 1), st.integers(0, 255)
    flips = st.lists(st.tuples(shares, byte), min_size=1, max_size=4)
    around = st.sampled_from([b"", b"\xef\xbb\xbf", b"\0", b"\xff\xfe", b"[" * 20_000, b"\r\n", b"<html>"])
    return st.one_of(
        files,
        files,
        st.builds(cut, files, shares),
        st.builds(flipped, files, flips),
        st.builds(lambda ahead, content, behind: ahead + content + behind, around, files, around),
    )


def written(content: bytes, folder: Path, name: str) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


MANIFEST = json.loads(manifest().model_dump_json())


def read_bundle(content: bytes, folder: Path) -> None:
    """Open a bundle, and work out what every verb works out of a manifest."""
    bundle = folder / "small.diagd"
    if not bundle.exists():
        with atomic_bundle(bundle) as directory:
            (directory / "step.onnx").write_bytes(b"graph")
            (directory / "weights.bin").write_bytes(bytes(100))
            seal(directory, manifest())
    files = json.loads((bundle / "files.json").read_text()) if (bundle / "files.json").exists() else None
    if files is None:
        files = json.loads((bundle / MANIFEST_NAME).read_text())["files"]
        (bundle / "files.json").write_text(json.dumps(files))
    listed = content.replace(b'"files": {}', b'"files": ' + json.dumps(files).encode())
    (bundle / MANIFEST_NAME).write_bytes(listed)
    opened = Bundle.open(bundle).at_precision().manifest
    opened.sampling.range_table(opened.layout)
    slots_needed(opened.layout, opened.context.frames, 64)
    for graph in opened.graphs:
        opened.cache_dtype(graph)
    if opened.actions is not None:
        encode(opened.actions, {})


CODECS = [find(name).actions for name in ("crafter-3m", "mineworld-300m", "wham-200m")]
INPUTS = st.sampled_from(
    ["action", "camera", "forward", "repeat", "keyboard", "mouse", "buttons", "dx", "keys"]
)
LINES = st.dictionaries(INPUTS, VALUES | st.dictionaries(INPUTS, VALUES, max_size=3), max_size=4) | VALUES


def read_lines(content: bytes, folder: Path) -> None:
    """Actions of every codec."""
    path = written(content, folder, "a.jsonl")
    for codec in CODECS:
        assert codec is not None
        with contextlib.suppress(DiagdError):
            read_actions(path, codec)


TYPES = st.sampled_from(
    ["<i4", ">i8", "|u1", "|O", "<f8", "|V4", "<U9", "<c8", "i", "[('a', '<i4')]", "<m8[ns]"]
)


def array_file(dtype: str, order: Any, shape: Any, version: int, rest: bytes, keys: list[str]) -> bytes:
    """A .npy file whose header says so."""
    header = repr(dict(zip(keys, (dtype, order, shape), strict=False))).encode(errors="replace")
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + rest


ARRAYS = damaged(
    st.builds(
        array_file,
        TYPES | st.text(max_size=5),
        st.booleans() | VALUES,
        st.lists(st.integers(-1, 9) | st.integers(), max_size=4).map(tuple) | VALUES,
        st.integers(0, 4),
        st.binary(max_size=80),
        st.just(["descr", "fortran_order", "shape"]) | st.lists(st.text(max_size=5), max_size=4),
    )
)


def archive(members: dict[str, bytes], packed: bool) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as target:
        for name, content in members.items():
            target.writestr(name, content)
    return file.getvalue()


ARCHIVES = damaged(
    st.builds(
        archive,
        st.dictionaries(
            st.sampled_from(["frames.npy", "actions.npy", "source.npy", "x"]), ARRAYS, max_size=3
        ),
        st.booleans(),
    )
)


def read_tensors(path: Path) -> None:
    for handle in open_checkpoint(path).values():
        with contextlib.suppress(DiagdError):
            handle.read()


def safetensors(header: Any, length: int | None, rest: bytes) -> bytes:
    """A safetensors file whose header is said to have a length."""
    text = json.dumps(header).encode()
    return (
        (len(text) if length is None else length).to_bytes(8, "little", signed=length is not None)
        + text
        + rest
    )


TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "BOOL", "F8_E4M3", "X"]) | VALUES,
        "shape": st.lists(st.integers(0, 4) | st.integers(), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(0, 64) | st.integers(), min_size=2, max_size=2) | VALUES,
    }
)
SAFETENSORS = damaged(
    st.builds(
        safetensors,
        st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), TENSOR | VALUES, max_size=3)
        | VALUES,
        st.none() | st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(0, 200),
        st.binary(max_size=64),
    )
)


@cache
def saved() -> dict[str, bytes]:
    """The members of a file that PyTorch wrote."""
    file = io.BytesIO()
    state = {"layer.weight": torch.arange(12.0).reshape(3, 4), "half": torch.ones(2, dtype=torch.bfloat16)}
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"width": 4}}, file)
    with zipfile.ZipFile(file) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def torch_file(pickled: bytes | None, left_out: set[int], packed: bool) -> bytes:
    """What PyTorch wrote, with another pickle or fewer members."""
    members = {name: content for n, (name, content) in enumerate(saved().items()) if n not in left_out}
    if pickled is not None:
        members |= {name: pickled for name in members if name.endswith("data.pkl")}
    return archive(members, packed)


PICKLES = st.none() | damaged(
    VALUES.map(lambda value: pickle.dumps(value, 2)) | st.builds(lambda: dict(saved())["archive/data.pkl"])
)
TORCH_FILES = damaged(
    st.builds(
        torch_file, PICKLES, st.sets(st.integers(0, 7), max_size=2), st.sampled_from([False] * 4 + [True])
    )
)

SHARDS = ["a.safetensors", "b.safetensors", "../a.safetensors", "model.safetensors.index.json", "c.bin", ""]
INDEXES = damaged(
    st.fixed_dictionaries(
        {"weight_map": st.dictionaries(st.text(max_size=4), st.sampled_from(SHARDS) | VALUES)}
    )
    .map(json.dumps)
    .map(str.encode)
)


def read_index(content: bytes, folder: Path) -> None:
    """A sharded checkpoint, one shard of which is there."""
    written(safetensors({}, None, b""), folder, "a.safetensors")
    read_tensors(written(content, folder, "model.safetensors.index.json"))


OPTIONS: list[type[Any]] = [verb.VERB.options for verb in (calibrate, export, generate, profile, verify)]
NAMES = sorted({entry.path[-1] for options in OPTIONS for entry in entries(options) if entry.flag is None})
PAIRS = st.lists(
    st.builds(
        "{}={}".format,
        st.sampled_from(NAMES) | st.text(max_size=6),
        st.text(max_size=12)
        | st.sampled_from(
            ["²", "٣", "1e999", "nan", "-1", "9" * 5000, "none", "true", "1,2", "1,,2", "\0", " "]
        ),
    )
    | st.text(max_size=12),
    max_size=3,
)


def read_pairs(content: bytes, folder: Path) -> None:
    """Pairs of ``--set``, one a line, for every verb that has some."""
    for options in OPTIONS:
        needed = {entry.path: "a" for entry in entries(options) if entry.field.is_required()}
        with contextlib.suppress(DiagdError):
            parse_options(options, content.decode("utf-8", "surrogateescape").split("\n"), needed)


WORLD = {
    "size": "0.7m",
    "rows": 3,
    "columns": 4,
    "patch": 4,
    "codes": 32,
    "used_codes": 30,
    "actions": ["noop", "left"],
    "context_frames": 4,
}


def read_world(content: bytes, folder: Path) -> None:
    """The description of a trained world, and the model that it describes."""
    written(content, folder, "config.json")
    load_description(folder).transformer_config()


@cache
def picture() -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="image2pipe") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = 4, 6, "rgb24"
        frame = av.VideoFrame.from_ndarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return file.getvalue()


SETTINGS = {"decoder": "k=1 chained", "temperature": 1.0, "top_k": 0, "top_p": 0.9, "seed": 3}
MESSAGES: list[dict[str, Any]] = [
    {"type": "hello", "version": 1, "token": "a", "ticket": ""},
    {"type": "input", "t": 12.5, "keys": ["KeyA", "Mouse0"], "dx": 1.5, "dy": -2, "axes": [0.5, -1]},
    {"type": "ack", "id": 3},
    {"type": "reset", "prompt": 0},
    {"type": "rewind", "frames": 2},
    {"type": "visit", "number": 1},
    {"type": "choose", "settings": SETTINGS},
    {"type": "pace", "mode": "step", "rate": 10.0},
]
DECODERS = st.from_regex(
    r"(k|d|window|seeds|x)=[0-9a-z²-]{1,12}( [a-z]{1,8}|,d=[0-9]{1,12})?", fullmatch=True
)


def read_message(content: bytes, folder: Path) -> None:
    """What a page says, and what is done with it."""
    message = parse(content.decode(errors="replace"))
    if isinstance(message, Choose):
        message.settings.open(read_manifest(SHIPPED)).check(game().session.stream)
        message.settings.sampling  # noqa: B018
    if isinstance(message, Input):
        for codec in CODECS:
            player = Player(default_controls(codec), codec)
            player.update(message.keys, (message.dy, message.dx), message.axes, message.t)
            player.take()


@cache
def game() -> Game:
    """A game of the world that comes with the package."""
    game = open_game(SHIPPED, GameOptions())
    game.reset(game.prompts[0])
    return game


LINES_OF_RECORDS: list[dict[str, Any]] = [
    {"start": [[[0] * 12] * 9], "actions": [[512]]},
    {"settings": SETTINGS},
    {"frame": 1, "action": [512], "tokens": "00000000"},
    {"ahead": [[512], None]},
    {"rewind": 1},
    {"branch": 1},
    {"visit": 0},
]
HEADER = {
    "format": "diagd play 1",
    "bundle": "x",
    "name": "x",
    "precision": "int8",
    "window": 8,
    "sampler": SAMPLER,
    "diagd": "1",
}


def read_played(content: bytes, folder: Path) -> None:
    _, lines = read_record(written(content, folder, "a.ndjson"))
    for _ in replay(game(), lines[:4]):
        pass


def read_keys(content: bytes, folder: Path) -> None:
    held = Held()
    for press in presses(content):
        held.take(press, 0.0)
    held.at(0.1)
    Abilities.read(content, {})


def read_table(content: bytes, folder: Path) -> None:
    """Controls of the model with most kinds of inputs, all of which are used."""
    controls = read_controls(folder, CODECS[1], written(content, folder, "controls.json"))
    player = Player(controls, CODECS[1])
    for turn in ((3.0, -2.5), (0.5, 0.0)):
        player.update(controls.keys, turn, [0.5] * 8)
        player.take()


KINDS = {
    "manifest": Kind(json_like(MANIFEST), read_bundle),
    "actions": Kind(
        damaged(st.lists(LINES, max_size=2).map(lambda lines: "\n".join(map(json.dumps, lines)).encode())),
        read_lines,
    ),
    "npy": Kind(ARRAYS, lambda content, folder: read_array(written(content, folder, "a.npy"), "tokens")),
    "npz": Kind(
        ARCHIVES,
        lambda content, folder: read_arrays(
            written(content, folder, "a.npz"), ("frames", "actions", "source"), "recording"
        ),
    ),
    "safetensors": Kind(
        SAFETENSORS, lambda content, folder: read_tensors(written(content, folder, "a.safetensors"))
    ),
    "torch": Kind(TORCH_FILES, lambda content, folder: read_tensors(written(content, folder, "a.pt"))),
    "index": Kind(INDEXES, read_index),
    "settings": Kind(PAIRS.map(lambda pairs: "\n".join(pairs).encode("utf-8", "surrogatepass")), read_pairs),
    "world": Kind(json_like(WORLD), read_world),
    "report": Kind(
        json_like({"schema_version": 1, "subject": {"name": "x"}, "runs": [{"order": "k=1"}], "start": []}),
        lambda content, folder: read_report(written(content, folder, "report.json")),
    ),
    "picture": Kind(
        damaged(st.builds(picture)),
        lambda content, folder: read_frames(written(content, folder, "a.png"), (4, 6), resize=True),
    ),
    "message": Kind(
        st.one_of(
            *map(json_like, MESSAGES),
            DECODERS.map(lambda decoder: changed(MESSAGES[6], ("settings", "decoder"), decoder))
            .map(json.dumps)
            .map(str.encode),
        ),
        read_message,
    ),
    "record": Kind(
        damaged(
            st.lists(st.one_of(*map(json_like, LINES_OF_RECORDS)), max_size=3).map(
                lambda lines: b"\n".join([json.dumps(HEADER).encode(), *lines])
            )
        ),
        read_played,
    ),
    "controls": Kind(json_like(default_controls(CODECS[1]).model_dump(mode="json")), read_table),
    "keys": Kind(
        damaged(st.from_regex(rb"(\x1b\[[0-9;:?]{0,8}[A-Du~]|\x1bO[A-D]|[\x00-\xff]){1,4}", fullmatch=True)),
        read_keys,
    ),
}
"""What is read from outside, by the name of its folder in the corpus."""


def fuzz(name: str, inputs: int, folder: Path) -> None:
    """Read so many files of a kind; the smallest that ends in another error is kept in the corpus.

    Raises:
        Exception: the other error.
    """
    kind, last = KINDS[name], [b""]

    @settings(max_examples=inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(kind.inputs)
    def check(content: bytes) -> None:
        last[0] = content
        with contextlib.suppress(DiagdError):
            kind.read(content, folder)

    try:
        check()
    except Exception:
        keep(name, last[0])
        raise


def keep(name: str, content: bytes) -> Path:
    """Put an input into the corpus, named by its digest."""
    path = CORPUS / name / hashlib.sha256(content).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--inputs", type=int, default=200_000, help="of all kinds together")
    options.add_argument("--kind", action="append", choices=tuple(KINDS), help="only these")
    args = options.parse_args()
    names = args.kind or list(KINDS)
    for name in names:
        began, count = time.monotonic(), -(-args.inputs // len(names))
        with tempfile.TemporaryDirectory() as folder:
            os.environ["DIAGD_CACHE"] = str(Path(folder) / "cache")
            fuzz(name, count, Path(folder))
        print(f"{name}: {count:,} inputs in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
