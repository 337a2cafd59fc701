"""From a bundle to a folder that plays it in a browser, and a server of it for those of this machine."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from http.client import HTTPException
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np
from typing_extensions import override

from diagd.bundle import Bundle, Form, Manifest, cache
from diagd.bundle.files import atomic_directory, usual_rights
from diagd.bundle.lock import turn
from diagd.bundle.targets import folder_target
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import MAX_WIDTH
from diagd.errors import DependencyError, UsageError, require
from diagd.play import record
from diagd.play.controls import read_controls
from diagd.play.opening import read_prompts
from diagd.play.record import PlaySettings
from diagd.play.site import page_files
from diagd.progress import Progress
from diagd.runtime.actions import encode
from diagd.runtime.load import check_window
from diagd.runtime.pixels import PixelCodec
from diagd.schedule import slots_in_sight, slots_needed

WORLD: Final = "world.json"
FORMAT: Final = "diagd web 1"
PRECISIONS: Final = {False: "int8-dynamic", True: "int8-weight"}
"""Taken, with and without WebGPU, where a bundle has it: a byte a weight to load, and kernels there."""

PACKED: Final = ".packed"
"""Suffix of files that we compress (gzip): hosts know nothing of it, and so leave them as they are."""

_INLINE_BYTES: Final = 1024  # tensors below stay in the graph


@dataclass(frozen=True)
class Page:
    """What was written."""

    path: Path
    precision: str
    sizes: dict[str, int]

    @property
    def download(self) -> int:
        """Bytes that a browser without WebGPU loads to play, a picture of one's own apart."""
        left = ("encoder.", *WEBGPU)
        return sum(size for name, size in self.sizes.items() if not name.startswith(left))


def write_page(
    bundle: Bundle,
    output: Path,
    runtime: Callable[[], dict[str, bytes]],
    *,
    precision: str | None = None,
    window: int | None = None,
    webgpu: bool = False,
    progress: Progress | None = None,
) -> Page:
    """Write a folder that plays a bundle.

    What a user put at ``output`` stays. ``runtime`` gives ONNX Runtime Web's files, once all else is known to
    be well. ``precision`` None is that of `PRECISIONS` where the bundle has it, else its first. With
    ``webgpu``, browsers that can decode on the GPU; others as without.

    Raises:
        UsageError: something else is at ``output``, or the bundle cannot be played in a page.
    """
    place = folder_target(output, {WORLD: FORMAT.encode()}, "a page that diagd web wrote")
    best = PRECISIONS[webgpu]
    bundle = bundle.at_precision(precision or (best if best in bundle.manifest.precisions else None))
    world = _world(bundle, check_window(bundle.manifest, window)) | {"gpu": webgpu}
    given = runtime()
    chosen = {name: given[name] for name in (*WASM, *(WEBGPU if webgpu else ()))}
    with turn(place):
        ours = _written(place / WORLD)
        with atomic_directory(place, ours) as folder:
            own = {file.name: file.read_bytes() for file in (resources.files("diagd.web") / "page").iterdir()}
            for name, content in (page_files() | own).items():  # a link to the worker in place of the socket
                (folder / name).write_bytes(content)
            _pack(bundle, chosen, folder, progress or Progress())
            sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
            text = json.dumps(world | {"files": sizes}, separators=(",", ":"))
            (folder / WORLD).write_text(text, encoding="utf-8", newline="\n")
    return Page(output, world["record"]["precision"], sizes | {WORLD: len(text)})


def _written(world: Path) -> set[str]:
    """What an earlier run wrote, by its own word; UsageError where somebody changed it."""
    try:
        return {WORLD, *map(str, json.loads(world.read_bytes())["files"])} if world.is_file() else set()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{world} is damaged ({error}), so nothing tells the page's files from yours; name another folder"
        ) from None


