"""A copy of a bundle to work in: it takes the bundle's place when all is well and vanishes otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from diagd.bundle import Bundle, atomic_bundle, read_manifest
from diagd.bundle.files import link
from diagd.bundle.manifest import MANIFEST_NAME


@contextmanager
def workspace(bundle: Bundle) -> Iterator[tuple[Bundle, Bundle]]:
    """The bundle as it is once other writers are done, and a copy with every large file linked, not copied.

    Only the manifest of the copy may be written over. What is no file of the manifest comes along once the
    work is done: compiled engines, and whatever the user put there.
    """
    with atomic_bundle(bundle.path, "bundle") as directory:
        current = Bundle(bundle.path, read_manifest(bundle.path))
        for name in current.manifest.files:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            link(current.file(name).resolve(), directory / name)
        shutil.copyfile(current.file(MANIFEST_NAME), directory / MANIFEST_NAME)
        yield current, Bundle(directory, current.manifest)
