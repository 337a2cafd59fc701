"""Bundles of small models whose weights a test holds in PyTorch."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import save

import diagd
from diagd.bundle.manifest import IdRange, SamplingRules
from diagd.export.checkpoints import open_checkpoint
from diagd.export.exporter import GraphOptions, Sources, export
from diagd.export.families.family import Family, identity_rules
from diagd.export.transformer import Transformer
from tests.oracles.models import CODES

PREFIX_TOKEN = CODES + 1


def small_family(model: Transformer) -> Family:
    """A family of one small model, under the transformer's own tensor names."""
    layout = model.config.layout
    config = replace(model.config, layout=replace(layout, prefix_tokens=(PREFIX_TOKEN,) * layout.prefix))
    return Family(
        name="small",
        family="small",
        title="a small model of the tests",
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
    described = repr((model.config, options)).encode()
    key = hashlib.sha256(b"".join((weights, described, _sources()))).hexdigest()[:32]
    kept = Path(tempfile.gettempdir()) / f"diagd-tests-{os.getuid()}" / key
    if not kept.is_dir():
        kept.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            file = Path(folder) / "small.safetensors"
            file.write_bytes(weights)
            made = export(
                small_family(model), options, Sources(open_checkpoint(str(file))), Path(folder) / "a"
            )
            with suppress(OSError):  # another process was as quick
                made.path.rename(kept)
    return Path(shutil.copytree(kept, path))


@lru_cache
def _sources() -> bytes:
    """What an export depends on beside the model: the exporter, and who traces and who reads the graph."""
    package = Path(diagd.__file__).parent
    files = sorted(
        file for name in ("export", "bundle", "schedule") for file in (package / name).rglob("*.py")
    )
    versions = [version(name) for name in ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime")]
    return b"".join([*(file.read_bytes() for file in files), *(text.encode() for text in versions)])
