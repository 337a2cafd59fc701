"""The executor over memory of the host: real graphs, real kernels, recorded operations."""

from __future__ import annotations

import ast
import ctypes
import shutil
import time
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import diagd.engines.cuda.driver as driver_module
from diagd.bundle import Bundle, Form
from diagd.engines.cuda.driver import CudaDevice, open_driver
from diagd.engines.cuda.engine import DeviceEngine
from diagd.engines.cuda.onnxruntime import OnnxRuntimeProgram
from diagd.engines.cuda.program import Tensor
from diagd.engines.engine import SamplingState, StepInputs
from diagd.engines.fixed import graphs_of
from diagd.engines.gpu import closed_on_failure
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.portable import PortableEngine
from diagd.errors import DiagdError, EngineError, UsageError
from diagd.export.exporter import GraphOptions
from diagd.export.transformer import Transformer
from diagd.runtime.load import load
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import RowSeed, Schedule, StreamLayout
from tests.engines.fidelity import Run, decode, recompute
from tests.engines.host_device import HostDevice, host_kernels
from tests.models import export_small
from tests.oracles.models import small_model

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
LAYOUT = StreamLayout(3, 5, after=2)
WIDTHS = (1, 4, 16)


@dataclass
class Case:
    model: Transformer
    bundle: Bundle
    kernels: ctypes.CDLL
    expected: dict[Run, np.ndarray] = field(default_factory=dict)

    def recomputed(self, run: Run) -> np.ndarray:
        if run not in self.expected:
            self.expected[run] = recompute(self.model, run)
        return self.expected[run]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = small_model(LAYOUT, layers=1, context_frames=4)
    path = tmp_path_factory.mktemp("bundle") / "small.diagd"
    options = GraphOptions((Form.MODERN, Form.PORTABLE), widths=WIDTHS)
    kernels = host_kernels(str(tmp_path_factory.mktemp("native")))
    return Case(model, Bundle.open(export_small(model, path, options)), kernels)


class CapturableProgram:
    """ONNX Runtime's program behind the device's queue, so that graphs contain it."""

    capturable = True

    def __init__(self, device: HostDevice, program: OnnxRuntimeProgram) -> None:
        self._device, self._program = device, program

    def enqueue(self, width: int) -> None:
        self._device.run(partial(self._program.enqueue, width), "program", width)


def make_engine(
    case: Case, form: Form, tokens: int, device: HostDevice, *, graphs: bool = True, keep_logits: bool = False
) -> DeviceEngine:
    graph = graphs_of(case.bundle, form)[0]
    session = onnxruntime.InferenceSession(str(case.bundle.file(graph.file)))

    def program(tensors: Mapping[str, Tensor]) -> CapturableProgram:
        return CapturableProgram(device, OnnxRuntimeProgram(session, tensors, WIDTHS, "cpu"))

    return DeviceEngine(
        case.bundle.manifest,
        form,
        graph.capacity or 0,
        WIDTHS,
        tokens,
        device,
        program,
        graphs=graphs,
        keep_logits=keep_logits,
    )


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("form", [Form.MODERN, Form.PORTABLE], ids=str)
@pytest.mark.parametrize(
    "run",
    [
        Run(Schedule.next_token(LAYOUT), frames=1, prompt=1),
        Run(Schedule.chained(LAYOUT, 1), prompt=1),
        Run(
            Schedule(LAYOUT, 2, Schedule.serial(LAYOUT, 2).d, RowSeed.DUPLICATE), frames=7, prompt=1, window=2
        ),
    ],
    ids=["next token", "chained", "sliding"],
)
def test_tokens_equal_recomputation(case: Case, form: Form, graphs: bool, run: Run) -> None:
    def make(bundle: Bundle, tokens: int) -> DeviceEngine:
        del bundle
        return make_engine(case, form, tokens, HostDevice(case.kernels), graphs=graphs)

    np.testing.assert_array_equal(decode(case.bundle, make, run), case.recomputed(run))


