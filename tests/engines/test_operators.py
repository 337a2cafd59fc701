"""What stands between a step's products by its own kernels, through ONNX Runtime, beside NumPy in float64.

The same code runs on the host, attention thread by thread and its blocks in any order.
"""

from __future__ import annotations

import ctypes
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

import diagd.engines.devices.kernels as kernels
import diagd.engines.gpu as gpu
from diagd.bundle import Bundle, Form
from diagd.bundle.transformer import NormKind, TextShape, TransformerConfig, linear_rotary
from diagd.engines.devices.cuda import CudaDevice
from diagd.engines.devices.kernels import (
    ATTENTION,
    LAYER,
    OperatorArguments,
    compile_attention,
    compile_layer,
)
from diagd.engines.gpu import HEAD_SIZES, step_operators
from diagd.engines.onnxruntime_session import open_cuda_session
from diagd.errors import EngineError
from diagd.export.options import GraphOptions
from diagd.export.transformer import Transformer
from diagd.schedule import StreamLayout
from tests.engines.host_device import ROOT
from tests.models import export_small

HOST = (40, 227 << 10)
"""Processors that a launch on the host is divided for, and the bytes of a block."""

Shape = tuple[int, int, int, int, int]
"""Streams, KV heads, rows, query heads a KV head, slots."""

SHAPES: dict[str, Shape] = {
    "one row": (1, 4, 1, 1, 700),
    "rows of a frontier": (1, 4, 40, 2, 1037),
    "more rows than a block has": (1, 2, 100, 3, 512),
    "streams": (3, 2, 10, 2, 160),
    "fewer slots than a tile": (1, 1, 5, 1, 20),
    "one split": (2, 20, 33, 1, 64),
}
SMALLEST: Shape = (2, 2, 3, 2, 11)
Array = NDArray[Any]
Floats = NDArray[np.float64]
Run = Callable[..., list[Array]]


MEMORY = """
#include <cstdlib>
#include <new>

extern "C" bool memory_is_full = false;

void* operator new(std::size_t size) {
  void* const found = memory_is_full ? nullptr : std::malloc(size);
  return found ? found : throw std::bad_alloc();
}

void operator delete(void* place) noexcept { std::free(place); }
void operator delete(void* place, std::size_t) noexcept { std::free(place); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Built with memory of its own, of which there may be no more."""
    file = tmp_path_factory.mktemp("operators") / "operators.so"
    file.with_name("memory.cpp").write_text(MEMORY)
    names = ("onnxruntime_ops.cpp", "layer_host.cpp", "prefix_attention.cpp", "products.cpp")
    sources = [str(file.with_name("memory.cpp")), *(str(ROOT / "native" / name) for name in names)]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-Bsymbolic"]
    compile_line = ["c++", *flags, *sources, "-o", str(file), "-ldl"]
    subprocess.run(compile_line, check=True)
    return ctypes.CDLL(str(file))


