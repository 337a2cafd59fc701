"""Bundles to calibrate, and their logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from diagd.bundle import Bundle
from diagd.calibration.gate import Budget
from diagd.calibration.quantise import CalibrationOptions, calibrate
from diagd.calibration.report import PrecisionReport
from diagd.engines.engine import VOID, SamplingState, StepInputs
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import PrefixEngine
from diagd.schedule import StreamLayout
from tests.oracles.models import CODES

LAYOUT = StreamLayout(4, 6, before=1)
ANYTHING = Budget(agreement=0, nll=1e9, psnr=0)
PAST = 24


def frames(count: int = 12) -> np.ndarray:
    """Random known frames."""
    random = np.random.default_rng(5)
    return random.integers(0, CODES, (count, LAYOUT.rows, LAYOUT.columns), dtype=np.int32)


def quantise(bundle: Path, precision: str, **options: object) -> PrecisionReport:
    chosen = {"budget": ANYTHING, "steps": 64, "threads": 1, "floor": -100.0, **options}
    return calibrate(Bundle.open(bundle), CalibrationOptions(precision, **chosen), frames())


def load_graph(path: Path) -> onnx.ModelProto:
    """A graph without its weights."""
    return onnx.load(str(path), load_external_data=False)


def engine_of(bundle: Path, precision: str) -> PrefixEngine:
    options = CpuOptions(1, prepack=False, fuse=precision != "fp8")
    return PrefixEngine(Bundle.open(bundle).at_precision(precision), 96, 64, options)


def logits_of(engine: PrefixEngine, ids: np.ndarray, positions: np.ndarray, seen: slice) -> np.ndarray:
    """Logits of rows that see the past but not each other, ``seen`` of them wanted; float32 [R, V]."""
    past = np.arange(PAST, dtype=np.int32)
    engine.slot_position[:] = VOID
    engine.slot_position[:PAST] = past
    engine.token_buffer[:PAST] = past % CODES
    run(engine, past, past, past[:0], 0, PAST)
    width = len(ids)
    engine.token_buffer[:width] = ids
    rows = np.arange(width, dtype=np.int32)
    return run(engine, rows, positions, rows[seen], PAST, PAST + 16).copy()


def run(
    engine: PrefixEngine,
    sources: np.ndarray,
    positions: np.ndarray,
    decoded: np.ndarray,
    start: int,
    live: int,
) -> np.ndarray:
    draws = np.zeros(len(decoded), np.float32)
    inputs = StepInputs(sources, positions.astype(np.int32), sources, decoded, draws, start, live)
    return engine.step(inputs, SamplingState(0, 0, 1))