def test_the_same_seed_draws_what_the_cpu_engine_draws(case: Case) -> None:
    run = Run(Schedule.chained(LAYOUT, 1), sampling=SamplingSettings(0.9, 6, 0.9), seed=3)

    def host(bundle: Bundle, tokens: int) -> PortableEngine:
        return PortableEngine(bundle, tokens, CpuOptions(1, prepack=False))

    def device(bundle: Bundle, tokens: int) -> DeviceEngine:
        del bundle
        return make_engine(case, Form.MODERN, tokens, HostDevice(case.kernels))

    np.testing.assert_array_equal(decode(case.bundle, device, run), decode(case.bundle, host, run))


def test_a_generation_queues_one_copy_and_one_graph_a_step(case: Case) -> None:
    device, engines = HostDevice(case.kernels), []
    run = Run(Schedule.serial(LAYOUT, 1), frames=3, prompt=1)
    table = run.schedule.table(1, 3, 0, WIDTHS[-1])

    def make(bundle: Bundle, tokens: int) -> DeviceEngine:
        del bundle
        engines.append(make_engine(case, Form.MODERN, tokens, device))
        device.log.clear()
        return engines[0]

    decode(case.bundle, make, run)
    engine, counts = engines[0], Counter(entry[0] for entry in device.log)
    widths = [int(end - start) for start, end in zip(table.offsets, table.offsets[1:], strict=False)]
    keys = [WIDTHS.index(engine.padded_width(width)) for width in widths]
    assert [entry[1] for entry in device.log if entry[0] == "replay"] == keys
    assert counts["allocate"] == counts["clear"] == counts["program"] == 0
    # Beside its record a step sends nothing; tokens go up once a frame, with its actions, and come down once.
    assert counts["upload"] <= len(keys) + run.frames + 1
    assert counts["download"] <= 2 * run.frames
    assert counts["synchronise"] <= 2 * run.frames
    buffer = engine.tensors.token_buffer
    assert {entry[1] for entry in device.log if entry[0] == "download"} == {buffer.address}


def test_all_widths_share_every_address(case: Case) -> None:
    device = HostDevice(case.kernels)
    engine = make_engine(case, Form.MODERN, 80, device, graphs=False)
    named = engine.tensors.named
    for name in engine.tensors.cache:
        assert named[f"past_{name}"].address == named[f"present_{name}"].address
    assert named["next_token_buffer"].address != named["token_buffer"].address
    copies = {entry[1:] for entry in device.log if entry[0] == "copy"}
    assert copies == {(named["token_buffer"].address, named["next_token_buffer"].address, 4 * 80)}
    assert named["sources"].at_width(4) == (4,)


def test_warming_up_leaves_no_trace(case: Case) -> None:
    device = HostDevice(case.kernels)
    engine = make_engine(case, Form.PORTABLE, 80, device)
    for tensor in engine.tensors.cache.values():
        buffer = np.empty(tensor.shape, tensor.dtype)
        device.download(buffer, tensor.address)
        assert not buffer.any()
    assert not engine.token_buffer.any()


def test_logits_are_given_back_when_asked_for(case: Case) -> None:
    rows = np.array([3, 4], np.int32)
    inputs = StepInputs(rows, rows, rows + 1, np.array([1], np.int32), np.array([0.5], np.float32), 0, 2)
    state = SamplingState(0.0, 0, 1.0)
    engine = make_engine(case, Form.MODERN, 80, HostDevice(case.kernels), keep_logits=True)
    engine.slot_position[:2] = rows
    logits = engine.step(inputs, state)
    assert logits.shape == (1, case.bundle.manifest.output_vocabulary)
    assert engine.token_buffer[5] == logits[0, :24].argmax()
    silent = make_engine(case, Form.MODERN, 80, HostDevice(case.kernels))
    assert len(silent.step(inputs, state)) == 0


