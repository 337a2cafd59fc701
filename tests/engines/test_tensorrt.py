"""Engines that TensorRT-RTX really compiles, on a machine without a GPU."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from diagd.bundle import Bundle, Form
from diagd.bundle.transformer import linear_rotary
from diagd.engines.host import available_bytes
from diagd.engines.tensorrt import Capabilities, capabilities, check_targets, import_tensorrt
from diagd.engines.tensorrt.builder import (
    LIVE_INPUT,
    Build,
    Builder,
    LogLine,
    MemoryEstimate,
    Request,
    check_log,
    check_memory,
    errors_of,
    estimate,
)
from diagd.engines.tensorrt.opening import compile_engine
from diagd.errors import DependencyError, EngineError
from diagd.export.options import GraphOptions
from diagd.export.transformer import Transformer
from diagd.progress import Progress
from diagd.schedule import StreamLayout
from tests.engines.quantised import quantise
from tests.models import export_small
from tests.oracles.models import small_model

rtx = pytest.importorskip("tensorrt_rtx")

LAYERS = 2
WIDTHS = (1, 8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Heads of 32 channels in half precision: the smallest that fused attention takes."""
    small = small_model(StreamLayout(2, 3, after=1), layers=LAYERS, context_frames=4).config
    config = replace(small, hidden=64, head_size=32, feed_forward=64, rotary=linear_rotary(32, 1e4))
    model = Transformer(config).initialise(torch.Generator().manual_seed(0)).eval()
    path = tmp_path_factory.mktemp("bundle") / "small.diagd"
    options = GraphOptions((Form.MODERN, Form.PORTABLE), "fp16", widths=WIDTHS)
    return Bundle.open(export_small(model, path, options))


def compile_graph(graph: Path, target: str = "sm89") -> Build:
    return Builder(rtx).build(graph, Request(40, None, WIDTHS, (target,)))


def test_the_modern_form_keeps_its_fused_layers(bundle: Bundle) -> None:
    build = compile_graph(bundle.file("step.modern.onnx"))
    assert build.layers["KV_CACHE_UPDATE"] == 2 * LAYERS
    assert build.layers["ATTENTION_INPUT"] == build.layers["ATTENTION_OUTPUT"] == LAYERS
    assert build.layers["ROTARY_EMBEDDING"] == LAYERS  # of queries and keys at once
    assert build.plan.nbytes > bundle.manifest.files["weights.bin"].bytes
    assert build.log == ()


def test_the_portable_form_needs_none_of_them(bundle: Bundle) -> None:
    build = compile_graph(bundle.file("step.portable.onnx"))
    assert not {"KV_CACHE_UPDATE", "ATTENTION_INPUT", "ROTARY_EMBEDDING"} & set(build.layers)
    model = onnx.load(bundle.file("step.portable.onnx"), load_external_data=False)
    assert model.opset_import[0].version == 18
    later = {"Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization", "ScatterND"}
    assert not later & {node.op_type for node in model.graph.node}


@pytest.mark.parametrize(("kind", "target"), [("int8", "sm86"), ("fp8", "sm89"), ("int4", "sm86")])
def test_quantised_graphs_are_compiled(bundle: Bundle, tmp_path: Path, kind: str, target: str) -> None:
    graph = tmp_path / f"{kind}.onnx"
    assert quantise(bundle.file("step.modern.onnx"), graph, kind) == 4 * LAYERS + 1
    build = compile_graph(graph, target)
    assert build.layers["DEQUANTIZE"] >= 4 * LAYERS + 1
    assert build.layers["KV_CACHE_UPDATE"] == 2 * LAYERS


@pytest.mark.parametrize(("kind", "target"), [("fp8", "sm86"), ("int4", "sm75")])
def test_a_gpu_without_the_type_is_refused(bundle: Bundle, tmp_path: Path, kind: str, target: str) -> None:
    quantise(bundle.file("step.modern.onnx"), tmp_path / "graph.onnx", kind)
    with pytest.raises(EngineError, match=r"cannot build .*HW-specific datatypes"):
        compile_graph(tmp_path / "graph.onnx", target)


def attention_graph(path: Path, dtype: int, **attributes: Any) -> Path:
    shape = [1, 2, 8, 32]
    names = ("queries", "keys", "values")
    inputs = [helper.make_tensor_value_info(name, dtype, shape) for name in names]
    inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, [8, 8]))
    feeds = [*names, "mask"]
    if "lengths" in attributes:
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, [1]))
        feeds += ["", "", "lengths"]
        del attributes["lengths"]
    node = helper.make_node("Attention", feeds, ["attended"], **attributes)
    output = helper.make_tensor_value_info("attended", dtype, shape)
    graph = helper.make_graph([node], "attention", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), path)
    return path


class PlainBuilder(Builder):
    """Leaves attention as the parser made it."""

    def _prepare_attention(self, network: object) -> Counter[str]:
        del network
        return Counter()


def test_float32_attention_is_compiled_only_because_it_may_be_split(tmp_path: Path) -> None:
    graph = attention_graph(tmp_path / "attention.onnx", TensorProto.FLOAT)
    with pytest.raises(EngineError, match="not supported by a dedicated kernel"):
        PlainBuilder(rtx).build(graph, Request(40, None, WIDTHS, ("sm89",)))
    assert compile_graph(graph).layers["ATTENTION_INPUT"] == 1


