"""An engine against a plain reference, on one run, cell by cell.

The reference is the FP32 ``prefix`` graph on ONNX Runtime's CPU provider with everything off that could go
wrong: no graph optimisation, no packed weights, no cache in place, no live prefix, one thread. It is fed the
tokens that the engine chose, so every cell is compared on the same inputs, and the two decode alike exactly
if they agree at every cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, Form
from diagd.engines.buffers import rotate_pairs, text_buffers
from diagd.engines.engine import Engine, Float, Int, SamplingState, StepInputs
from diagd.errors import BundleError, ScheduleError, require
from diagd.profiling.measure import Workload
from diagd.profiling.orders import order_name
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.schedule import NO_SINK, Schedule, Table


@dataclass(frozen=True)
class Gate:
    """Least share of cells with the reference's token, and greatest error over the greatest logit."""

    agreement: float
    error: float


GATES: Final = {"fp32": Gate(1.0, 1e-3), "fp16": Gate(0.98, 2e-2), "bf16": Gate(0.95, 5e-2)}
QUANTISED: Final = Gate(0.90, 0.2)


@dataclass(frozen=True)
class Difference:
    """The first cell with another token than the reference's; ``margin`` is how far that one was ahead."""

    frame: int
    row: int
    column: int
    token: int
    expected: int
    margin: float


@dataclass(frozen=True)
class Verdict:
    """One decoding order.

    ``agreement`` is the share of cells with the reference's token, near ties (within the allowed error)
    included; ``error`` is the greatest difference of a logit over the greatest logit.
    """

    engine: str
    order: str
    cells: int
    identical: bool
    agreement: float
    error: float
    first_difference: Difference | None
    passed: bool


class ReferenceEngine:
    """Runs the prefix graph plainly: arrays in, arrays out, the whole capacity every time.

    Raises:
        BundleError: the bundle has no FP32 graph in the prefix form.
    """

    def __init__(self, bundle: Bundle, capacity: int) -> None:
        manifest = bundle.manifest
        graph = next((g for g in manifest.graphs if g.form is Form.PREFIX and g.precision == "fp32"), None)
        if graph is None:
            raise BundleError(
                f"{bundle.path} has no FP32 graph in the prefix form to compare with; export the same "
                "weights with --form prefix and give that bundle as --reference"
            )
        runtime = require("onnxruntime", extra="export", purpose="run the reference")
        settings = runtime.SessionOptions()
        settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.intra_op_num_threads, settings.log_severity_level = 1, 3
        path = str(bundle.file(graph.file))
        self._session = runtime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        cache = manifest.cache
        shape = (capacity, cache.kv_heads, cache.head_size)
        names = [f"{kind}_{layer}" for layer in range(cache.layers) for kind in ("key", "value")]
        self._buffers = {name: np.zeros(shape, cache.dtype) for name in names}
        self._text: dict[str, NDArray[Any]] = dict(text_buffers(manifest))

    def logits(self, inputs: StepInputs, token_buffer: Int, slot_position: Int) -> Float:
        """Logits [R, V] of the decoded rows; takes the step's K/V rows."""
        feeds = {
            "token_buffer": token_buffer,
            "sources": inputs.sources,
            "positions": inputs.positions,
            "slot_position": slot_position,
            "write_index": np.array([inputs.write_index], np.int64),
            "logit_rows": inputs.decoded,
            **{f"past_{name}": buffer for name, buffer in self._buffers.items()},
            **self._text,
        }
        names = ["logits", *(f"present_{name}" for name in self._buffers)]
        logits, *present = self._session.run(names, feeds)
        self._buffers = dict(zip(self._buffers, present, strict=True))
        result: Float = logits
        return result

    def set_text(self, rows: Mapping[str, NDArray[Any]]) -> None:
        """Take a text; see ``Engine.set_text``."""
        self._text = {name: np.asarray(rows[name]) for name in self._text}

    def rotate_keys(self, angles: NDArray[np.float64], live: int) -> None:
        """Turn cached keys; see ``Engine.rotate_keys``."""
        for name, buffer in self._buffers.items():
            if name.startswith("key"):
                rotate_pairs(buffer[:live], angles)