def test_keys_are_turned_back_in_place(case: Case) -> None:
    device = HostDevice(case.kernels)
    engine = make_engine(case, Form.MODERN, 80, device)
    tensor = engine.tensors.cache["key_0"]
    keys = np.random.default_rng(0).random(tensor.shape, np.float32)
    device.upload(tensor.address, keys)
    angles = np.linspace(0.1, 1.0, tensor.shape[3] // 2)
    engine.rotate_keys(angles, 5)
    turned = np.empty_like(keys)
    device.download(turned, tensor.address)
    pairs = keys[..., :4] + 1j * keys[..., 4:]
    expected = pairs[:, :, :5] * np.exp(1j * angles)
    np.testing.assert_allclose(turned[:, :, :5, :4] + 1j * turned[:, :, :5, 4:], expected, atol=1e-6)
    np.testing.assert_array_equal(turned[:, :, 5:], keys[:, :, 5:])


def cuda_device() -> CudaDevice:
    try:
        return CudaDevice()
    except EngineError as error:
        pytest.skip(f"skipped: {error}" if "no CUDA device" in str(error) else str(error))


def test_the_kernels_run_on_a_gpu(case: Case) -> None:
    pytest.importorskip("cuda.bindings.driver")
    device = cuda_device()
    mirror = HostDevice(case.kernels)
    engines = [make_engine_on_gpu(case, device), make_engine(case, Form.MODERN, 80, mirror, keep_logits=True)]
    rows = np.array([3, 4], np.int32)
    inputs = StepInputs(rows, rows, rows + 1, np.array([1], np.int32), np.array([0.5], np.float32), 0, 2)
    results = []
    for engine in engines:
        engine.slot_position[:2] = rows
        results.append(engine.step(inputs, SamplingState(0.0, 0, 1.0)))
    np.testing.assert_allclose(results[0], results[1], atol=1e-3)
    device.close()


def make_engine_on_gpu(case: Case, device: CudaDevice) -> DeviceEngine:
    from diagd.engines.cuda.onnxruntime import open_cuda_session

    graph = graphs_of(case.bundle, Form.MODERN)[0]
    session = open_cuda_session(case.bundle.file(graph.file), device, graphs=False)
    return DeviceEngine(
        case.bundle.manifest,
        Form.MODERN,
        graph.capacity or 0,
        WIDTHS,
        80,
        device,
        lambda tensors: OnnxRuntimeProgram(session, tensors, WIDTHS, device.kind),
        keep_logits=True,
    )


def test_every_name_of_the_driver_api_exists() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    tree = ast.parse(Path(driver_module.__file__).read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    functions = {node.attr for node in attributes if node.attr.startswith(("cu", "CU"))}
    assert {"cuInit", "cuGraphLaunch", "cuMemcpyHtoDAsync", "cuStreamBeginCapture"} <= functions
    kinds = ("CUdevice_attribute", "CUstream_flags", "CUevent_flags", "CUstreamCaptureMode")
    places = [driver, *(getattr(driver, name) for name in kinds)]
    assert [name for name in functions if not any(hasattr(place, name) for place in places)] == []


def test_closing_frees_the_program_and_the_device(case: Case) -> None:
    device = HostDevice(case.kernels)
    engine = make_engine(case, Form.MODERN, 80, device)
    program = weakref.ref(engine._program)
    assert device.memory_used() > 0
    engine.close()
    assert program() is None
    assert device.memory_used() == 0
    assert [entry[0] for entry in device.log[-2:]] == ["synchronise", "close"]


def test_an_engine_that_cannot_be_opened_gives_its_device_back(case: Case) -> None:
    device = HostDevice(case.kernels)
    with pytest.raises(EngineError, match="no memory"), closed_on_failure(device) as given:
        given.allocate(64)
        raise EngineError("no memory")
    assert device.memory_used() == 0
    with closed_on_failure(HostDevice(case.kernels)) as kept:
        kept.allocate(64)
    assert kept.memory_used() > 0


def test_time_stamps_lie_on_the_stream_of_a_gpu(case: Case) -> None:
    pytest.importorskip("cuda.bindings.driver")
    device = cuda_device()
    size = 64 << 20
    source, target = device.allocate(size), device.allocate(size)
    began = time.perf_counter()
    for number in range(3):
        device.mark(number)
        device.copy(target, source, size * number // 2)
    device.synchronise()
    taken = time.perf_counter() - began
    assert 0 < device.seconds(1, 2) <= device.seconds(0, 2) < taken
    assert device.memory_used() >= 2 * size
    device.close()


def test_a_backend_that_is_not_there_is_said(case: Case) -> None:
    with pytest.raises(UsageError, match="unknown backend 'cude'; did you mean 'cuda'"):
        load(case.bundle.path, backend="cude")
    try:
        open_driver()
    except DiagdError:
        with pytest.raises(DiagdError, match=r"no CUDA device|pip install 'diagd\[cuda\]'"):
            load(case.bundle.path, backend="cuda")
