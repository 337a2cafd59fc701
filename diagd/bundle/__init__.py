"""Bundles: the directory with everything one model needs at run time; opened, replaced and sealed here."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from diagd.bundle import cache
from diagd.bundle.files import atomic_directory, instead, sha256
from diagd.bundle.lock import turn
from diagd.bundle.manifest import (
    INT8_CACHE,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    FileRecord,
    Form,
    Manifest,
    StepGraph,
)
from diagd.bundle.precision import FLOATING, PRECISIONS
from diagd.bundle.targets import bundle_target
from diagd.errors import BundleError, ScheduleError, UsageError, command_line, expect, fault

__all__ = [
    "PROMPTS_NAME",
    "Bundle",
    "Form",
    "Manifest",
    "atomic_bundle",
    "put_prompts",
    "read_manifest",
    "seal",
]

_LOG = logging.getLogger(__name__)

PROMPTS_NAME = "prompts"
"""Folder of a bundle with pictures or tokens that worlds start from."""


@dataclass(frozen=True)
class Bundle:
    """A directory whose files were checked against its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Check a bundle before anything of it is loaded.

        Sizes are always compared; digests when a file is seen for the first time or has changed since
        (size, times or inode), which is noted in the user's cache.

        Raises:
            BundleError: the bundle is missing, truncated, altered, damaged or too new.
        """
        bundle = cls.seen(path)
        for name, record in bundle.manifest.files.items():
            if cache.digest(bundle.path / name) != record.sha256:
                raise BundleError(f"{bundle.path}: '{name}' was altered (its sha256 differs); {_MEND}")
        return bundle

    @classmethod
    def seen(cls, path: str | Path) -> Bundle:
        """A bundle whose files are there, of the sizes that its manifest says; none is read. See `open`.

        Files that no part of it names, as reports and prompts, may be gone: its manifest lists them no more.
        """
        expect(cls.seen, locals())
        if not os.fspath(path):
            raise UsageError("the path of the bundle is empty (a variable that is not set?); give it")
        path = Path(path)
        bundle = cls(path, read_manifest(path))
        bundle._check_files()
        files = bundle.manifest.files
        if gone := [name for name in files if not (path / name).is_file()]:
            _LOG.warning("%s goes on without '%s', which it was made with", path, "', '".join(gone))
        there = {name: record for name, record in files.items() if name not in gone}
        return replace(bundle, manifest=bundle.manifest.model_copy(update={"files": there}))

    def at_precision(self, precision: str | None = None) -> Bundle:
        """The bundle with graphs of one precision only, by default its first's; UsageError if it has none."""
        graphs, known = self.manifest.graphs, self.manifest.precisions
        chosen = known[0] if precision is None else precision
        if chosen not in known:
            raise UsageError(
                f"{self.path} has no {chosen} graph (it has {', '.join(known)}); {self._way_to(chosen)}"
            )
        selected = tuple(graph for graph in graphs if graph.precision == chosen)
        return replace(self, manifest=self.manifest.model_copy(update={"graphs": selected}))

    def _way_to(self, precision: str) -> str:
        """What gives the bundle graphs of a precision."""
        scheme = precision.removesuffix(INT8_CACHE)
        if scheme not in PRECISIONS:
            return f"precisions are {', '.join(PRECISIONS)}"
        if scheme in FLOATING:
            return f"export it again with --precision {scheme}"
        kv_cache = " --kv-cache int8" if scheme != precision else ""
        return f"make one with: diagd-calibrate {self.path} --precision {scheme}{kv_cache}"

    def file(self, name: str) -> Path:
        """Path of a file of the bundle."""
        return self.path / name

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.bytes for record in self.manifest.files.values())

    @property
    def digest(self) -> str:
        """Hex digest of the manifest, and through it of every file."""
        return sha256(self.path / MANIFEST_NAME)

    def check_unchanged(self, *names: str) -> None:
        """Refuse (BundleError) to read files that a bundle, put in this one's place since, has others of."""
        now = read_manifest(self.path).files
        if any(now.get(name) != self.manifest.files[name] for name in names):
            raise BundleError(
                f"another bundle took the place of {self.path} while it was in use: what uses it has to open "
                "it again"
            )

    def digest_of(self, *names: str) -> str:
        """Hex digest of some files, as the manifest has them: of a graph and its weights, say."""
        parts = [self.manifest.files[name].sha256 for name in names]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def graph_digest(self, graph: StepGraph) -> str:
        """Digest of a step graph and the files its weights lie in."""
        return self.digest_of(graph.file, *graph.weights.files)

    def _check_files(self) -> None:
        """Every file is inside the bundle and of its size, and every file that is referred to is listed."""
        manifest = self.manifest
        for name in manifest.files:
            path = PurePosixPath(name)
            if not path.parts or path.is_absolute() or ".." in path.parts or set("\\\0") & set(name):
                raise BundleError(f"{self.path}: '{name}' is no name of a file in a bundle; {_MEND}")
        for name in manifest.named_files:
            if name not in manifest.files:
                raise BundleError(f"{self.path}: its manifest needs '{name}' and does not list it; {_MEND}")
        for name, record in manifest.files.items():
            file = self.path / name
            if not file.is_file():
                if name in manifest.named_files:
                    raise BundleError(f"{self.path}: file '{name}' is missing; {_MEND}")
            elif file.stat().st_size != record.bytes:
                wrong = instead(file) or f"is truncated or was altered; {_MEND}"
                raise BundleError(
                    f"{self.path}: '{name}' has {file.stat().st_size} bytes, its manifest says "
                    f"{record.bytes}: it {wrong}"
                )


