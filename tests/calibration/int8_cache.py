"""Bundles whose portable graph has an int8 cache and nothing else quantised, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diagd.bundle import Bundle, Form, seal
from diagd.bundle.manifest import StepGraph
from diagd.bundle.transformer import linear_rotary
from diagd.calibration.graph_writer import GraphWriter
from diagd.calibration.options import CalibrationOptions
from diagd.export.options import GraphOptions
from diagd.export.transformer import FullAttention, Transformer
from diagd.progress import Progress
from diagd.schedule import StreamLayout
from tests.models import export_small
from tests.oracles.full_recompute import FullRecompute
from tests.oracles.models import small_model

Scales = Mapping[str, np.ndarray]
WIDTHS = (1, 4, 16)


def grouped_model(
    layout: StreamLayout, *, layers: int = 2, rotary: bool = True, kv_heads: int = 2
) -> Transformer:
    """Heads of 16 channels, four of them over ``kv_heads``; positions are rotary or learned."""
    small = small_model(layout, layers=layers, context_frames=4)
    config = replace(
        small.config,
        head_size=16,
        kv_heads=kv_heads,
        rotary=linear_rotary(16, 1e4) if rotary else None,
        position_embedding=not rotary,
    )
    model = Transformer(config).initialise(torch.Generator().manual_seed(4)).eval()
    with torch.no_grad():
        model.embedding.mul_(50)
    return model


def random_scales(model: Transformer, seed: int = 0) -> Scales:
    """Scales by K/V tensor, equal for the pairs of keys only, and so coarse that rounding changes tokens."""
    config, random, scales = model.config, np.random.default_rng(seed), {}
    for layer in range(config.layers):
        for kind in ("key", "value"):
            shape = (config.kv_heads, config.head_size // 2)
            half = random.uniform(0.1, 0.3, shape).astype(np.float32)
            scales[f"{kind}_{layer}"] = np.concatenate([half, half], axis=1)
    return scales


def export_rounded(
    model: Transformer, path: Path, scales: Scales, precision: Literal["fp32", "fp16"] = "fp32"
) -> Bundle:
    """Export and give the graphs a cache with these scales, in place: prefix rounds, portable stores."""
    forms = (Form.PREFIX, Form.PORTABLE) if precision == "fp32" else (Form.PORTABLE,)
    bundle = Bundle.open(export_small(model, path, GraphOptions(forms, precision, widths=WIDTHS)))
    options = CalibrationOptions("int8", floats="fp32", kv_cache="int8")
    writer, graphs = GraphWriter(bundle, options, scales, Progress()), list[StepGraph]()
    for form in forms:
        graphs += writer.write([graph for graph in bundle.manifest.graphs if graph.form is form], {})
    told = tuple(graph.model_copy(update={"precision": precision}) for graph in graphs)
    seal(path, bundle.manifest.model_copy(update={"graphs": told}))
    return Bundle.open(path)


class RoundedAttention(FullAttention):
    """Attention over rows that were rounded first."""

    def __init__(self, visible: Tensor, scales: Scales) -> None:
        super().__init__(visible)
        self._scales = scales

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = (
            self._rounded(rows, self._scales[f"{kind}_{layer}"])
            for kind, rows in (("key", keys), ("value", values))
        )
        return super().attend(layer, queries, keys, values)

    @staticmethod
    def _rounded(rows: Tensor, scale: np.ndarray) -> Tensor:
        factor = torch.from_numpy(scale)
        return torch.clamp(torch.round(rows / factor), -128, 127) * factor


class RoundedRecompute(FullRecompute):
    """Full recomputation whose attention sees rounded keys and values only."""

    scales: Scales

    @torch.no_grad()
    def _forward(self) -> Tensor:
        ids = torch.tensor([fed.token for fed in self.fed])
        positions = torch.tensor([fed.position for fed in self.fed])
        form = RoundedAttention(self.visible(), self.scales)
        logits: Tensor = self.model.logits(self.model.states(ids, positions, form), form)
        return logits
