"""Engines on a device against the CPU runtime: equal greedy tokens in FP32, near logits in FP16.

Everything runs over memory of the host, and again on a GPU (ONNX Runtime's CUDA provider) where there is one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from diagd.bundle import Bundle, Form
from diagd.engines.cuda.driver import CudaDevice
from diagd.engines.cuda.engine import DeviceEngine
from diagd.engines.cuda.onnxruntime import OnnxRuntimeProgram
from diagd.engines.cuda.program import Tensor
from diagd.engines.engine import Engine
from diagd.engines.fixed import graphs_of
from diagd.engines.gpu import open_cuda
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import PrefixEngine
from diagd.errors import DiagdError
from diagd.export.exporter import GraphOptions
from diagd.export.transformer import Transformer
from diagd.profiling.engines import session_over
from diagd.profiling.measure import random_workload
from diagd.profiling.verify import PairedEngine, ReferenceEngine, Verdict, verify
from diagd.schedule import RowSeed, Schedule, StreamLayout
from tests.engines.fidelity import Run, decode
from tests.engines.host_device import HostDevice, host_kernels
from tests.engines.test_cuda_engine import CapturableProgram
from tests.models import export_small
from tests.oracles.models import small_model

LAYOUT = StreamLayout(4, 6, after=2)
WIDTHS = (1, 4, 16)
CPU = CpuOptions(threads=1, prepack=False)
OpenEngine = Callable[[Bundle, int, bool, bool], DeviceEngine]
"""From a bundle, the size of its token buffer, whether graphs are replayed and whether logits are kept."""

RUNS = {
    "next token": Run(Schedule.next_token(LAYOUT), prompt=1),
    "k=1 serial": Run(Schedule.serial(LAYOUT, 1)),
    "k=1 chained": Run(Schedule.chained(LAYOUT, 1)),
    "k=2 serial": Run(Schedule(LAYOUT, 2, Schedule.serial(LAYOUT, 2).d, RowSeed.DUPLICATE)),
    "k=2 chained": Run(Schedule.chained(LAYOUT, 2)),
    "k=3, d=13, sliding": Run(Schedule(LAYOUT, 3, 13, RowSeed.ABOVE), frames=5, prompt=1, window=3),
}


@dataclass
class Case:
    """One model in three bundles: ``prefix`` FP32 for the CPU, ``modern`` in FP32 and FP16 for a device."""

    prefix: Bundle
    modern: dict[str, Bundle]
    expected: dict[str, np.ndarray] = field(default_factory=dict)

    def tokens(self, name: str) -> np.ndarray:
        """Frames by the CPU runtime."""
        if name not in self.expected:
            self.expected[name] = decode(self.prefix, open_on_cpu, RUNS[name])
        return self.expected[name]


def open_on_cpu(bundle: Bundle, tokens: int) -> Engine:
    return PrefixEngine(bundle, 256, tokens, CPU)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("fidelity")
    model = small_model(LAYOUT, layers=1, context_frames=4)

    def exported(form: Form, precision: str) -> Bundle:
        options = GraphOptions((form,), precision, widths=WIDTHS)
        return Bundle.open(export_small(model, folder / f"{form.value}-{precision}.diagd", options))

    modern = {precision: exported(Form.MODERN, precision) for precision in ("fp32", "fp16")}
    return Case(exported(Form.PREFIX, "fp32"), modern)


@pytest.fixture(params=["host memory", "GPU"])
def open_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpenEngine:
    if request.param == "host memory":
        if shutil.which("cmake") is None:
            pytest.skip("cmake is not installed")
        return over_host_memory(tmp_path_factory.getbasetemp() / "native")
    try:
        CudaDevice().close()
    except DiagdError as error:
        pytest.skip(f"skipped: {error}")
    return on_gpu


def over_host_memory(kernels: Path) -> OpenEngine:
    def opened(bundle: Bundle, tokens: int, graphs: bool, keep_logits: bool) -> DeviceEngine:
        device = HostDevice(host_kernels(str(kernels)))
        steps = graphs_of(bundle, Form.MODERN)
        session = onnxruntime.InferenceSession(str(bundle.file(steps[0].file)))

        def program(tensors: Mapping[str, Tensor]) -> CapturableProgram:
            return CapturableProgram(device, OnnxRuntimeProgram(session, tensors, WIDTHS, device.kind))

        arguments = (bundle.manifest, Form.MODERN, steps[0].capacity or 0, WIDTHS, tokens, device, program)
        return DeviceEngine(*arguments, graphs=graphs, keep_logits=keep_logits)

    return opened


def on_gpu(bundle: Bundle, tokens: int, graphs: bool, keep_logits: bool) -> DeviceEngine:
    return open_cuda(bundle, tokens, CudaDevice(), graphs=graphs, keep_logits=keep_logits, strict=True)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("name", RUNS)
def test_tokens_in_fp32_are_those_of_the_cpu(
    case: Case, open_engine: OpenEngine, name: str, graphs: bool
) -> None:
    engines: list[DeviceEngine] = []

    def make(bundle: Bundle, tokens: int) -> Engine:
        engines.append(open_engine(bundle, tokens, graphs, False))
        return engines[0]

    frames = decode(case.modern["fp32"], make, RUNS[name])
    engines[0].close()
    np.testing.assert_array_equal(frames, case.tokens(name))


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize(
    ("precision", "agreement", "error"), [("fp32", 1.0, 1e-4), ("fp16", 0.97, 1e-2)], ids=["fp32", "fp16"]
)
def test_logits_are_near_those_of_the_cpu(
    case: Case, open_engine: OpenEngine, precision: str, agreement: float, error: float, graphs: bool
) -> None:
    """Step by step on the same inputs, next-token and diagonal."""
    for verdict in verdicts(case, open_engine, precision, graphs):
        assert verdict.cells == 3 * LAYOUT.cells
        assert verdict.agreement >= agreement, verdict
        assert 0 < verdict.error < error, verdict


def verdicts(case: Case, open_engine: OpenEngine, precision: str, graphs: bool) -> list[Verdict]:
    bundle = case.modern[precision]
    with closing(open_engine(bundle, 160, graphs, True)) as engine:
        pair = PairedEngine(engine, ReferenceEngine(case.prefix, engine.capacity))
        session = session_over(bundle, pair, 4, CPU)
        workload = random_workload(session, 1, 3)
        names = ("next token", "k=1 chained", "k=2 serial")
        return [verify(session, "device", precision, RUNS[name].schedule, workload, 3) for name in names]


def test_a_wrong_engine_is_found(case: Case, tmp_path: Path) -> None:
    """The same comparison over other weights fails: it can."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    other: Transformer = small_model(LAYOUT, layers=1, context_frames=4, seed=3)
    options = GraphOptions((Form.MODERN,), "fp32", widths=WIDTHS)
    wrong = Bundle.open(export_small(other, tmp_path / "wrong.diagd", options))
    mixed = Case(case.prefix, {"fp32": wrong})
    found = verdicts(mixed, over_host_memory(tmp_path / "native"), "fp32", True)
    assert not any(verdict.passed for verdict in found)
