"""TensorRT-RTX compiles the graphs of every scheme as calibration writes them, on a machine without a GPU."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import onnx
import pytest

from diagd.bundle import Bundle, Form, seal
from diagd.engines.tensorrt.builder import Build, Builder, Request
from diagd.errors import EngineError
from tests.calibration.bundles import every_scheme, load_graph, quantise

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

LAYERS, WIDTHS = 1, (1, 8)
TARGETS = {"int8": "sm86", "int8-weight": "sm86", "int4-weight": "sm89", "fp8": "sm89"}
OPSETS = {"int8": 19, "int8-weight": 19, "int4-weight": 21, "fp8": 19}
"""Of the portable form: no more than a scheme needs."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(every_scheme(tmp_path_factory.mktemp("builds") / "small.diagd"))


def compile_graph(bundle: Bundle, precision: str, form: Form, target: str) -> Build:
    file = bundle.at_precision(precision).manifest.graph(form).file
    return Builder(rtx).build(bundle.file(file), Request(120, None, WIDTHS, (target,)))


@pytest.mark.parametrize("precision", TARGETS)
def test_the_modern_form_is_compiled_around_fused_attention(bundle: Bundle, precision: str) -> None:
    build = compile_graph(bundle, precision, Form.MODERN, TARGETS[precision])
    assert build.layers["DEQUANTIZE"] >= 4 * LAYERS + 1
    assert build.layers["KV_CACHE_UPDATE"] == 2 * LAYERS
    assert build.layers["ATTENTION_INPUT"] == build.layers["ATTENTION_OUTPUT"] == LAYERS
    assert build.log == ()


class PlainBuilder(Builder):
    """Leaves attention as the parser made it: TensorRT refuses what has no kernel of its own."""

    def _prepare_attention(self, network: object) -> Counter[str]:
        del network
        return Counter()


def test_attention_has_a_kernel_only_in_float16(bundle: Bundle, tmp_path: Path) -> None:
    options = Request(120, None, WIDTHS, ("sm86",))
    halved = bundle.at_precision("int8").manifest.graph(Form.MODERN).file
    assert PlainBuilder(rtx).build(bundle.file(halved), options).plan.nbytes > 0
    target = shutil.copytree(bundle.path, tmp_path / "single.diagd")
    only = tuple(graph for graph in bundle.manifest.graphs if graph.precision == "fp32")
    seal(target, bundle.manifest.model_copy(update={"graphs": only}))
    quantise(target, "int8", budget=None, floats="fp32")
    with pytest.raises(EngineError, match="not supported by a dedicated kernel"):
        PlainBuilder(rtx).build(target / halved, options)


@pytest.mark.parametrize("precision", TARGETS)
def test_the_portable_form_is_compiled(bundle: Bundle, precision: str) -> None:
    build = compile_graph(bundle, precision, Form.PORTABLE, TARGETS[precision])
    assert build.layers["DEQUANTIZE"] >= 4 * LAYERS + 1
    assert not {"KV_CACHE_UPDATE", "ATTENTION_INPUT"} & set(build.layers)


@pytest.mark.parametrize("precision", TARGETS)
def test_gpu_graphs_compute_in_float16(bundle: Bundle, precision: str) -> None:
    """K/V rows and scales are float16, logits float32; the manifest tells the runtime so."""
    manifest = bundle.at_precision(precision).manifest
    for form in (Form.MODERN, Form.PORTABLE):
        graph = manifest.graph(form)
        assert manifest.cache_dtype(graph) == "float16"
        model = load_graph(bundle.file(graph.file))
        values = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
        assert values["past_key_0"] == onnx.TensorProto.FLOAT16
        assert values["logits"] == onnx.TensorProto.FLOAT
        scales = {t.data_type for t in model.graph.initializer if t.name.endswith(".scale")}
        assert scales == {onnx.TensorProto.FLOAT16}
        if form is Form.PORTABLE:
            assert model.opset_import[0].version == OPSETS[precision]
    assert manifest.cache_dtype(manifest.graph(Form.PREFIX)) == "float32"


@pytest.mark.parametrize(("precision", "target"), [("fp8", "sm86"), ("int4-weight", "sm75")])
def test_a_gpu_without_the_type_is_refused(bundle: Bundle, precision: str, target: str) -> None:
    with pytest.raises(EngineError, match=r"cannot build .*HW-specific datatypes"):
        compile_graph(bundle, precision, Form.MODERN, target)
