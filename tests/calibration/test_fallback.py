"""Products that go back to floating point until the whole is inside its budget."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from diagd.bundle import Bundle, Form
from diagd.calibration.evaluate import ATTEMPTS, most_harmful
from diagd.calibration.options import Budget
from diagd.calibration.quantise import RejectedError
from diagd.calibration.report import LayerReport, read_calibration
from tests.calibration.bundles import LAYOUT, load_graph, quantise
from tests.models import export_small
from tests.oracles.models import small_model


def layer(
    name: str, divergence: float | None, signal_to_noise: float, excluded: str | None = None
) -> LayerReport:
    return LayerReport(
        name=name,
        inputs=8,
        outputs=8,
        signal_to_noise=signal_to_noise,
        divergence=divergence,
        excluded=excluded,
    )


def test_the_worst_layer_s_worst_product_goes_first() -> None:
    layers = [
        layer("transformer.layers.0.attention.qkv", 0.1, 20),
        layer("transformer.layers.1.attention.qkv", 1.0, 40),
        layer("transformer.layers.1.feed_forward.down", 1.0, 20),
        layer("transformer.head", 0.2, 10),
    ]
    assert most_harmful(layers) == ["transformer.layers.1.feed_forward.down"]


def test_half_of_the_harm_is_given_up_and_no_product_twice() -> None:
    layers = [layer(f"transformer.layers.{n}.feed_forward.down", 1.0, 20) for n in range(8)]
    first = most_harmful(layers)
    assert len(first) == 4
    rest = [
        entry.model_copy(update={"excluded": "gate"}) if entry.name in first else entry for entry in layers
    ]
    assert len(most_harmful(rest)) == 2
    assert not set(first) & set(most_harmful(rest))


def test_something_is_given_up_even_if_no_layer_does_harm_alone() -> None:
    assert len(most_harmful([layer("transformer.head", 0.0, 20), layer("transformer.body", None, 30)])) == 1
    assert most_harmful([layer("transformer.head", 1.0, 20, excluded="floor")]) == []


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One channel of every norm is an outlier."""
    model = small_model(LAYOUT, context_frames=6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter[3] *= 20
    return export_small(model, tmp_path_factory.mktemp("plain") / "small.diagd")


def test_giving_products_up_brings_a_model_inside_its_budget(plain: Path, tmp_path: Path) -> None:
    target = shutil.copytree(plain, tmp_path / "a.diagd")
    rise = quantise(target, "int4-weight").figures["nll"] or 0
    target = shutil.copytree(plain, tmp_path / "b.diagd")
    report = quantise(target, "int4-weight", budget=Budget(agreement=0, nll=rise / 3, psnr=0))
    assert 1 < len(report.attempts) <= ATTEMPTS
    assert [bool(attempt.failures) for attempt in report.attempts] == [True] * (len(report.attempts) - 1) + [
        False
    ]
    assert report.attempts[0].excluded == 0
    assert report.attempts[-1].excluded == len(report.excluded) > 0
    assert {entry.excluded for entry in report.layers} == {None, "gate"}
    written = read_calibration(target / "calibration")
    assert written is not None
    assert written.precisions["int4-weight"] == report
    bundle = Bundle.open(target).at_precision("int4-weight")
    graph = load_graph(bundle.file(bundle.manifest.graph(Form.PREFIX).file))
    assert set(report.excluded) <= {tensor.name for tensor in graph.graph.initializer}
    quantised = sum(node.op_type == "MatMulNBits" for node in graph.graph.node)
    assert quantised == len(report.layers) - len(report.excluded)


def test_rounds_are_bounded_and_the_bundle_stays(plain: Path, tmp_path: Path) -> None:
    target = shutil.copytree(plain, tmp_path / "a.diagd")
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(RejectedError, match=r"of 9 products in floating point.*unchanged") as caught:
        quantise(target, "int8-dynamic", budget=Budget(agreement=0, nll=-1, psnr=0))
    attempts = caught.value.report.attempts
    assert 1 < len(attempts) <= ATTEMPTS
    assert [a.excluded for a in attempts] == sorted({a.excluded for a in attempts})
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