_MEND = "export the bundle again or copy it afresh"


def read_manifest(path: Path) -> Manifest:
    """Read a bundle's manifest without touching its other files.

    Raises:
        BundleError: there is no bundle, or its manifest cannot be read or is of a later version.
    """
    file = path / MANIFEST_NAME
    if not path.is_dir():
        raise BundleError(f"no bundle at {path}: a bundle is a directory made by diagd-export")
    if not file.is_file():
        raise BundleError(f"{path} is no bundle: it has no {MANIFEST_NAME}; make one with diagd-export")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file} {instead(file) or f'is damaged ({error}); {_MEND}'}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version}, this diagd reads up to {SCHEMA_VERSION}; "
            "run: pip install -U diagd"
        )
    if isinstance(version, int) and version < SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version}, this diagd reads version {SCHEMA_VERSION}; "
            f"export it again: {_export_line(path, content)}"
        )
    try:
        return Manifest.model_validate(content)
    except ScheduleError as error:  # of the layout, or the order
        raise BundleError(f"{file}: {error}; {_MEND}") from error
    except ValidationError as error:
        raise BundleError(f"{file}: field {fault(error)}; {_MEND}") from error


@contextmanager
def atomic_bundle(path: Path, option: str = "--output") -> Iterator[Path]:
    """A temporary directory that becomes the bundle at ``path`` on success and vanishes on failure.

    Files that the bundle there does not list in its manifest come along: they are the user's, or compiled
    engines. Writers of one bundle take turns.

    Raises:
        UsageError: something other than a bundle is there.
        BundleError: where the file system has no locks, another writer was faster.
    """
    place = bundle_target(path, option)
    with turn(place):
        before = _content(bundle_target(path, option) / MANIFEST_NAME)
        ours = {MANIFEST_NAME, *json.loads(before)["files"]} if before else ()
        with atomic_directory(place, ours) as directory:
            yield directory
            if _content(place / MANIFEST_NAME) != before:
                raise BundleError(f"{path} was written by another process meanwhile; run this again")


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


def _export_line(path: Path, content: dict[str, Any]) -> str:
    """The command that made a bundle of an earlier schema, as far as its manifest tells."""
    options: dict[str, Any] = {"--model": "NAME"}
    with suppress(AttributeError, TypeError):  # of one that was made by hand
        graphs: list[dict[str, Any]] = content.get("graphs") or []
        forms = dict.fromkeys(entry.get("form", "") for entry in graphs)
        provenance = content.get("provenance") or {}
        seed = provenance.get("random_seed")
        options = {
            "--model": content.get("name", "NAME"),
            "--checkpoint": provenance.get("source", "FILE") if seed is None else None,
            "--seed": seed,
            "--form": ",".join(filter(None, forms)) or None,
            "--precision": graphs[0].get("precision") if graphs else None,
        }
    words = ["diagd-export"] if options.get("--seed") is None else ["diagd-export", "--random-weights"]
    for option, value in {**options, "--output": path}.items():
        words += [] if value is None else [option, str(value)]
    return command_line(*words)


def put_prompts(pictures: Path, directory: Path, place: Path) -> None:
    """Copy a folder of what worlds start from into a sealed ``directory``: its files are the user's.

    Those that are at ``place`` already, which the directory is to take, stay in their stead.
    """
    if pictures.is_dir() and not (place / PROMPTS_NAME).exists():
        (directory / PROMPTS_NAME).mkdir()
        for picture in filter(Path.is_file, pictures.iterdir()):
            shutil.copyfile(picture, directory / PROMPTS_NAME / picture.name)


def seal(directory: Path, manifest: Manifest) -> Manifest:
    """Record every file of ``directory`` in the manifest and write it; returns what was written."""
    files = {
        file.relative_to(directory).as_posix(): FileRecord(bytes=file.stat().st_size, sha256=sha256(file))
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MANIFEST_NAME
    }
    sealed = manifest.model_copy(update={"files": files})
    (directory / MANIFEST_NAME).write_text(
        sealed.model_dump_json(indent=2) + "\n", encoding="utf-8", newline="\n"
    )
    return sealed
