"""Bundles of small models whose weights a test holds in PyTorch."""

from __future__ import annotations

import getpass
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors.torch import save

import diagd
from diagd.bundle.lock import turn
from diagd.bundle.manifest import IdRange, SamplingRules
from diagd.export.checkpoints import open_checkpoint
from diagd.export.exporter import Sources, export
from diagd.export.families import Family, identity_rules
from diagd.export.options import GraphOptions
from diagd.export.transformer import Transformer
from tests.oracles.models import CODES

PREFIX_TOKEN = CODES + 1

LATER_RUNTIME = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="ONNX Runtime 1.23, the last for Python 3.10, has no such graphs"
)

KEPT = Path(tempfile.gettempdir()) / f"diagd-tests-{getpass.getuser()}"
"""What runs of the tests on this machine share."""


def small_family(model: Transformer) -> Family:
    """A family of one small model, under the transformer's own tensor names."""
    layout = model.config.layout
    config = replace(model.config, layout=replace(layout, prefix_tokens=(PREFIX_TOKEN,) * layout.prefix))
    return Family(
        name="small",
        family="small",
        transformer=config,
        rules=identity_rules(model.config),
        prefixes=("",),
        sampling=SamplingRules(ranges=(IdRange(low=0, high=CODES),)),
        order="k=1 serial",
        frames_per_second=8.0,
        licence="none",
        origin="the tests",
    )


def export_small(model: Transformer, path: Path, options: GraphOptions | None = None) -> Path:
    """Export a model through a checkpoint file; returns the bundle.

    An equal export by the same sources is made once on a machine and copied from then on.
    """
    options = options or GraphOptions()
    weights = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})

    def make(folder: Path) -> None:
        file = folder.with_name("small.safetensors")
        file.write_bytes(weights)
        export(small_family(model), options, Sources(open_checkpoint(str(file))), folder)

    described = repr((model.config, options)).encode()
    return copy_kept(weights + described, ("export", "bundle", "schedule"), make, path)


def copy_kept(what: bytes, packages: Sequence[str], make: Callable[[Path], None], path: Path) -> Path:
    """Copy a folder to ``path`` that is made once on a machine, see ``made_once``."""
    return Path(shutil.copytree(made_once(what, packages, make), path))


def made_once(what: bytes, packages: Sequence[str], make: Callable[[Path], None]) -> Path:
    """A folder that is made once on a machine, whoever comes first, for equal sources; nobody writes to it.

    Args:
        what: all that ``make`` depends on beside packages of diagd.
        packages: these.
        make: makes the folder.
    """
    key = hashlib.sha256(what + _sources(*packages)).hexdigest()[:32]
    kept = KEPT / key
    with turn(kept):
        if not kept.is_dir():
            with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                made = Path(folder) / "a"
                make(made)
                made.rename(kept)
    return kept


@cache
def _sources(*packages: str) -> bytes:
    """Modules of packages, and who traces and who reads a graph."""
    package = Path(diagd.__file__).parent
    files = sorted(file for name in packages for file in (package / name).rglob("*.py"))
    versions = [version(name) for name in ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime")]
    return b"".join([*(file.read_bytes() for file in files), *(text.encode() for text in versions)])