class PairedEngine:
    """An engine that runs, and a reference that watches: both see every step."""

    def __init__(self, engine: Engine, reference: ReferenceEngine) -> None:
        self._engine, self._reference = engine, reference
        self.capacity, self.max_width = engine.capacity, engine.max_width
        self.samples_in_graph = engine.samples_in_graph
        self.token_buffer, self.slot_position = engine.token_buffer, engine.slot_position
        self.expected: list[Float] = []
        self.errors: list[float] = []

    def padded_width(self, width: int) -> int:
        """See ``Engine.padded_width``."""
        return self._engine.padded_width(width)

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """Run one pass on both, and keep what the reference expected."""
        expected = self._reference.logits(inputs, self.token_buffer, self.slot_position)
        logits = self._engine.step(inputs, sampling)
        self.expected.extend(expected)
        self.errors.extend(np.abs(logits - expected).max(axis=1).tolist())
        return logits

    def set_text(self, rows: Mapping[str, NDArray[Any]]) -> None:
        """See ``Engine.set_text``."""
        self._engine.set_text(rows)
        self._reference.set_text(rows)

    def rotate_keys(self, angles: NDArray[np.float64], live: int) -> None:
        """See ``Engine.rotate_keys``."""
        self._engine.rotate_keys(angles, live)
        self._reference.rotate_keys(angles, live)


def verify(
    session: Session, name: str, precision: str, schedule: Schedule, workload: Workload, frames: int
) -> Verdict:
    """Decode greedily and compare every cell.

    Args:
        session: over a ``PairedEngine``.
        name: of the engine, for the verdict.
        precision: of its graph; chooses the gate.
        schedule: decoding order.
        workload: prompt and actions.
        frames: to decode.
    """
    pair = session.engine
    assert isinstance(pair, PairedEngine)
    pair.expected, pair.errors = [], []
    session.start(workload.prompt, workload.prompt_actions, workload.text)
    actions = None if workload.actions is None else workload.actions[:frames]
    run = session.generate(frames, actions, schedule=schedule, sampling=SamplingSettings(0.0))
    decoded = np.stack([frame.tokens.reshape(-1) for frame in run])
    table = schedule.table(len(workload.prompt), frames, 0, session.engine.max_width)
    check_table(table, schedule)
    sinks = table.sinks[table.sinks != NO_SINK]
    layout = schedule.layout
    frame, cell = np.divmod(sinks - layout.first_cell(len(workload.prompt)), layout.frame_length)
    ranges = session.manifest.sampling.range_table(layout)[layout.before + cell]
    gate = GATES.get(precision, QUANTISED)
    return _verdict(name, schedule, gate, decoded[frame, cell], np.stack([frame, cell], 1), pair, ranges)


def _verdict(
    name: str, schedule: Schedule, gate: Gate, tokens: Int, cells: Int, pair: PairedEngine, ranges: Int
) -> Verdict:
    scale = max(float(np.abs(row).max()) for row in pair.expected)
    error = max(pair.errors) / scale
    expected = np.array(
        [low + int(row[low:high].argmax()) for row, (low, high) in zip(pair.expected, ranges, strict=True)]
    )
    rows = np.arange(len(tokens))
    reference = np.stack(pair.expected)
    margins = reference[rows, expected] - reference[rows, tokens]
    agree = (tokens == expected) | (margins <= gate.error * scale)
    differing = np.flatnonzero(tokens != expected)
    first = None
    if len(differing):
        at = int(differing[0])
        row, column = divmod(int(cells[at, 1]), schedule.layout.columns)
        place = (int(cells[at, 0]), row, column)
        first = Difference(*place, int(tokens[at]), int(expected[at]), float(margins[at]))
    agreement = float(agree.mean())
    passed = agreement >= gate.agreement and error <= gate.error and bool(np.isfinite(error))
    return Verdict(
        name, order_name(schedule), len(tokens), not len(differing), agreement, error, first, passed
    )


def check_table(table: Table, schedule: Schedule) -> None:
    """Refuse a schedule that decodes a cell twice or never, or reads one before it is decoded.

    Raises:
        ScheduleError: it does.
    """
    frames, layout = len(table.frame_starts), schedule.layout
    decoded_at: dict[int, int] = {}
    for index in range(table.steps):
        step = table.step(index)
        for source in step.sources:
            generated = source >= layout.first_cell(table.first_frame) and _is_cell(int(source), schedule)
            if generated and decoded_at.get(int(source), index) >= index:
                raise ScheduleError(f"step {index} of the schedule reads position {source} too early")
        for sink in step.sinks[step.sinks != NO_SINK]:
            if int(sink) in decoded_at:
                raise ScheduleError(f"step {index} of the schedule decodes position {sink} again")
            decoded_at[int(sink)] = index
    if len(decoded_at) != frames * layout.cells:
        raise ScheduleError(f"the schedule decodes {len(decoded_at)} of {frames * layout.cells} cells")


def _is_cell(position: int, schedule: Schedule) -> bool:
    layout = schedule.layout
    place = (position - layout.prefix) % layout.frame_length - layout.before
    return 0 <= place < layout.cells
