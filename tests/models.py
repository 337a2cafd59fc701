"""Bundles of small models whose weights a test holds in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from diagd.bundle.manifest import DefaultSchedule, IdRange, SamplingRules
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
        schedule=DefaultSchedule(k=1),
        frames_per_second=8.0,
        licence="none",
        origin="the tests",
    )


def export_small(model: Transformer, path: Path, options: GraphOptions | None = None) -> Path:
    """Export a model through a checkpoint file; returns the bundle."""
    file = path.with_suffix(".safetensors")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    sources = Sources(open_checkpoint(str(file)))
    return export(small_family(model), options or GraphOptions(), sources, path).path