@dataclass(frozen=True)
class Place:
    """Where operators run: on a GPU, or, without a device, on the host."""

    library: ctypes.CDLL
    device: CudaDevice | None
    kept: list[Array]

    @property
    def name(self) -> str:
        return "cuda" if self.device else "cpu"

    def open(self, path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> Any:
        if self.device:
            found = offered(self.device, self.library, size, monkeypatch)
            self.device.synchronise()  # its memory is zero before a session with a stream of its own begins
            return open_cuda_session(path, strict=True, operators=found)
        given = OperatorArguments()
        given.functions[:] = [number | size << 8 for number in range(1, len(given.functions) + 1)]
        given.launch = ctypes.cast(self.library.diagd_launch_on_host, ctypes.c_void_p).value
        given.provider, given.size = b"CPUExecutionProvider", size
        given.processors, given.block_bytes = HOST
        between = np.zeros(memory_of(self.library, HOST[0], size), np.uint8)
        self.kept.append(between)
        given.between = between.ctypes.data
        self.library.diagd_operators_with(ctypes.byref(given))
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        settings.register_custom_ops_library(self.library._name)
        return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


@pytest.fixture(params=["host", "GPU"])
def place(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Iterator[Place]:
    if request.param == "host":
        yield Place(library, None, [])
        return
    pytest.importorskip("cuda.bindings.driver")
    try:
        device = CudaDevice()
    except EngineError as error:
        pytest.skip(f"skipped: {error}" if "no CUDA device" in str(error) else str(error))
    yield Place(library, device, [])
    device.close()


@pytest.fixture
def run(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one operator over arrays; outputs that an input's name begins are that input, in place."""

    def run(name: str, size: int, feeds: Mapping[str, Array], outputs: Mapping[str, int], **more: Any) -> Any:
        path = one_node(tmp_path / "operator.onnx", name, feeds, outputs, more)
        return bound(place.open(path, size, monkeypatch), place.name, feeds)

    return run


def one_node(
    path: Path,
    name: str,
    feeds: Mapping[str, Array],
    outputs: Mapping[str, int],
    attributes: Mapping[str, Any],
) -> Path:
    """A model of one operator; ``outputs`` have so many axes, and the type of the inputs' floats."""
    inputs = [
        helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for key, value in feeds.items()
    ]
    halves = any(value.dtype == np.float16 for value in feeds.values())
    kind = TensorProto.FLOAT16 if halves else TensorProto.FLOAT
    results = [
        helper.make_tensor_value_info(key, kind, [f"{key}_{axis}" for axis in range(axes)])
        for key, axes in outputs.items()
    ]
    node = helper.make_node(name, [*feeds], [*outputs], domain="diagd", **attributes)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("diagd", 1)]
    model = helper.make_model(helper.make_graph([node], name, inputs, results), opset_imports=opsets)
    model.ir_version = 11
    onnx.save(model, path)
    return path


def bound(session: Any, kind: str, feeds: Mapping[str, Array]) -> list[Array]:
    """Outputs of a session; present_X is past_X, in place."""
    binding, values = session.io_binding(), {}
    for value in session.get_inputs():
        values[value.name] = onnxruntime.OrtValue.ortvalue_from_numpy(feeds[value.name].copy(), kind, 0)
        binding.bind_ortvalue_input(value.name, values[value.name])
    for value in session.get_outputs():
        past = value.name.replace("present", "past")
        if past in values:
            binding.bind_ortvalue_output(value.name, values[past])
        else:
            binding.bind_output(value.name, kind)
    session.run_with_iobinding(binding)
    return [value.numpy().copy() for value in binding.get_outputs()]


def offered(device: Any, library: ctypes.CDLL, size: int, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """What a session over float16 heads of a size is offered."""
    monkeypatch.setattr(gpu, "host_build", lambda: library)
    config = SimpleNamespace(head_size=size, hidden=64, feed_forward=64)
    manifest: Any = SimpleNamespace(transformer=config, cache_dtype=lambda graph: np.dtype(np.float16))
    return step_operators(manifest, manifest, device)


def memory_of(library: ctypes.CDLL, processors: int, size: int) -> int:
    """Bytes between the blocks of an attention."""
    library.diagd_attend_bytes.restype = ctypes.c_int64
    return int(library.diagd_attend_bytes(processors, size))


class Plan(NamedTuple):
    """How an attention is divided."""

    warps: int
    teams: int
    row_blocks: int
    splits: int
    split_tiles: int


def plan_of(library: ctypes.CDLL, heads: int, rows: int, slots: int, size: int, *gpu: int) -> Plan:
    found = (ctypes.c_int32 * 5)()
    library.diagd_attend_plan(heads, rows, slots, size, *gpu, found)
    return Plan(*found)


def halves(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape).astype(np.float16)


def wide(*arrays: Array) -> list[Floats]:
    return [array.astype(np.float64) for array in arrays]


def assert_rounded(found: Array, wanted: Floats) -> None:
    """Equal but for a float16's rounding, of the result and of what went into it."""
    np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("hidden", [8, 192, 1000, 4096])
@pytest.mark.parametrize("name", ["RMSNormAdd", "RMSNormAddAdd", "LayerNormAddBias", "LayerNormAddBiasAdd"])
def test_norms_take_what_is_added(run: Run, name: str, hidden: int) -> None:
    random = np.random.default_rng(hidden)
    x, first, last = halves(random, 3, 5, hidden)
    bias, weight, shift = halves(random, 3, hidden)
    added = [first, *([bias] if "Bias" in name else []), *([last] if name.count("Add") == 2 else [])]
    weights = [weight, shift] if name.startswith("Layer") else [weight]
    feeds = {f"input_{number}": array for number, array in enumerate([x, *added, *weights])}
    total, out = run(name, 64, feeds, {"sum": 2, "out": 2}, epsilon=1e-5)
    wanted = sum(wide(*added), start=wide(x)[0])
    assert_rounded(total, wanted)
    centred = wanted - wanted.mean(-1, keepdims=True) if len(weights) == 2 else wanted
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    scaled = normal * wide(weight)[0] + (wide(shift)[0] if len(weights) == 2 else 0)
    np.testing.assert_allclose(out, scaled, rtol=4e-3, atol=6e-3)


@pytest.mark.parametrize("parts", ["", "Slot", "Rotary", "PositionAdded", "SlotPositionRotaryAdded"])
def test_rows_of_tables(run: Run, parts: str) -> None:
    random = np.random.default_rng(0)
    positions, ids = np.array([0, 2, 3, 9, 11], np.int32), np.array([4, 0, 6, 6, 1], np.int32)
    places, prefix, length = positions.astype(np.int64), 2, 5
    tables: dict[str, tuple[Array, Array]] = {"embedding": (halves(random, 7, 1200), ids)}
    if "Slot" in parts:
        tables["slot"] = halves(random, length, 1200), (places - prefix) % length
    if "Position" in parts:
        tables["position"] = halves(random, 12, 1200), places
    rows: dict[str, Array] = {}
    if "Rotary" in parts:
        rows |= {"cosines": halves(random, 12, 48), "sines": halves(random, 12, 48)}
    if "Added" in parts:
        rows["added"] = halves(random, 12, 1200)
    feeds = {
        "ids": ids,
        "positions": positions,
        **{name: table for name, (table, _) in tables.items()},
        **rows,
    }
    outputs = dict.fromkeys(["x", *(f"{name}_rows" for name in rows)], 2)
    x, *found = run("Embed" + parts, 64, feeds, outputs, prefix=prefix, frame_length=length)
    added = (table.astype(np.float64)[at] for table, at in tables.values())
    assert_rounded(x, sum(added, start=np.zeros(1)))
    for made, table in zip(found, rows.values(), strict=True):
        np.testing.assert_array_equal(made, table[places])


def example_attention(shape: Shape, parts: str, size: int) -> dict[str, Array]:
    """Inputs of an attention; in the cache, what is written is not a number before."""
    streams, groups, width, shared, slots = shape
    random = np.random.default_rng(size + slots)
    positions = random.integers(10, 100, (streams, width)).astype(np.int32)
    slot_position = random.integers(10, 110, (streams, slots)).astype(np.int32)
    slot_position[:, slots // 3 : slots // 2] = 2**31 - 1  # whole tiles that none sees
    index = random.integers(slots - width + 1, size=streams)
    fused = halves(random, streams * width, (shared + 2) * groups * size)
    past_key, past_value = halves(random, 2, streams, groups, slots, size)
    for stream, first in enumerate(index):
        slot_position[stream, first : first + width] = positions[stream]
        past_key[stream, :, first : first + width] = past_value[stream, :, first : first + width] = np.nan
    further: dict[str, Array] = {}
    if "Bias" in parts:
        further["bias"] = halves(random, fused.shape[1])
    if "Norm" in parts:
        further["query_norm"], further["key_norm"] = halves(random, 2, size)
    if "Rotary" in parts:
        angles = random.random((len(fused), size // 2))
        further |= {"cosines": np.cos(angles).astype(np.float16), "sines": np.sin(angles).astype(np.float16)}
    if streams == 1:
        positions, slot_position = positions[0], slot_position[0]
    seen = {"positions": positions, "slot_position": slot_position, "fused": fused}
    past = {"past_key": past_key, "past_value": past_value, "mask": np.zeros(1, np.float16)}
    return {**seen, **further, **past, "index": index}


def cached_attention(feeds: Mapping[str, Array], shared: int) -> list[Floats]:
    """Attended rows, K and V."""
    streams, groups, _, size = feeds["past_key"].shape
    heads = groups * shared
    fused = feeds["fused"].astype(np.float64) + feeds.get("bias", np.zeros(1))
    rows = fused.reshape(streams, -1, heads + 2 * groups, size)
    turned = []
    for name, start, end in (("query_norm", 0, heads), ("key_norm", heads, heads + groups)):
        part = rows[:, :, start:end]
        if name in feeds:
            part = part / np.sqrt((part**2).mean(-1, keepdims=True) + 1e-5) * feeds[name].astype(np.float64)
        if "sines" in feeds:
            low, high = np.split(part, 2, axis=-1)
            tables = (feeds[key].astype(np.float64) for key in ("cosines", "sines"))
            cosine, sine = (table.reshape(streams, -1, 1, size // 2) for table in tables)
            part = np.concatenate([low * cosine - high * sine, high * cosine + low * sine], axis=-1)
        turned.append(part.swapaxes(1, 2))
    queries, new_keys = turned
    keys, values = wide(feeds["past_key"], feeds["past_value"])
    for past, new in ((keys, new_keys), (values, rows[:, :, heads + groups :].swapaxes(1, 2))):
        for stream, first in enumerate(feeds["index"]):
            past[stream, :, first : first + new.shape[2]] = new[stream]
    positions = feeds["positions"].reshape(streams, 1, -1, 1)
    hidden = feeds["slot_position"].reshape(streams, 1, 1, -1) > positions
    scores = queries @ np.repeat(keys, shared, axis=1).swapaxes(-1, -2) * size**-0.5
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    attended = weights @ np.repeat(values, shared, axis=1) / weights.sum(-1, keepdims=True)
    return [attended.swapaxes(1, 2).reshape(len(fused), -1), keys, values]


ATTENDED = {"attended": 2, "present_key": 4, "present_value": 4}


def assert_attends(found: list[Array], wanted: list[Floats]) -> None:
    assert np.linalg.norm(found[0] - wanted[0]) < 2e-3 * np.linalg.norm(wanted[0])
    assert np.abs(found[0] - wanted[0]).max() < 2e-2
    assert_rounded(found[1], wanted[1])
    assert_rounded(found[2], wanted[2])


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("parts", ["", "Bias", "Norm", "Rotary", "BiasNormRotary"])
def test_heads_are_arranged_and_written_into_the_cache(run: Run, parts: str, size: int) -> None:
    feeds = example_attention(SMALLEST, parts, size)
    found = run("CachedAttention" + parts, size, feeds, ATTENDED, epsilon=1e-5)
    assert_attends(found, cached_attention(feeds, 2))


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_is_that_of_numpy(run: Run, place: Place, shape: Shape, size: int) -> None:
    if not place.device and size > 32 and shape != SHAPES["streams"]:
        pytest.skip("the host takes long")
    feeds = example_attention(shape, "Rotary", size)
    found = run("CachedAttentionRotary", size, feeds, ATTENDED, epsilon=1e-5)
    assert_attends(found, cached_attention(feeds, shape[3]))


@pytest.mark.parametrize("shape", [(1, 2, 40, 3, 300), (2, 1, 3, 5, 290)])
def test_any_block_may_come_last(
    library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: Shape
) -> None:
    """Whichever puts the others' results together, and writes into the cache ahead of them or behind them."""
    streams, groups, width, shared, slots = shape
    plan = plan_of(library, streams * groups, width * shared, slots, 64, *HOST)
    assert plan.splits > 2 and plan.teams > 1 and (plan.row_blocks > 1 or streams > 1)
    feeds = example_attention(shape, "BiasNormRotary", 64)
    path = one_node(tmp_path / "a.onnx", "CachedAttentionBiasNormRotary", feeds, ATTENDED, {"epsilon": 1e-5})
    place = Place(library, None, [])
    session = place.open(path, 64, monkeypatch)
    counters, others = np.split(place.kept[0], [16 * HOST[0]])
    found = []
    for order in (7919, 1, 0):
        others[:] = 255  # not a number, where a block reads what is not there yet
        library.diagd_order_on_host(order)
        found.append(bound(session, "cpu", feeds))
        assert not counters.any()
    library.diagd_order_on_host(0)
    assert_attends(found[0], cached_attention(feeds, shared))
    for other in found[1:]:
        assert all(np.array_equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_activations(run: Run) -> None:
    random = np.random.default_rng(0)
    fused, bias = halves(random, 7, 80) * 4, halves(random, 80)
    (found,) = run("SwiGLU", 64, {"x": fused}, {"y": 2})
    gate, up = np.split(fused.astype(np.float64), 2, axis=-1)
    assert_rounded(found, gate / (1 + np.exp(-gate)) * up)
    for name, feeds in (("GELU", {"x": fused}), ("BiasGELU", {"x": fused, "bias": bias})):
        (found,) = run(name, 64, feeds, {"y": 2})
        x = sum(wide(*feeds.values()))
        assert_rounded(found, 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def test_rows_that_see_nothing_are_zero_and_another_size_is_refused(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = example_attention((1, 1, 20, 1, 20), "", 64)
    feeds["fused"][:] = 1
    feeds["positions"][:] = 9
    feeds["positions"][1] = 200  # rows from 16 on belong to a warp that sees nothing at all
    path = one_node(tmp_path / "attention.onnx", "CachedAttention", feeds, ATTENDED, {"epsilon": 1e-5})
    found, *_ = bound(place.open(path, 64, monkeypatch), place.name, feeds)
    np.testing.assert_array_equal(found[:, 0], [0, 1] + [0] * 18)
    with pytest.raises(Exception, match="another head size"):  # ONNX Runtime's own type
        bound(place.open(path, 128, monkeypatch), place.name, feeds)


def in_slots(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What the prefix form has, in float32, of the inputs of an attention of streams."""
    past = {name: feeds[name].transpose(2, 0, 1, 3) for name in ("past_key", "past_value")}
    written = feeds["index"][:, None] + np.arange(feeds["positions"].shape[1])
    given = {**feeds, **past, "slot_position": feeds["slot_position"].T, "index": written}
    types = {np.dtype(np.float16): np.float32}
    return {
        name: np.ascontiguousarray(array, types.get(array.dtype))
        for name, array in given.items()
        if name != "mask"
    }


@pytest.mark.parametrize("parts", ["", "Bias", "Norm", "Rotary", "BiasNormRotary"])
def test_attention_of_the_prefix_form_is_that_of_numpy(
    library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: str
) -> None:
    feeds = example_attention(SMALLEST, parts, 32)
    given = in_slots(feeds)
    path = one_node(tmp_path / "a.onnx", f"BoundAttention{parts}", given, ATTENDED, {"epsilon": 1e-5})
    session = Place(library, None, []).open(path, 32, monkeypatch)
    attended, *cache = cached_attention(feeds, 2)
    wanted = [attended, *(past.transpose(2, 0, 1, 3) for past in cache)]
    for found in (bound(session, "cpu", given), session.run(None, given)):  # in place, and into other memory
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_threads_without_memory_end_the_run_alone(
    library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = in_slots(example_attention((2, 2, 40, 3, 4000), "", 64))
    path = one_node(tmp_path / "a.onnx", "BoundAttention", feeds, ATTENDED, {"epsilon": 1e-5})
    session = Place(library, None, []).open(path, 64, monkeypatch)
    is_full = ctypes.c_bool.in_dll(library, "memory_is_full")
    is_full.value = True
    try:
        with pytest.raises(Exception, match="diagd: no memory"):  # ONNX Runtime's own type
            bound(session, "cpu", feeds)
    finally:
        is_full.value = False
    bound(session, "cpu", feeds)


NORMED = {"sum": 2, "out": 2}
TABLES: list[tuple[int, ...]] = [(7, 8), (5, 8), (12, 8), (12, 16), (12, 16), (12, 8)]
FITTING: dict[str, tuple[list[tuple[int, ...]], dict[str, int]]] = {
    "RMSNormAddAdd": ([(3, 8), (3, 8), (3, 8), (8,)], NORMED),
    "LayerNormAddBias": ([(3, 8), (3, 8), (8,), (8,), (8,)], NORMED),
    "SwiGLU": ([(3, 32)], {"y": 2}),
    "BiasGELU": ([(3, 8), (8,)], {"y": 2}),
    "TextAttention": ([(3, 64), (32,), (1, 2, 5, 32), (1, 2, 5, 32)], {"y": 2}),
    "EmbedSlotPositionRotaryAdded": (TABLES, dict.fromkeys("xyzw", 2)),
    "BoundSwiGLU": ([(3, 32)], {"y": 2}),
    "BoundRMSNormAdd": ([(3, 8), (3, 8), (8,)], NORMED),
    "CachedAttentionBiasNormRotary": ([], ATTENDED),
    "BoundAttentionBiasNormRotary": ([], ATTENDED),
}
"""Shapes of inputs, behind ids and positions where there are such, and axes of outputs."""


def fitting(name: str, shape: Shape = SMALLEST) -> dict[str, Array]:
    """Inputs of an operator; ``shape`` is an attention's."""
    if shapes := FITTING[name][0]:
        ids = dict.fromkeys(("ids", "positions"), np.zeros(5, np.int32)) if name[0] == "E" else {}
        dtype = np.float32 if name.startswith("Bound") else np.float16
        return {**ids, **{f"input_{n}": np.ones(shape, dtype) for n, shape in enumerate(shapes)}}
    feeds = example_attention(shape, name, 32)
    return in_slots(feeds) if name.startswith("Bound") else feeds


@pytest.mark.parametrize("name", FITTING)
def test_tensors_that_do_not_fit_each_other_are_refused(
    library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def run(feeds: Mapping[str, Array]) -> list[Array]:
        attributes = {"epsilon": 1e-5, "prefix": 2, "frame_length": 5}
        path = one_node(tmp_path / "a.onnx", name, feeds, FITTING[name][1], attributes)
        return bound(Place(library, None, kept).open(path, 32, monkeypatch), "cpu", feeds)

    kept: list[Array] = []
    run(feeds := fitting(name))
    wrong = [{**feeds, key: array[..., :-1]} for key, array in feeds.items() if key != "mask"]
    if "past_key" in feeds:  # no streams, heads of K and V, or heads of queries
        wrong += [fitting(name, shape) for shape in ((0, 2, 3, 2, 11), (2, 0, 3, 2, 11), (2, 2, 3, 0, 11))]
    for others in wrong:
        with pytest.raises(Exception, match=r"diagd: .*(width|shapes|head size)"):  # ONNX Runtime's own type
            run(others)


def test_a_library_that_was_given_nothing_runs_on_one_thread(library: ctypes.CDLL, tmp_path: Path) -> None:
    feeds = {"x": np.linspace(-4, 4, 96, dtype=np.float32).reshape(3, 32)}
    settings = onnxruntime.SessionOptions()
    settings.register_custom_ops_library(library._name)
    path = one_node(tmp_path / "a.onnx", "BoundSwiGLU", feeds, {"y": 2}, {})
    gate, up = np.split(feeds["x"], 2, axis=1)
    (found,) = onnxruntime.InferenceSession(str(path), settings).run(None, feeds)
    np.testing.assert_allclose(found, gate / (1 + np.exp(-gate)) * up, rtol=1e-5)


def test_a_session_is_given_what_its_own_thread_offered(
    library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one, opened at the same time, has heads of another size, and its own memory between blocks."""
    make, place = onnxruntime.SessionOptions, Place(library, None, [])

    def overtaken() -> Any:
        other = OperatorArguments()
        thread = threading.Thread(target=library.diagd_operators_with, args=(ctypes.byref(other),))
        thread.start()
        thread.join()
        return make()

    monkeypatch.setattr(onnxruntime, "SessionOptions", overtaken)
    feeds = example_attention(SMALLEST, "", 64)
    path = one_node(tmp_path / "a.onnx", "CachedAttention", feeds, ATTENDED, {"epsilon": 1e-5})
    assert_attends(bound(place.open(path, 64, monkeypatch), "cpu", feeds), cached_attention(feeds, 2))


SMALL = TransformerConfig(
    layout=StreamLayout(2, 3, after=1),
    context_frames=4,
    vocabulary=30,
    output_vocabulary=30,
    hidden=64,
    feed_forward=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=32,
    rotary=linear_rotary(32, 1e4),
)
MODELS = {
    "mineworld": SMALL,
    "wham": replace(
        SMALL, kv_heads=4, norm=NormKind.LAYER, bias=True, gated=False, rotary=None, position_embedding=True
    ),
    "cosmos": replace(SMALL, qk_norm=True, layer_embedding=True),
    "text": replace(SMALL, qk_norm=True, layer_embedding=True, text=TextShape(37, 24)),
}
PARTS = {"mineworld": "Rotary", "wham": "Bias", "cosmos": "NormRotary", "text": "NormRotary"}


@pytest.mark.parametrize(("model", "streams"), [("mineworld", 2), ("wham", 1), ("cosmos", 1), ("text", 1)])
def test_a_step_is_that_of_its_operators_in_onnx(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, streams: int
) -> None:
    """The same graph, its functions whole and in the operators that they are made of."""
    transformer = Transformer(MODELS[model]).initialise(torch.Generator().manual_seed(0)).eval()
    options = GraphOptions((Form.MODERN,), "fp16", widths=(4,), streams=streams)
    bundle = Bundle.open(export_small(transformer, tmp_path / "small.diagd", options))
    graph = bundle.file(bundle.manifest.graphs[0].file)
    plain = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {value.name: example(value, random) for value in plain.get_inputs()}
    session = place.open(graph, 32, monkeypatch)
    names = Counter(
        node.op_type for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()
    )
    assert names[f"CachedAttention{PARTS[model]}"] == MODELS[model].layers and names["CachedMask"] == 1
    assert names["TextAttention"] == (MODELS[model].layers if MODELS[model].text else 0)
    assert not {"Add", "Softmax", "Transpose", "TensorScatter"} & {*names}
    whole = bound(session, place.name, feeds)
    for found, wanted in zip(whole, bound(plain, "cpu", feeds), strict=True):
        assert np.linalg.norm(found - wanted) < 5e-3 * np.linalg.norm(wanted)


def example(value: Any, random: np.random.Generator) -> Array:
    shape = [axis if isinstance(axis, int) else {"W": 4}.get(axis, 40) for axis in value.shape]
    if value.type == "tensor(float16)":
        return halves(random, *shape)
    dtype = np.int64 if value.type == "tensor(int64)" else np.int32
    return random.integers(3, 20, shape).astype(dtype)


@pytest.mark.parametrize(("architecture", "size"), list(zip((80, 90, 80, 90), HEAD_SIZES, strict=True)))
def test_nvrtc_compiles_the_kernels(architecture: int, size: int) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    codes = {compile_attention(architecture, size): ATTENTION, compile_layer(architecture): LAYER}
    for code, names in codes.items():
        assert code[:4] == b"\x7fELF" and all(name.encode() in code for name in names)


def test_heads_of_other_sizes_are_left_to_the_provider(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, architecture in ((48, 90), (64, 75)):
        device: Any = SimpleNamespace(architecture=architecture)
        assert offered(device, library, size, monkeypatch) is None


def test_without_a_compiler_steps_have_the_providers_operators(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the other kernels came compiled: their sources are not in the package."""
    monkeypatch.setattr(kernels, "__file__", str(ROOT.parent / "a" / "b" / "c" / "kernels.py"))
    device: Any = SimpleNamespace(architecture=90)
    assert offered(device, library, 64, monkeypatch) is None


def test_blocks_fit_a_processor_and_the_memory_between_them(library: ctypes.CDLL) -> None:
    for processors, block_bytes, size in ((132, 226 << 10, 128), (108, 162 << 10, 96), (20, 98 << 10, 64)):
        given = memory_of(library, processors, size)
        for heads in (1, 2, 5, 8, 33, 200):
            for rows in (1, 15, 16, 17, 64, 112, 160, 193, 288, 1000):
                for slots in (1, 32, 33, 500, 2560, 12_800, 131_072):
                    plan = plan_of(library, heads, rows, slots, size, processors, block_bytes)
                    tiles = -(-slots // 32)
                    assert plan.splits == -(-tiles // plan.split_tiles)
                    assert (plan.row_blocks - 1) * plan.warps * 16 < rows <= plan.row_blocks * plan.warps * 16
                    assert plan.teams * plan.warps <= 12
                    assert library.diagd_attend_shared(size, block_bytes) <= block_bytes
                    counters = heads * plan.row_blocks
                    if plan.splits > 1:
                        assert plan.splits * counters <= processors * (12 // plan.warps)
                        assert counters <= 4 * processors
                        assert 16 * processors + heads * plan.splits * rows * (2 * size + 8) <= given
