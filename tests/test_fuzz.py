"""Inputs that nobody meant: what is wrong with them is said by a DiagdError, whatever it is.

``DIAGD_FUZZ`` is the number of inputs of each kind. What once ended in another error lies in tests/corpus.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from benchmarks.fuzz import CORPUS, KINDS, fuzz
from diagd.bundle import read_manifest
from diagd.bundle.manifest import MANIFEST_NAME
from diagd.errors import DiagdError

KEPT = sorted(path.relative_to(CORPUS).as_posix() for path in CORPUS.glob("*/*"))


@pytest.mark.parametrize("kind", KINDS)
def test_random_inputs(kind: str, tmp_path: Path) -> None:
    fuzz(kind, int(os.environ.get("DIAGD_FUZZ", "200")), tmp_path)


@pytest.mark.parametrize("name", KEPT)
def test_inputs_of_the_corpus(name: str, tmp_path: Path) -> None:
    kind = name.partition("/")[0]
    with contextlib.suppress(DiagdError):
        KINDS[kind].read((CORPUS / name).read_bytes(), tmp_path)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 200_000, b"null", b"{}", b'{"schema_version": 1e400}']
)
def test_manifests_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(DiagdError):
        read_manifest(tmp_path)
