"""An engine against a plain reference, on one run, cell by cell.

The reference is the FP32 ``prefix`` graph on ONNX Runtime's CPU provider with everything off that could go
wrong: no graph optimisation, no packed weights, no cache in place, no live prefix, one thread. It is fed the
tokens that the engine chose, so every cell is compared on the same inputs, and the two decode alike exactly
if they agree at every cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """What an engine must reach.

    ``agreement`` is the least share of cells with the reference's token, ``error`` the greatest relative
    error of the logits, ``tie`` how far behind, as a share of the greatest logit, another token still agrees.
    """

    agreement: float
    error: float
    tie: float


GATES: Final = {
    "fp32": Gate(1.0, 1e-3, 1e-4),
    "fp16": Gate(0.98, 2e-2, 1e-3),
    "bf16": Gate(0.95, 5e-2, 1e-2),
}
QUANTISED: Final = Gate(0.90, 0.2, 0.0)


def gate_of(precision: str) -> Gate:
    """The gate of a step graph's precision."""
    return GATES.get(precision, QUANTISED)


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

    ``agreement`` is the share of cells with the reference's token, near ties included; ``error`` is the
    Euclidean norm of all logits' differences over that of the reference's, ``worst`` the greatest difference
    of a logit over the greatest logit.
    """

    engine: str
    order: str
    cells: int
    identical: bool
    agreement: float
    error: float
    worst: float
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


@dataclass
class Tally:
    """What a comparison keeps of every cell, in decoding order, and of all logits together.

    ``tokens`` were written, ``expected`` has the reference's, ``margins`` how far those were ahead.
    """

    ranges: Int
    tokens: list[int] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    squared_error: float = 0.0
    squared: float = 0.0
    worst: float = 0.0
    greatest: float = 0.0

    def add_logits(self, logits: Float, reference: Float) -> None:
        """Count the logits [R, V] of a step."""
        difference = np.abs(logits - reference)
        self.squared_error += float(np.square(difference, dtype=np.float64).sum())
        self.squared += float(np.square(reference, dtype=np.float64).sum())
        self.worst = max(self.worst, float(difference.max(initial=0.0)))
        self.greatest = max(self.greatest, float(np.abs(reference).max(initial=0.0)))

    def add_tokens(self, tokens: Int, reference: Float) -> None:
        """Count the tokens [R] that a step led to."""
        for token, row in zip(tokens.tolist(), reference, strict=True):
            low, high = self.ranges[len(self.tokens)]
            best = int(low + row[low:high].argmax())
            self.tokens.append(token)
            self.expected.append(best)
            self.margins.append(float(row[best] - row[token]))


class PairedEngine:
    """An engine that runs, and a reference that watches: both see every step."""

    def __init__(self, engine: Engine, reference: ReferenceEngine) -> None:
        self._engine, self._reference = engine, reference
        self.capacity, self.max_width = engine.capacity, engine.max_width
        self.samples_in_graph = engine.samples_in_graph
        self.slot_position = engine.slot_position
        self._tally: Tally | None = None
        self._pending: tuple[Int, Float] | None = None

    @property
    def token_buffer(self) -> Int:
        """Tokens by place, those of the last step included."""
        return self._engine.token_buffer

    def watch(self, tally: Tally | None) -> None:
        """Count what follows into ``tally``; the last step is counted once its tokens are there."""
        self._settle()
        self._tally = tally

    def padded_width(self, width: int) -> int:
        """See ``Engine.padded_width``."""
        return self._engine.padded_width(width)

    def step(self, inputs: StepInputs, sampling: SamplingState) -> Float:
        """Run one pass on both, and keep what the reference expected."""
        self._settle()
        expected = self._reference.logits(inputs, self.token_buffer, self.slot_position)
        logits = self._engine.step(inputs, sampling)
        if self._tally is not None:
            self._tally.add_logits(logits, expected)
            self._pending = inputs.sinks[inputs.decoded], expected
        return logits

    def _settle(self) -> None:
        """Count the tokens of the step before, which its sampler has written by now."""
        if self._tally is not None and self._pending is not None:
            places, expected = self._pending
            self._tally.add_tokens(self.token_buffer[places], expected)
        self._pending = None

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
    pair, layout = session.engine, schedule.layout
    assert isinstance(pair, PairedEngine)
    table = schedule.table(len(workload.prompt), frames, 0, pair.max_width)
    check_table(table, schedule)
    sinks = table.sinks[table.sinks != NO_SINK] - layout.first_cell(table.first_frame)
    cells = np.stack(np.divmod(sinks, layout.frame_length), axis=1)
    tally = Tally(session.manifest.sampling.range_table(layout)[layout.before + cells[:, 1]])
    session.start(workload.prompt, workload.prompt_actions, workload.text)
    actions = None if workload.actions is None else workload.actions[:frames]
    pair.watch(tally)
    for _ in session.generate(frames, actions, schedule=schedule, sampling=SamplingSettings(0.0)):
        pass
    pair.watch(None)
    return _verdict(name, schedule, gate_of(precision), tally, cells)


def _verdict(name: str, schedule: Schedule, gate: Gate, tally: Tally, cells: NDArray[np.int32]) -> Verdict:
    differing = [at for at, (a, b) in enumerate(zip(tally.tokens, tally.expected, strict=True)) if a != b]
    error = math.sqrt(tally.squared_error / tally.squared)
    tie = gate.tie * tally.greatest
    agreement = 1.0 - sum(tally.margins[at] > tie for at in differing) / len(tally.tokens)
    first = None
    if differing:
        at = differing[0]
        row, column = divmod(int(cells[at, 1]), schedule.layout.columns)
        first = Difference(
            int(cells[at, 0]), row, column, tally.tokens[at], tally.expected[at], tally.margins[at]
        )
    return Verdict(
        engine=name,
        order=order_name(schedule),
        cells=len(tally.tokens),
        identical=not differing,
        agreement=agreement,
        error=error,
        worst=tally.worst / tally.greatest,
        first_difference=first,
        passed=agreement >= gate.agreement and error <= gate.error,
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
