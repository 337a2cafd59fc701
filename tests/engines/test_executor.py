"""The executor over memory of the host: real graphs, real kernels, recorded operations."""

from __future__ import annotations

import ast
import ctypes
import shutil
import threading
import time
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import diagd.engines.devices.cuda as driver_module
from diagd.bundle import Bundle, Form
from diagd.engines import records
from diagd.engines.backend import StepOptions
from diagd.engines.devices.cuda import CudaDevice, open_driver
from diagd.engines.engine import VOID, SamplingState, Steps
from diagd.engines.executor import Executor
from diagd.engines.gpu import closed_on_failure, open_cuda
from diagd.errors import DiagdError, EngineError, UsageError
from diagd.export.options import GraphOptions
from diagd.export.transformer import Transformer
from diagd.runtime.decoders import JacobiDecoder, ScheduledDecoder
from diagd.runtime.load import load
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.slots import TokenPlaces
from diagd.schedule import NO_SINK, RowSeed, Schedule, StreamLayout
from tests.engines.fidelity import Run, decode, recompute
from tests.engines.host_device import HostDevice, executor_over, host_kernels
from tests.engines.opening import portable, run_step
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
    kernels = host_kernels()
    return Case(model, Bundle.open(export_small(model, path, options)), kernels)


def make_engine(case: Case, form: Form, tokens: int, device: HostDevice, *, graphs: bool = True) -> Executor:
    return executor_over(case.bundle, form, tokens, device, graphs=graphs)


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
    def make(bundle: Bundle, tokens: int) -> Executor:
        del bundle
        return make_engine(case, form, tokens, HostDevice(case.kernels), graphs=graphs)

    np.testing.assert_array_equal(decode(case.bundle, make, run), case.recomputed(run))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused_when_tokens_are_read(case: Case, temperature: float) -> None:
    device = HostDevice(case.kernels)
    engine = make_engine(case, Form.MODERN, 80, device)
    keys = engine.tensors.cache["value_0"]
    device.upload(keys.address, np.full(keys.shape, np.nan, np.float32))
    rows, decoded = np.array([3, 4], np.int32), np.array([1], np.int32)
    state = SamplingState(temperature)
    for _ in range(2):
        engine.send(Steps.single(rows, rows, decoded, rows[decoded] + 1, 2, 4, state))
        engine.step()
        with pytest.raises(EngineError, match="the largest logit of row 0 is nan; expected a finite number"):
            engine.read_tokens(rows)
        assert engine.read_tokens(rows).tolist() == [0, 0]


def test_the_same_seed_draws_what_the_cpu_engine_draws(case: Case) -> None:
    run = Run(Schedule.chained(LAYOUT, 1), sampling=SamplingSettings(0.9, 6, 0.9), seed=3)

    def device(bundle: Bundle, tokens: int) -> Executor:
        del bundle
        return make_engine(case, Form.MODERN, tokens, HostDevice(case.kernels))

    np.testing.assert_array_equal(decode(case.bundle, device, run), decode(case.bundle, portable, run))


def test_a_generation_queues_one_copy_a_frame_and_one_graph_a_step(case: Case) -> None:
    device, engines = HostDevice(case.kernels), []
    run = Run(Schedule.serial(LAYOUT, 1), frames=3, prompt=1)
    table = run.schedule.table(1, 3, 0, WIDTHS[-1])

    def make(bundle: Bundle, tokens: int) -> Executor:
        del bundle
        engines.append(make_engine(case, Form.MODERN, tokens, device))
        device.log.clear()
        return engines[0]

    decode(case.bundle, make, run)
    engine, counts = engines[0], Counter(entry[0] for entry in device.log)
    widths = [int(end - start) for start, end in zip(table.offsets, table.offsets[1:], strict=False)]
    assert replayed(engine, device) == engine.padded_widths(np.array(widths, np.int32)).tolist()
    assert counts["allocate"] == counts["clear"] == counts["program"] == 0
    # Records go up once a frame, as its actions do; its tokens come down once. At the start the buffers of
    # tokens and slots go up as a whole, with the prompt and its actions.
    assert counts["upload"] <= 2 * run.frames + 5
    assert counts["download"] == 2 * run.frames  # and whether the sampler refused
    assert counts["synchronise"] <= 2 * run.frames + 3
    buffer = engine.tensors.token_buffer
    for _, address, size in [entry for entry in device.log if entry[0] == "download"]:
        assert buffer.address <= address < buffer.address + 4 * engine.tensors.refusal_place + 8
        assert size in (4 * LAYOUT.cells, 8)


