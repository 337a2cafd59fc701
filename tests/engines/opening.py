"""Engines on the processor, and single steps of them."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np

from diagd.bundle import Bundle, Form
from diagd.engines.backend import StepOptions, find
from diagd.engines.engine import Engine, Float, SamplingState, Steps
from diagd.engines.executor import Executor
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import PrefixEngine
from diagd.engines.processor import open_fixed

CPU = CpuOptions(threads=1, prepack=False)
GREEDY = SamplingState()


def prefix(bundle: Bundle, tokens: int) -> Engine:
    return find("cpu").open_steps(bundle, StepOptions(512, tokens, CPU, Form.PREFIX))


def modern(bundle: Bundle, tokens: int) -> Executor:
    return open_fixed(bundle, Form.MODERN, StepOptions(0, tokens, CPU))


def portable(bundle: Bundle, tokens: int) -> Executor:
    return open_fixed(bundle, Form.PORTABLE, StepOptions(0, tokens, CPU))


def openvino(bundle: Bundle, tokens: int) -> Executor:
    """In float32."""
    return cast(Executor, find("openvino_fp32").open_steps(bundle, StepOptions(0, tokens, CPU)))


def prefix_engine(bundle: Bundle, slots: int, tokens: int, cpu: CpuOptions = CPU) -> PrefixEngine:
    return PrefixEngine(bundle, StepOptions(slots, tokens, cpu))


def run_step(
    engine: Engine,
    sources: np.ndarray,
    positions: np.ndarray,
    sinks: np.ndarray,
    decoded: np.ndarray,
    write_index: int,
    live: int,
    *,
    sampling: SamplingState = GREEDY,
    visible: bool = True,
) -> Float:
    """Run one pass, whose rows later ones see if ``visible``; returns its logits.

    The predictions of the rows ``decoded`` go to their ``sinks``; those of the others go nowhere.
    """
    steps = Steps.single(sources, positions, decoded, sinks[decoded], write_index, live, sampling)
    if not visible:
        steps = replace(steps, update_offsets=np.zeros(2, np.int32))
    engine.send(steps)
    engine.step()
    engine.draw()
    return engine.logits()