def _pack(bundle: Bundle, runtime: dict[str, bytes], folder: Path, progress: Progress) -> None:
    """Write the runtime, the graphs, and of each graph the tensors that it reads; scripts as they are."""
    tokenizer = bundle.manifest.tokenizer
    assert tokenizer is not None
    step = bundle.manifest.graph(Form.PREFIX)
    graphs = {"step": step.file, "encoder": tokenizer.encoder, "decoder": tokenizer.decoder}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for file, content in runtime.items():
            (folder if file.endswith(".mjs") else work).joinpath(file).write_bytes(content)
        for role, file in graphs.items():
            save_trimmed(bundle.file(file), work / f"{role}.onnx", f"{role}.bin")
        bundle.check_unchanged(*graphs.values(), *step.weights.files, *tokenizer.weight_files)
        for part in progress.each(sorted(work.iterdir()), "pack"):
            (folder / f"{part.name}{PACKED}").write_bytes(gzip.compress(part.read_bytes(), mtime=0))


def save_trimmed(graph: Path, target: Path, weights: str) -> None:
    """Write a graph again, and beside it the weights that it reads, without those of other graphs.

    Raises:
        DependencyError: onnx is not installed.
    """
    onnx = require("onnx", extra="web", purpose="trim the weights of a graph")
    model = onnx.load(graph, load_external_data=False)
    for tensor in filter(onnx.external_data_helper.uses_external_data, model.graph.initializer):
        _read_data(tensor, graph.parent)
    with usual_rights(target.parent / weights):  # there is none where all tensors are small
        onnx.save(model, target, save_as_external_data=True, location=weights, size_threshold=_INLINE_BYTES)


def _read_data(tensor: Any, folder: Path) -> None:
    """Take the data of a tensor from its file beside the graph; onnx reads none that is or has a link."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / Path(where["location"]).name).open("rb") as file:
        file.seek(int(where.get("offset", 0)))
        tensor.raw_data = file.read(int(where.get("length", -1)))
    del tensor.external_data[:]
    tensor.data_location = 0


def _world(bundle: Bundle, window: int) -> dict[str, Any]:
    """All that the worker has to know, as JSON; UsageError: the bundle cannot be played in a page."""
    _check(bundle)
    manifest, pixels = bundle.manifest, PixelCodec(bundle, CpuOptions())
    layout, codec, tokenizer, order = manifest.layout, manifest.actions, pixels.spec, manifest.schedule
    prompts = [prompt.reshape(len(prompt), -1).tolist() for prompt in read_prompts(bundle, pixels)]
    return {
        "format": FORMAT,
        "name": manifest.name,
        "licence": manifest.licence,
        "fps": manifest.frames_per_second,
        "size": tokenizer.size,
        "cover": tokenizer.cover,
        "tokenizer": {"latents": pixels.latents, "factor": tokenizer.temporal_factor},
        "layout": asdict(layout),
        "window": window,
        "capacity": slots_needed(layout, window, MAX_WIDTH),
        "in_sight": slots_in_sight(layout, window),
        "max_width": MAX_WIDTH,
        "context": manifest.context.model_dump(mode="json"),
        "cache": manifest.cache.model_dump(mode="json"),
        "vocabulary": manifest.output_vocabulary,
        "ranges": _ranges(manifest),
        "keep_crossing": manifest.sampling.keep_crossing,
        "minimum_temperature": manifest.sampling.minimum_temperature,
        "order": {
            "k": order.k,
            "d": order.d,
            "seeds": order.row_seed.value,
            "refeed": order.refeed,
            "keepSeeds": order.keep_seeds,
        },
        "settings": PlaySettings.of(manifest).model_dump(mode="json"),
        "actions": None if codec is None else codec.model_dump(mode="json"),
        "rest": None if codec is None else encode(codec, {}).tolist(),
        "controls": read_controls(bundle.path, codec).model_dump(mode="json"),
        "record": record.header(bundle, manifest.precisions[0], window).model_dump(mode="json"),
        "prompts": prompts,
    }


def _check(bundle: Bundle) -> None:
    manifest = bundle.manifest
    form = next((graph for graph in manifest.graphs if graph.form is Form.PREFIX), None)
    precisions = f"{bundle.path} at precision {manifest.precisions[0]}"
    if form is None:
        raise UsageError(f"{precisions} has no prefix graph; export it with --form prefix")
    if manifest.text is not None:
        raise UsageError(f"{manifest.name} attends to a text, which a page cannot read; use diagd-play")
    if manifest.cache_dtype(form) != np.float32:
        raise UsageError(f"{precisions} keeps K/V rows in {manifest.cache_dtype(form)}; a page takes float32")


def _ranges(manifest: Manifest) -> list[list[int]]:
    """Ids [low, high) that may be drawn at each cell; one pair where they are all alike."""
    ranges: list[list[int]] = manifest.cell_ranges.reshape(-1, 2).tolist()
    return ranges[:1] if all(one == ranges[0] for one in ranges) else ranges


HOST: Final = "127.0.0.1"
HEADERS: Final = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""What any host has to send for more than one thread; the last one spares a reload after a new build."""