def replayed(engine: Executor, device: HostDevice) -> list[int]:
    """Widths of the steps in the graphs that were replayed, in order."""
    widths = {graph: key for key, graph in engine._graphs.items() if graph is not None}
    return [width for name, *rest in device.log if name == "replay" for width in widths[rest[0]]]


HOST_CALLS = 10
"""That a frame may take, or a pass of Jacobi decoding."""


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.next_token(LAYOUT),
        Schedule.serial(LAYOUT, 1),
        Schedule.chained(LAYOUT, 1),
        Schedule.serial(LAYOUT, 2),
        Schedule.chained(LAYOUT, 2),
    ],
    ids=lambda schedule: schedule.name,
)
def test_a_frame_of_a_schedule_takes_few_calls(case: Case, schedule: Schedule) -> None:
    device, frames = HostDevice(case.kernels), 9
    engine = make_engine(case, Form.MODERN, TokenPlaces(LAYOUT, 4).size, device)
    session = Session(case.bundle.manifest, engine, 4)
    session.start(np.zeros((1, 3, 5), np.int32), np.full((1, 2), 25, np.int32))
    device.log.clear()
    calls, steps = [], 0
    for frame in session.frames(ScheduledDecoder(schedule), np.full((frames, 2), 25, np.int32)):
        calls.append(Counter(entry[0] for entry in device.log))
        steps = len(replayed(engine, device))
        assert steps == schedule.d if len(calls) > 1 else steps >= schedule.steps_per_frame
        device.log.clear()
        del frame
    assert max(found["replay"] for found in calls[:2]) >= min(schedule.d, 5)  # nothing has come before
    turned = [found for found in calls[4:-1] if found["download"] > 2]  # keys, where the rotary table ends
    assert len(turned) <= 1
    assert all(found.total() <= HOST_CALLS for found in calls[4:-1] if found not in turned)
    assert {found["replay"] for found in calls[4:-1]} <= {1, 2}
    assert len(calls) == frames


def test_a_pass_of_jacobi_decoding_takes_few_calls_and_copies_its_ids(case: Case) -> None:
    device = HostDevice(case.kernels)
    engine = make_engine(case, Form.MODERN, TokenPlaces(LAYOUT, 4).size, device)
    session = Session(case.bundle.manifest, engine, 4)
    session.start(np.zeros((1, 3, 5), np.int32), np.full((1, 2), 25, np.int32))
    device.log.clear()
    passes = 0
    for step, result in session.steps(JacobiDecoder(WIDTHS[-1] - 2), np.full((5, 2), 25, np.int32)):
        log, rows = list(device.log), int((step.sinks != NO_SINK).sum())
        device.log.clear()
        assert len(log) <= HOST_CALLS
        assert [entry[0] for entry in log].count("replay") == 1
        if not rows:  # the prompt's
            continue
        result.tokens  # noqa: B018  # as the decoder asks for them
        assert [entry[2] for entry in device.log if entry[0] == "download"] == [4 * rows, 8]
        device.log.clear()
        passes += 1
    assert passes > 5


def test_all_widths_share_every_address(case: Case) -> None:
    device = HostDevice(case.kernels)
    engine = make_engine(case, Form.MODERN, 80, device, graphs=False)
    named = engine.tensors.named
    for name in engine.tensors.cache:
        assert named[f"past_{name}"].address == named[f"present_{name}"].address
    assert not [entry for entry in device.log if entry[0] == "copy"]
    assert named["sources"].at_width(4) == (4,)


def test_warming_up_leaves_no_trace(case: Case) -> None:
    device = HostDevice(case.kernels)
    engine = make_engine(case, Form.PORTABLE, 80, device)
    for tensor in engine.tensors.cache.values():
        buffer = np.empty(tensor.shape, tensor.dtype)
        device.download(buffer, tensor.address)
        assert not buffer.any()
    assert not engine.read_tokens(np.arange(80, dtype=np.int32)).any()


