"""From a bundle to a folder that plays it in a browser, and a server of it for those of this machine."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np
from typing_extensions import override

from diagd.bundle import Bundle, Form, Manifest
from diagd.bundle.files import atomic_directory, turn, usual_rights
from diagd.bundle.targets import folder_target
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import MAX_WIDTH
from diagd.engines.sampler import cell_ranges
from diagd.errors import UsageError, require
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
from diagd.web.runtime import WASM, WEBGPU

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
    known = {graph.precision for graph in bundle.manifest.graphs}
    best = PRECISIONS[webgpu]
    bundle = bundle.at_precision(precision or (best if best in known else None))
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
            (folder / WORLD).write_text(text, encoding="utf-8")
    return Page(output, world["record"]["precision"], sizes | {WORLD: len(text)})


def _written(world: Path) -> set[str]:
    """What an earlier run wrote, by its own word.

    Raises:
        UsageError: somebody changed it.
    """
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
    graphs = {"step": bundle.manifest.graph(Form.PREFIX).file}
    graphs |= {"encoder": tokenizer.encoder, "decoder": tokenizer.decoder}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for file, content in runtime.items():
            (folder if file.endswith(".mjs") else work).joinpath(file).write_bytes(content)
        for role, file in graphs.items():
            save_trimmed(bundle.file(file), work / f"{role}.onnx", f"{role}.bin")
        for part in progress.each(sorted(work.iterdir()), "pack"):
            (folder / f"{part.name}{PACKED}").write_bytes(gzip.compress(part.read_bytes(), mtime=0))


def save_trimmed(graph: Path, target: Path, weights: str) -> None:
    """Write a graph again, and beside it the weights that it reads, without those of other graphs.

    Raises:
        DependencyError: onnx is not installed.
    """
    onnx = require("onnx", extra="web", purpose="trim the weights of a graph")
    model = onnx.load(graph)
    with usual_rights(target.parent / weights):  # there is none where all tensors are small
        onnx.save(model, target, save_as_external_data=True, location=weights, size_threshold=_INLINE_BYTES)


def _world(bundle: Bundle, window: int) -> dict[str, Any]:
    """All that the worker has to know, as JSON.

    Raises:
        UsageError: the bundle cannot be played in a page.
    """
    _check(bundle)
    manifest, pixels = bundle.manifest, PixelCodec(bundle, CpuOptions())
    layout, codec, tokenizer, order = manifest.layout, manifest.actions, pixels.spec, manifest.schedule
    prompts = [prompt.reshape(len(prompt), -1).tolist() for prompt in read_prompts(bundle, pixels)]
    return {
        "format": FORMAT,
        "name": manifest.name,
        "licence": manifest.licence,
        "fps": manifest.frames_per_second,
        "size": [tokenizer.height, tokenizer.width],
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
        "record": record.header(bundle, manifest.graphs[0].precision, window).model_dump(mode="json"),
        "prompts": prompts,
    }


def _check(bundle: Bundle) -> None:
    manifest = bundle.manifest
    form = next((graph for graph in manifest.graphs if graph.form is Form.PREFIX), None)
    precisions = f"{bundle.path} at precision {manifest.graphs[0].precision}"
    if form is None:
        raise UsageError(f"{precisions} has no prefix graph; export it with --form prefix")
    if manifest.text is not None:
        raise UsageError(f"{manifest.name} attends to a text, which a page cannot read; use diagd-play")
    if manifest.cache_dtype(form) != np.float32:
        raise UsageError(f"{precisions} keeps K/V rows in {manifest.cache_dtype(form)}; a page takes float32")


def _ranges(manifest: Manifest) -> list[list[int]]:
    """Ids [low, high) that may be drawn at each cell; one pair where they are all alike."""
    layout = manifest.layout
    ranges: list[list[int]] = cell_ranges(manifest)[layout.before :][: layout.cells].tolist()
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
