"""Alignment of a bundle: new weights under the same graphs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diagd.bundle import Bundle
from diagd.errors import BundleError, UsageError
from diagd.export.transformer import Transformer
from diagd.schedule import Schedule, StreamLayout
from diagd.tuning.align import align
from diagd.tuning.options import AlignOptions
from diagd.tuning.source import Source
from tests.models import export_small
from tests.oracles.models import random_stream, small_model

LAYOUT = StreamLayout(3, 4, before=1)
WINDOWS = np.stack([random_stream(LAYOUT, 3, 3, seed) for seed in range(4)])
CHAINED = Schedule.chained(LAYOUT, 1)
OPTIONS = AlignOptions(((1.0, CHAINED),), steps=3, batch=2, rate=1e-2, autocast=False)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Gains that are alike are each their own."""
    made = small_model(LAYOUT, context_frames=4)
    with torch.no_grad():
        for name, gain in made.named_parameters():
            if "norm" in name:
                gain.fill_(1)
    return made


@pytest.fixture(scope="module")
def bundle(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(export_small(model, tmp_path_factory.mktemp("align") / "small.diagd"))


def source(bundle: Bundle) -> Source:
    return Source(str(bundle.path), bundle)


def test_the_bundle_is_that_of_the_aligned_model(model: Transformer, bundle: Bundle, tmp_path: Path) -> None:
    before = bundle.digest
    (bundle.path / "prompts").mkdir()
    (bundle.path / "prompts" / "00.png").write_bytes(b"given")
    output = source(bundle).align(WINDOWS, OPTIONS, tmp_path / "aligned.diagd")
    aligned = Bundle.open(output)
    assert Bundle.open(bundle.path).digest == before
    expected = align(copy.deepcopy(model), WINDOWS, OPTIONS)
    exported = Bundle.open(export_small(expected, tmp_path / "exported.diagd"))
    assert aligned.manifest.files["weights.bin"] == exported.manifest.files["weights.bin"]
    assert aligned.manifest.files["weights.bin"] != bundle.manifest.files["weights.bin"]
    assert aligned.manifest.files["step.onnx"] == bundle.manifest.files["step.onnx"]
    assert (aligned.path / "prompts" / "00.png").read_bytes() == b"given"


def test_the_manifest_is_that_of_the_new_weights(bundle: Bundle, tmp_path: Path) -> None:
    """Weights that were trained are no random ones, and their schedule is the one they were trained for."""
    seeded = bundle.manifest.provenance.model_copy(update={"random_seed": 5})
    random = replace(bundle, manifest=bundle.manifest.model_copy(update={"provenance": seeded}))
    shares = ((0.4, Schedule.next_token(LAYOUT)), (0.2, Schedule.serial(LAYOUT, 2)), (0.3, CHAINED))
    options = replace(OPTIONS, shares=shares)
    made = Bundle.open(source(random).align(WINDOWS, options, tmp_path / "aligned.diagd")).manifest
    assert made.schedule == CHAINED
    assert made.provenance.source == bundle.manifest.provenance.source
    assert made.provenance.tuned == "aligned for 3 steps to next token 0.4, k=2 serial 0.2, k=1 chained 0.3"
    assert made.provenance.random_seed is None
    assert made.transformer == bundle.manifest.transformer
    serial = replace(OPTIONS, shares=((0.4, Schedule.next_token(LAYOUT)), (0.6, Schedule.serial(LAYOUT, 2))))
    made = Bundle.open(source(bundle).align(WINDOWS, serial, tmp_path / "serial.diagd")).manifest
    assert made.order == "k=2 serial"


def test_graphs_of_other_precisions_are_left_out(bundle: Bundle, tmp_path: Path) -> None:
    quantised = bundle.manifest.graphs[0].model_copy(update={"file": "step.int8.onnx", "precision": "int8"})
    graphs = (*bundle.manifest.graphs, quantised)
    mixed = replace(bundle, manifest=bundle.manifest.model_copy(update={"graphs": graphs}))
    aligned = source(mixed).align(WINDOWS, OPTIONS, tmp_path / "aligned.diagd")
    assert {graph.precision for graph in Bundle.open(aligned).manifest.graphs} == {"fp32"}


def test_other_models_and_the_bundle_itself_are_refused(
    model: Transformer, bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="is what is read"):
        source(bundle).align(WINDOWS, OPTIONS, bundle.path)
    wider = bundle.manifest.model_copy(update={"transformer": replace(model.config, feed_forward=64)})
    with pytest.raises(BundleError, match=r"the weights of small are \d+: export it again"):
        source(replace(bundle, manifest=wider)).align(WINDOWS, OPTIONS, tmp_path / "aligned.diagd")
    assert list(tmp_path.iterdir()) == []
