"""Engines on a device against the CPU runtime: equal greedy tokens in FP32, near logits in FP16.

Everything runs over memory of the host, and again on a GPU (ONNX Runtime's CUDA provider) where there is one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from diagd.bundle import Bundle, Form
from diagd.engines.backend import StepOptions
from diagd.engines.devices.cuda import CudaDevice
from diagd.engines.engine import Engine
from diagd.engines.executor import Executor
from diagd.engines.gpu import open_cuda
from diagd.errors import DiagdError
from diagd.export.options import GraphOptions
from diagd.export.transformer import Transformer
from diagd.profiling.measure import random_workload
from diagd.profiling.verify import Verdict, open_reference, verify
from diagd.runtime.load import session_over
from diagd.runtime.slots import TokenPlaces
from diagd.schedule import RowSeed, Schedule, StreamLayout
from tests.engines.fidelity import Run, decode
from tests.engines.host_device import HostDevice, executor_over, host_kernels
from tests.engines.opening import CPU, prefix
from tests.models import export_small
from tests.oracles.models import small_model

LAYOUT = StreamLayout(4, 6, after=2)
WIDTHS = (1, 4, 16)
OpenEngine = Callable[[Bundle, int, bool], Executor]
"""From a bundle, the size of its token buffer, and whether graphs are replayed."""

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
            self.expected[name] = decode(self.prefix, prefix, RUNS[name])
        return self.expected[name]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("fidelity")
    model = small_model(LAYOUT, layers=1, context_frames=4)

    def exported(form: Form, precision: Literal["fp32", "fp16"]) -> Bundle:
        options = GraphOptions((form,), precision, widths=WIDTHS)
        return Bundle.open(export_small(model, folder / f"{form.value}-{precision}.diagd", options))

    modern = {"fp32": exported(Form.MODERN, "fp32"), "fp16": exported(Form.MODERN, "fp16")}
    return Case(exported(Form.PREFIX, "fp32"), modern)


@pytest.fixture(params=["host memory", "GPU"])
def open_engine(request: pytest.FixtureRequest) -> OpenEngine:
    if request.param == "host memory":
        if shutil.which("cmake") is None:
            pytest.skip("cmake is not installed")
        return over_host_memory
    try:
        CudaDevice().close()
    except DiagdError as error:
        pytest.skip(f"skipped: {error}")
    return on_gpu


def over_host_memory(bundle: Bundle, tokens: int, graphs: bool) -> Executor:
    return executor_over(bundle, Form.MODERN, tokens, HostDevice(host_kernels()), graphs=graphs)


def on_gpu(bundle: Bundle, tokens: int, graphs: bool) -> Executor:
    return open_cuda(bundle, CudaDevice(), StepOptions(0, tokens, graphs=graphs, strict=True))


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("name", RUNS)
def test_tokens_in_fp32_are_those_of_the_cpu(
    case: Case, open_engine: OpenEngine, name: str, graphs: bool
) -> None:
    engines: list[Executor] = []

    def make(bundle: Bundle, tokens: int) -> Engine:
        engines.append(open_engine(bundle, tokens, graphs))
        return engines[0]

    frames = decode(case.modern["fp32"], make, RUNS[name])
    engines[0].close()
    np.testing.assert_array_equal(frames, case.tokens(name))


def test_threads_open_and_run_engines_at_once(case: Case, open_engine: OpenEngine) -> None:
    """Where one captures its graphs, others go on."""
    engines = [open_engine(case.modern["fp32"], 1, False)]  # kernels are built

    def run(_: int) -> np.ndarray:
        def make(bundle: Bundle, tokens: int) -> Engine:
            engines.append(engine := open_engine(bundle, tokens, True))
            return engine

        return decode(case.modern["fp32"], make, RUNS["k=1 serial"])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(8)))
    for engine in engines:
        engine.close()
    for frames in found:
        np.testing.assert_array_equal(frames, case.tokens("k=1 serial"))


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
    tokens = TokenPlaces(LAYOUT, bundle.manifest.context.frames).size
    with session_over(bundle, open_engine(bundle, tokens, graphs), 4, CPU) as session:
        reference = open_reference(case.prefix, session)
        workload = random_workload(session, 1, 3)
        schedules = [RUNS[name].schedule for name in ("next token", "k=1 chained", "k=2 serial")]
        return [
            verify(session, reference, "device", precision, schedule, workload, 3) for schedule in schedules
        ]


def test_a_wrong_engine_is_found(case: Case, tmp_path: Path) -> None:
    """The same comparison over other weights fails: it can."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    other: Transformer = small_model(LAYOUT, layers=1, context_frames=4, seed=3)
    options = GraphOptions((Form.MODERN,), "fp32", widths=WIDTHS)
    wrong = Bundle.open(export_small(other, tmp_path / "wrong.diagd", options))
    mixed = Case(case.prefix, {"fp32": wrong})
    found = verdicts(mixed, over_host_memory, "fp32", True)
    assert not any(verdict.passed for verdict in found)