def test_logits_are_copied_when_asked_for(case: Case) -> None:
    rows, decoded = np.array([3, 4], np.int32), np.array([1], np.int32)
    device = HostDevice(case.kernels)
    engine = make_engine(case, Form.MODERN, 80, device)
    device.log.clear()
    engine.send(Steps.single(rows, rows, decoded, rows[decoded] + 1, 0, 2))
    engine.step()
    assert not [entry for entry in device.log if entry[0] in ("download", "synchronise")]
    logits = engine.logits()
    assert logits.shape == (1, case.bundle.manifest.output_vocabulary)
    assert engine.read_tokens(np.array([5]))[0] == logits[0, :24].argmax()


def test_steps_that_were_sent_and_never_run_are_forgotten(case: Case) -> None:
    """A run that breaks off in a block leaves the device's cursor in the middle of it."""
    device = HostDevice(case.kernels)
    engine, clean = make_engine(case, Form.MODERN, 80, device), make_engine(case, Form.MODERN, 80, device)
    rows, decoded = np.array([3, 4], np.int32), np.array([1], np.int32)
    session = Session(case.bundle.manifest, make_engine(case, Form.MODERN, 600, device), 4)
    session.start(np.zeros((1, 3, 5), np.int32))
    left = session.steps(ScheduledDecoder(Schedule.serial(LAYOUT, 1)), np.full((2, 2), 25, np.int32))
    next(left)
    halfway = session.engine
    for one in (engine, clean, halfway):
        one.write_slots(np.full(one.capacity, VOID, np.int32))
        one.write_tokens(np.arange(5, dtype=np.int32), np.arange(5, dtype=np.int32))
    logits = [run_step(one, rows, rows, rows + 1, decoded, 0, 2).copy() for one in (clean, halfway)]
    np.testing.assert_array_equal(logits[0], logits[1])


def test_blocks_longer_than_a_buffer_of_records_are_sent_in_parts(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Schedule.next_token(LAYOUT), frames=3, prompt=1)
    monkeypatch.setattr(records, "HALF_WORDS", 120)
    device = HostDevice(case.kernels)

    def make(bundle: Bundle, tokens: int) -> Executor:
        return executor_over(bundle, Form.MODERN, tokens, device)

    np.testing.assert_array_equal(decode(case.bundle, make, run), case.recomputed(run))


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
    options = StepOptions(0, 80, graphs=False)
    engines = [
        open_cuda(case.bundle, device, options),
        make_engine(case, Form.MODERN, 80, HostDevice(case.kernels)),
    ]
    rows, decoded = np.array([3, 4], np.int32), np.array([1], np.int32)
    results = [run_step(engine, rows, rows, rows + 1, decoded, 0, 2) for engine in engines]
    np.testing.assert_allclose(results[0], results[1], atol=1e-3)
    device.close()


def test_every_name_of_the_driver_api_exists() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    tree = ast.parse(Path(driver_module.__file__).read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    functions = {node.attr for node in attributes if node.attr.startswith(("cu", "CU"))}
    assert {"cuInit", "cuGraphLaunch", "cuMemcpyHtoDAsync", "cuStreamBeginCapture"} <= functions
    kinds = (
        "CUdevice_attribute",
        "CUfunction_attribute",
        "CUstream_flags",
        "CUevent_flags",
        "CUstreamCaptureMode",
    )
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


def test_steps_of_a_device_that_runs_behind_come_from_one_thread(case: Case) -> None:
    device = HostDevice(case.kernels)
    device.ahead = True
    engine = make_engine(case, Form.MODERN, 64, device)
    one = np.zeros(1, np.int32)
    said: list[str] = []

    def elsewhere() -> None:
        try:
            run_step(engine, one, one, one, one, 0, 1)
        except EngineError as error:
            said.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(said) == 1
    assert "open the session in the thread that decodes" in said[0]
    assert np.isfinite(run_step(engine, one, one, one, one, 0, 1)).all()
