"""A copy of a bundle to work in: it takes the bundle's place when all is well and vanishes otherwise."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diagd.bundle import Bundle
from diagd.bundle.files import atomic_directory
from diagd.bundle.manifest import MANIFEST_NAME
from diagd.engines.fingerprint import EngineStore


@contextmanager
def workspace(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle with every large file linked, not copied; only the manifest may be written over.

    Compiled engines come along once the work is done, for they are no files of the manifest.
    """
    with atomic_directory(bundle.path) as directory:
        for name in bundle.manifest.files:
            _link(bundle.file(name), directory / name)
        shutil.copyfile(bundle.file(MANIFEST_NAME), directory / MANIFEST_NAME)
        yield Bundle(directory, bundle.manifest)
        for engine in EngineStore(bundle):
            for file in engine.directory.iterdir():
                _link(file, directory / file.relative_to(bundle.path))


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
