"""ONNX Runtime Web, at one version: from the npm registry into the cache, or from where it already is."""

from __future__ import annotations

import hashlib
import io
import tarfile
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Final

from diagd.bundle import cache
from diagd.errors import DependencyError, UsageError
from diagd.progress import Progress

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