class _Handler(SimpleHTTPRequestHandler):
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
    }

    @override
    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server that is bound; ``serve_forever()`` it, and close it.

    Raises:
        UsageError: nobody can listen there.
    """
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        raise UsageError(
            f"cannot listen on {HOST}, port {port}: {error.strerror or error}; choose another --port"
        ) from None


VERSION: Final = "1.30.0"
"""The page calls the module as this version's own scripts do, which later ones need not keep."""

ADDRESS: Final = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
_BYTES: Final = 33_106_585  # of the archive
_SECONDS: Final = 30.0  # of silence, until the registry is given up
_CHUNK: Final = 1 << 20

WASM: Final = {
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
WEBGPU: Final = {
    "ort.jspi.min.mjs": "bc57179d923fda2d88d4a395359c8df44399dde087bf9ff44fc0e40ab398e4d9",
    "ort-wasm-simd-threaded.jspi.mjs": "270e2c6da9f297239d301d329782b6446641cb1e16a77967690adcfca35f3268",
    "ort-wasm-simd-threaded.jspi.wasm": "a54c76f86b0f0d9572380cf1c6292a7b3903716ffcbcd6b0e5c7050bf430eb93",
}
"""Files that are used, and their sha256: of the smallest build, and of the one that has WebGPU."""

DIGESTS: Final = WASM | WEBGPU


def runtime_files(source: Path | None, progress: Progress) -> dict[str, bytes]:
    """The files of `DIGESTS`.

    ``source`` is the package's archive, or a folder that holds the files; None: the registry's, once.

    Raises:
        UsageError: the source is none, or of another version.
        DependencyError: the registry cannot be reached.
    """
    if source is not None:
        return _checked(_read(source), str(source))
    files: dict[str, bytes] = {}

    def make(folder: Path) -> None:
        files.update(_fetched(progress))
        for name, content in files.items():
            (folder / name).write_bytes(content)

    kept = cache.entry("onnxruntime-web", VERSION, make, _BYTES)
    return files or (_checked(_read(kept), str(kept)) if kept else _fetched(progress))


def _read(source: Path) -> dict[str, bytes]:
    if source.is_dir():
        found = {name: next(iter(sorted(source.rglob(name))), None) for name in DIGESTS}
        return {name: path.read_bytes() for name, path in found.items() if path is not None}
    try:
        return _unpacked(source.read_bytes())
    except Exception as error:  # tarfile and its decompressors raise whatever they meet
        raise UsageError(f"--runtime {source}: {error}; expected the archive at {ADDRESS}") from None


def _unpacked(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        members = {Path(member.name).name: member for member in packed if "/dist/" in member.name}
        opened = {name: packed.extractfile(members[name]) for name in DIGESTS if name in members}
        return {name: file.read() for name, file in opened.items() if file is not None}


def _checked(files: dict[str, bytes], source: str) -> dict[str, bytes]:
    for name, expected in DIGESTS.items():
        found = hashlib.sha256(files[name]).hexdigest() if name in files else "missing"
        if found != expected:
            raise UsageError(
                f"{source}: {name} is {found}, expected sha256 {expected} of onnxruntime-web {VERSION}; "
                f"take the package from {ADDRESS}"
            )
    return files


def _fetched(progress: Progress) -> dict[str, bytes]:
    content = bytearray()
    try:
        with (
            urllib.request.urlopen(ADDRESS, timeout=_SECONDS) as answer,
            progress.bytes(f"onnxruntime-web {VERSION}", _BYTES) as advance,
        ):
            while chunk := answer.read(_CHUNK):
                content += chunk
                advance(len(chunk))
        return _checked(_unpacked(bytes(content)), ADDRESS)
    except (OSError, HTTPException, tarfile.TarError, EOFError, zlib.error) as error:
        raise DependencyError(
            f"onnxruntime-web {VERSION} cannot be fetched ({error}); bring {ADDRESS} here and give "
            "--runtime FILE"
        ) from None
