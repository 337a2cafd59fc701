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


@contextmanager
def workspace(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle with every large file linked, not copied; only the manifest may be written over."""
    with atomic_directory(bundle.path) as directory:
        for name in bundle.manifest.files:
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(bundle.file(name), target)
        shutil.copyfile(bundle.file(MANIFEST_NAME), directory / MANIFEST_NAME)
        yield Bundle(directory, bundle.manifest)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