def test_attention_options_that_tensorrt_lacks_are_refused(tmp_path: Path) -> None:
    graph = attention_graph(tmp_path / "softcap.onnx", TensorProto.FLOAT16, softcap=5.0)
    with pytest.raises(EngineError, match=r"cannot parse .*softcap"):
        compile_graph(graph)


def test_an_input_that_the_parser_drops_is_an_error(tmp_path: Path) -> None:
    """TensorRT-RTX 1.7 only warns that it ignores the number of valid keys."""
    graph = attention_graph(tmp_path / "lengths.onnx", TensorProto.FLOAT16, lengths=True)
    with pytest.raises(EngineError, match="drops part of the graph"):
        compile_graph(graph)


def test_a_graph_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match="cannot parse"):
        compile_graph(tmp_path / "broken.onnx")


class Interrupting(Progress):
    """Counts the steps that TensorRT reports; presses Ctrl-C at one of them."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at, self.steps = at, 0

    @contextmanager
    def count(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        del title, total

        def advance(steps: int) -> None:
            self.steps += steps
            if self.steps == self.at:
                signal.raise_signal(signal.SIGINT)

        yield advance


def cancel_a_build(path: str) -> None:
    """Press Ctrl-C in a build, then build it whole."""
    bundle = Bundle.open(path)
    request = Request(40, Form.PORTABLE, WIDTHS, ("sm89",))
    whole, cancelled = Interrupting(None), Interrupting(1)
    with pytest.raises(KeyboardInterrupt):
        compile_engine(bundle, request, rtx, progress=cancelled)
    assert not [path for path in bundle.path.rglob("*") if "engine" in path.as_posix()]
    compile_engine(bundle, request, rtx, progress=whole)
    assert cancelled.steps < whole.steps
    shutil.rmtree(bundle.path / "engines")


def test_a_cancelled_build_stops_and_leaves_nothing(bundle: Bundle) -> None:
    """In a process of its own: one that OpenVINO is loaded into as well does not survive it."""
    code = f"from tests.engines.test_tensorrt import cancel_a_build\ncancel_a_build({str(bundle.path)!r})"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_build_that_seems_too_large_is_forced(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diagd.engines.tensorrt.opening.available_bytes", lambda: 1_000_000)
    request = Request(40, Form.MODERN, WIDTHS, ("sm89",))
    with pytest.raises(EngineError, match="--force"):
        compile_engine(bundle, request, rtx)
    stored, _ = compile_engine(bundle, request, rtx, force=True)
    assert stored.plan.stat().st_size == stored.record.bytes
    shutil.rmtree(bundle.path / "engines")


class Recording(Builder):
    """Keeps what was attached to attention."""

    def _prepare_attention(self, network: Any) -> Counter[str]:
        counts = super()._prepare_attention(network)
        self.lengths = []
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == rtx.LayerType.ATTENTION_INPUT:
                layer.__class__ = rtx.IAttentionInputLayer  # the binding returns the base class
                self.lengths.append(layer.attention.key_value_lengths.name)
        self.inputs = [network.get_input(index).name for index in range(network.num_inputs)]
        return counts


def test_attention_reads_live_slots_only(bundle: Bundle) -> None:
    builder = Recording(rtx)
    builder.build(bundle.file("step.modern.onnx"), Request(40, None, WIDTHS, ("sm89",)))
    assert builder.lengths == [LIVE_INPUT] * LAYERS
    assert builder.inputs.count(LIVE_INPUT) == 1


def test_capabilities_are_those_of_the_module() -> None:
    offered = capabilities(rtx)
    assert offered.form is Form.MODERN
    assert offered.in_place_cache and offered.live_lengths and offered.reports_aliases
    assert {"sm86", "sm89", "sm120"} <= set(offered.cross_targets)
    assert import_tensorrt("tensorrt_rtx") is rtx


def test_an_older_tensorrt_takes_the_portable_form() -> None:
    jetpack6 = Capabilities("tensorrt", "10.3.0", False, False, False, (), True)
    assert jetpack6.form is Form.PORTABLE
    with pytest.raises(EngineError, match="builds only for the GPU of the machine it runs on"):
        check_targets(jetpack6, ("sm89",))
    with pytest.raises(EngineError, match="has no target sm90; it builds for sm75"):
        check_targets(capabilities(rtx), ("sm89", "sm90"))


def test_a_missing_tensorrt_names_the_package() -> None:
    with pytest.raises(DependencyError, match=r"pip install 'diagd\[tensorrt\]'"):
        import_tensorrt("tensorrt")


def test_a_build_that_does_not_fit_is_refused_with_the_figure(bundle: Bundle) -> None:
    graph = bundle.manifest.graph(Form.MODERN)
    needed = estimate(bundle, graph, WIDTHS)
    assert needed.cache == sum(2 * LAYERS * 2 * slots * 32 * 2 for slots in [graph.capacity or 0])
    check_memory(needed, available_bytes())
    with pytest.raises(EngineError, match=r"about 16\.5 GB .* 8\.0 GB are free.*--force"):
        check_memory(MemoryEstimate(weights=2_000_000_000, cache=0, plan_copies=2), 8_000_000_000)


def test_the_log_is_read_for_dropped_inputs_and_reasons() -> None:
    lines = [
        LogLine("WARNING", "Unused Input: lengths"),
        LogLine("ERROR", "no kernel "),
        LogLine("ERROR", "no kernel"),
    ]
    assert errors_of(lines) == "no kernel"
    with pytest.raises(EngineError, match="Unused Input: lengths"):
        check_log(lines)
