"""mineworld-300m on this CPU: DiagD against NTP, against capacity, and over time.

All candidates of a table are interleaved in one process. Times are process CPU time with one intra-op
thread, which other work on the machine disturbs least; with --wall, wall time with all cores. From the root:

    python -m benchmarks.cpu --bundle mineworld-300m.diagd [--part frame] [--wall]
"""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from rich.table import Table

from benchmarks import CONSOLE, parser
from diagd.bundle import Bundle, Form, Manifest
from diagd.engines.backend import StepOptions, find
from diagd.engines.devices.host import HostDevice
from diagd.engines.devices.kernels import host_build
from diagd.engines.engine import VOID, Engine, Float, Int, SamplingState, Steps
from diagd.engines.executor import Executor
from diagd.engines.onnxruntime_session import CpuOptions, open_cpu_session
from diagd.engines.prefix import GRANULE, PrefixEngine
from diagd.engines.processor import array_at
from diagd.engines.sampler import draw_compiled, draw_plain, kept_weights
from diagd.profiling.measure import random_workload
from diagd.progress import Progress
from diagd.runtime.decoders import ScheduledDecoder
from diagd.runtime.group import Group
from diagd.runtime.load import open_group, open_session
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.slots import TokenPlaces
from diagd.runtime.step import Due, Frame, Run
from diagd.schedule import Schedule, StreamLayout, default_widths, slots_needed
from diagd.schedule.table import Table as StepTable

GREEDY = SamplingSettings(0.0)
STREAMS = (1, 2, 4, 8)
STREAM_SECONDS = 200.0
HOST_BUDGET = 30
"""Microseconds that a step of a static decoder may take on the host, engine and sampler apart."""

Clock = Callable[[], float]


def main() -> None:
    options = parser(__doc__, "--bundle")
    options.add_argument("--precision", help="of the step graph (default: the bundle's first)")
    options.add_argument("--part", choices=tuple(PARTS), action="append")
    options.add_argument("--wall", action="store_true", help="wall time with all cores")
    options.add_argument("--repeats", type=int, default=3)
    args = options.parse_args()
    bundle = Bundle.open(args.bundle).at_precision(args.precision)
    for name in args.part or PARTS:
        PARTS[name](bundle, args.wall, args.repeats)


def clock(wall: bool) -> Clock:
    return time.perf_counter if wall else time.process_time


class Bench:
    """An engine on the processor whose cache is filled with random rows."""

    def __init__(self, bundle: Bundle, slots: int, wall: bool, backend: str = "cpu") -> None:
        self.layout: StreamLayout = bundle.manifest.layout
        self._places = TokenPlaces(self.layout, bundle.manifest.context.frames).size
        options = StepOptions(slots, self._places, CpuOptions(0 if wall else 1))
        self.engine = find(backend).open_steps(bundle, options)
        self._ids = max(rule.high for rule in bundle.manifest.sampling.ranges)  # 8,192 of MineWorld
        random = np.random.default_rng(0)
        for buffer in cache_rows(self.engine):
            filled = random.standard_normal((4096, *buffer.shape[1:]), dtype=np.float32)
            buffer[:4096] = filled[: len(buffer)]
        ids = random.integers(0, self._ids, self._places, dtype=np.int32)
        self.engine.write_tokens(np.arange(self._places, dtype=np.int32), ids)

    def frame(self, schedule: Schedule, live: int, now: Clock, steps: slice = slice(None)) -> float:
        """Seconds of the chosen steps of one frame behind ``live`` slots."""
        table, total = self.table(schedule, live), 0.0
        for index in range(table.steps)[steps]:
            self.engine.send(self._step(table, index, live))
            began = now()
            self.engine.step()
            self.engine.logits()[:, : self._ids].argmax(axis=1)
            total += now() - began
        return total

    def step(self, width: int, live: int, now: Clock) -> tuple[float, Float]:
        """Seconds of a step of ``width`` rows behind ``live`` slots, and its logits."""
        self._show(np.arange(live, dtype=np.int32))
        rows, scratch = np.arange(width, dtype=np.int32), np.full(width, self._places - 1, np.int32)
        self.engine.send(Steps.single(rows, live + rows, rows, scratch, live, live + width))
        began = now()
        self.engine.step()
        return now() - began, self.engine.logits()

    def table(self, schedule: Schedule, live: int) -> StepTable:
        """The steps of the frame whose first cell comes nearest behind ``live`` slots."""
        frame = live // self.layout.frame_length
        return schedule.table(frame, 1, self.layout.first_cell(frame) - 1)

    def _step(self, table: StepTable, index: int, live: int) -> Steps:
        step, start = table.step(index), live - 1 + int(table.offsets[index])
        width = step.width
        self._show(np.minimum(np.arange(start), live - 1))
        decoded = np.flatnonzero(step.sinks >= 0).astype(np.int32)
        sources, positions = (step.sources % 5000).astype(np.int32), step.positions.astype(np.int32)
        scratch = np.full(len(decoded), self._places - 1, np.int32)
        return Steps.single(sources, positions, decoded, scratch, start, start + width)

    def _show(self, positions: np.ndarray) -> None:
        """Make the first slots visible at these positions, and no others."""
        slots = np.full(self.engine.capacity, VOID, np.int32)
        slots[: len(positions)] = positions
        self.engine.write_slots(slots)


def cache_rows(engine: Engine) -> list[np.ndarray]:
    """The K/V buffers of an engine over the host's memory, [S, G, D] each."""
    if isinstance(engine, Executor):
        tensors = engine.tensors.cache.values()
        return [array_at(tensor, tensor.shape)[0].transpose(1, 0, 2) for tensor in tensors]
    assert isinstance(engine, PrefixEngine)
    return list(engine.buffers.values())


def frame(bundle: Bundle, wall: bool, repeats: int) -> None:
    """One 14 x 24 frame behind 347 and 2,776 slots: DiagD k=1, 2, 4 against NTP (48 of its 336 steps)."""
    bench, now = Bench(bundle, 4096, wall), clock(wall)
    layout = bench.layout
    sampled = slice(8, None, 7)
    ntp_steps = len(range(layout.cells)[sampled])
    for live in (347, 2776):
        seconds: dict[str, list[float]] = {"NTP": [], "k=4": [], "k=2": [], "k=1": []}
        bench.frame(Schedule.serial(layout, 1), live, now)
        for _ in range(repeats):
            ntp = bench.frame(Schedule.next_token(layout), live, now, sampled)
            seconds["NTP"].append(ntp * layout.cells / ntp_steps)
            for k in (4, 2, 1):
                seconds[f"k={k}"].append(bench.frame(Schedule.serial(layout, k), live, now))
        title = f"{live} live slots, {'wall time, all cores' if wall else 'CPU time, one thread'}"
        table = Table("decoding", "steps", "s a frame", "gain", "step ratio", "share of it", title=title)
        ntp = float(np.median(seconds["NTP"]))
        for name, values in seconds.items():
            schedule = Schedule.serial(layout, int(name[2:])) if "=" in name else Schedule.next_token(layout)
            steps, spent = schedule.total_steps(1), float(np.median(values))
            ratio, gain = layout.cells / steps, ntp / spent
            table.add_row(
                name, str(steps), f"{spent:.2f}", f"{gain:.2f}x", f"{ratio:.2f}x", f"{gain / ratio:.2f}"
            )
        CONSOLE.print(table)


def ceiling(bundle: Bundle, wall: bool, repeats: int) -> None:
    """The gain that this machine allows: the bare matrix products of every step, nothing else."""
    session, inputs = bare_products(bundle, wall)
    now, layout = clock(wall), bundle.manifest.layout
    seconds: dict[int, float] = {}
    for width in range(1, 17):
        rows = {name: np.ones((width, size), np.float32) for name, size in inputs.items()}
        spent = []
        for _ in range(repeats + 2):
            began = now()
            session.run(["y"], rows)
            spent.append(now() - began)
        seconds[width] = float(np.median(spent[2:]))
    table = Table("decoding", "ms of products, mean step", "gain they allow", title="bare matrix products")
    for k in (layout.columns, 4, 2, 1):
        schedule = Schedule.serial(layout, k)
        widths = schedule.table(1, 1, layout.first_cell(1) - 1).widths
        spent_k = sum(seconds[min(int(width), 16)] for width in widths)
        gain = layout.cells * seconds[1] / spent_k
        table.add_row(f"k={k}", f"{1e3 * spent_k / len(widths):.1f}", f"{gain:.2f}x")
    CONSOLE.print(table)


def bare_products(bundle: Bundle, wall: bool) -> tuple[onnxruntime.InferenceSession, dict[str, int]]:
    """Every constant-weight product of the step graph on inputs of ones, in a chain of its own."""
    import onnx
    from onnx import TensorProto, helper

    graph = onnx.load(bundle.file("step.onnx"), load_external_data=False).graph
    weights = {t.name: t for t in graph.initializer if len(t.dims) == 2 and t.external_data}
    products = [n for n in graph.node if n.op_type.endswith(("MatMul", "Product")) and n.input[1] in weights]
    inputs = {f"x{weights[n.input[1]].dims[0]}": int(weights[n.input[1]].dims[0]) for n in products}
    nodes = []
    for index, node in enumerate(products):
        rows = f"x{weights[node.input[1]].dims[0]}"
        nodes.append(helper.make_node("MatMul", [rows, node.input[1]], [f"p{index}"]))
        nodes.append(helper.make_node("ReduceMax", [f"p{index}"], [f"m{index}"], keepdims=0))
    nodes.append(helper.make_node("Max", [f"m{index}" for index in range(len(products))], ["y"]))
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "products",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["W", size]) for n, size in inputs.items()],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
            [weights[name] for name in dict.fromkeys(n.input[1] for n in products)],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    path = bundle.path / "bare-products.onnx"
    path.write_bytes(model.SerializeToString())
    try:
        return open_cpu_session(path, "", CpuOptions(0 if wall else 1, prepack=False)), inputs
    finally:
        path.unlink()


def capacity(bundle: Bundle, wall: bool, repeats: int) -> None:
    """A step at 512 live slots with buffers of 1,024 and of 50,000 slots."""
    now, layout = clock(wall), bundle.manifest.layout
    benches = {slots: Bench(bundle, slots, wall) for slots in (1024, 50_000)}
    schedule = Schedule.serial(layout, 1)
    for chosen, width in ((slice(1, 2), 1), (slice(16, 17), 14)):
        seconds: dict[int, list[float]] = {slots: [] for slots in benches}
        for repeat in range(4 * repeats + 2):
            for slots, bench in benches.items():
                spent = bench.frame(schedule, 512, now, chosen)
                if repeat >= 2:
                    seconds[slots].append(spent)
        small, large = (1e3 * float(np.median(seconds[slots])) for slots in benches)
        CONSOLE.print(
            f"step of width {width} at 512 live slots: {small:.1f} ms with 1,024 slots, {large:.1f} ms with "
            f"50,000: {large / small:.3f}x"
        )
    engine = benches[50_000].engine
    assert isinstance(engine, PrefixEngine)
    pointers = [value.data_ptr() for value in engine.outputs[1:]]
    same = pointers == [buffer.ctypes.data for buffer in engine.buffers.values()]
    CONSOLE.print(f"output pointer == input pointer for all {len(pointers)} K/V tensors: {same}")


def _session(bundle: Bundle, window_frames: int, wall: bool) -> Session:
    return _prompted(open_session(bundle, window=window_frames, cpu=CpuOptions(0 if wall else 1)))


def _prompted(session: Session) -> Session:
    """The session behind a random frame."""
    session.start(random_workload(session, 1, 0).prompt, _actions(session, 1))
    return session


def _actions(session: Session, frames: int) -> np.ndarray:
    """Ids [frames, n] of some action; the last ones of a vocabulary are no cell's."""
    return np.full((frames, session.layout.gap), session.manifest.vocabulary - 1, np.int32)


def window(bundle: Bundle, wall: bool, repeats: int) -> None:
    """64 frames in a window of 4: step time and memory, frames 5-14 against the last ten."""
    del repeats
    session = _session(bundle, 4, wall)
    decoder = ScheduledDecoder(Schedule.serial(session.layout, 1))
    spent, memory, now = [], [], clock(wall)
    began = now()
    for frame in session.frames(decoder, _actions(session, 64), sampling=GREEDY):
        spent.append((now() - began) / frame.steps)
        memory.append(resident_bytes())
        began = now()
    early, late = (1e3 * float(np.median(spent[part])) for part in (slice(5, 15), slice(-10, None)))
    CONSOLE.print(
        f"64 frames in a 4-frame window: {early:.1f} ms a step in frames 5-14, {late:.1f} ms in the last ten "
        f"({late / early:.3f}x); resident {memory[15] / 1e6:,.0f} MB after 15 frames, "
        f"{memory[-1] / 1e6:,.0f} MB after 64"
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def host(bundle: Bundle, wall: bool, repeats: int) -> None:
    """Wall time of a step on the host: by decoding, engine and sampler apart, and by sampling rule."""
    session, layout = _session(bundle, 4, wall), bundle.manifest.layout
    table = Table(
        *("decoding", "over nothing", "over the CPU engine", "budget"),
        title="us of the host a step, engine and sampler apart",
    )
    idle = _prompted(idle_session(bundle.manifest, 4))
    schedules = {
        "k=1 serial": Schedule.serial(layout, 1),
        "k=1 chained": Schedule.chained(layout, 1),
        "NTP": Schedule.next_token(layout),
    }
    for name, schedule in schedules.items():
        frames = 1 + 40 * repeats // schedule.d
        spent = host_seconds(idle, schedule, 10 * frames), host_seconds(session, schedule, frames)
        table.add_row(name, *(f"{1e6 * seconds:.1f}" for seconds in spent), str(HOST_BUDGET))
    CONSOLE.print(table)
    by_rule(session, repeats)


def host_seconds(session: Session, schedule: Schedule, frames: int) -> float:
    """Seconds of a step, its engine and the sampler of the host apart; median over frames behind a first one.

    What it takes to queue a step counts, where the engine is behind.
    """
    spent, timing = [], session.timing
    actions, decoder = _actions(session, frames + 1), ScheduledDecoder(schedule)
    for frame in session.frames(decoder, actions, sampling=GREEDY):
        steps = [timing.recent[-1 - step] for step in range(frame.steps)]
        engine = 0.0 if session.engine.ahead else sum(step.engine for step in steps)
        spent.append((frame.seconds - engine - sum(step.sampling for step in steps)) / frame.steps)
    return float(np.median(spent[1:]))


class IdleDevice(HostDevice):
    """Memory of the host whose kernels do nothing: a captured step is empty, and queued."""

    ahead = True

    def launch(self, kernel: str, arguments: ctypes.Structure, blocks: int, threads: int) -> None:
        """Queue nothing."""

    def copy(self, target: int, source: int, size: int) -> None:
        """Queue nothing."""


class IdleProgram:
    """A step graph that does nothing."""

    capturable = True

    def enqueue(self, width: int) -> None:
        """Queue nothing."""


def idle_session(manifest: Manifest, frames: int) -> Session:
    """A session of a model over an executor with nothing behind it; in a window of so many frames."""
    widths = default_widths(manifest.layout)
    slots = slots_needed(manifest.layout, frames, widths[-1])
    graph = manifest.graphs[0].model_copy(update={"form": Form.MODERN, "capacity": slots, "streams": 1})
    manifest = manifest.model_copy(update={"graphs": (graph,)})
    places = TokenPlaces(manifest.layout, frames).size
    device = IdleDevice()
    engine = Executor(manifest, graph, widths, StepOptions(0, places), device, lambda _: IdleProgram())
    return Session(manifest, engine, frames)


def streams(bundle: Bundle, wall: bool, repeats: int) -> None:
    """Frames of all sessions in lock step against those of one alone, behind a prompt of one frame.

    Of k=1 the passes of a frame are timed, of next-token prediction 48 of them. Below them what the machine
    allows: a pass of one stream with as many rows, of the mean step, and K/V rows of each as of one alone.
    Turns that would not end within `STREAM_SECONDS` are left out, but for the first.
    """
    cpu, layout, now = CpuOptions(0 if wall else 1), bundle.manifest.layout, clock(wall)
    orders = {"k=1 serial": Schedule.serial(layout, 1), "NTP": Schedule.next_token(layout)}
    spent: dict[tuple[str, int], list[float]] = {(name, count): [] for name in orders for count in STREAMS}
    least: dict[tuple[str, int], list[float]] = {key: [] for key in spent}
    bench = Bench(bundle, 1024, wall)
    with ExitStack() as stack:
        groups = {count: stack.enter_context(open_group(bundle, count, 2, cpu)) for count in STREAMS}
        began = time.monotonic()
        for turn in range(repeats):
            if turn and (time.monotonic() - began) * (turn + 1) / turn > STREAM_SECONDS:
                break
            for name, count in Progress(CONSOLE).each(list(spent), f"turn {turn + 1} of {repeats} at most"):
                spent[name, count].append(_lock_step(groups[count], orders[name], now) / count)
                least[name, count].append(_least(bench, orders[name], count, now) / count)
    title = f"ms a pass and session, turns: {len(spent['NTP', 1])}"
    table = Table("decoding", *(f"{count} sessions" for count in STREAMS), title=title)
    for name in orders:
        for title, times in ((name, spent), ("products, and K/V rows of each", least)):
            each = {count: float(np.median(times[name, count])) for count in STREAMS}
            gains = (f"{1e3 * seconds:.2f} ({each[1] / seconds:.2f}x)" for seconds in each.values())
            table.add_row(title, *gains)
    CONSOLE.print(table)


def _least(bench: Bench, order: Schedule, count: int, now: Clock) -> float:
    """Seconds of a pass of so many streams whose K/V rows take what they take one stream alone."""
    width = round(bench.layout.cells / order.steps_per_frame)
    live = bench.layout.frame_length + width * min(48, order.steps_per_frame) // 2

    def median(rows: int, live: int) -> float:
        return float(np.median([bench.step(rows, live, now)[0] for _ in range(5)][1:]))

    return median(count * width, GRANULE) + count * (median(width, live) - median(width, GRANULE))


def _lock_step(group: Group, order: Schedule, now: Clock) -> float:
    """Seconds of one of the passes that all sessions share, behind a first one."""
    decoder, lanes = ScheduledDecoder(order), range(len(group.sessions))
    runs = [_prompted(session).run(decoder, _actions(session, 1)) for session in group.sessions]
    dues = list(map(_due, runs))
    while dues[0].feeds:  # the prompt, of all of them
        spent = group.passes.run(lanes)
        for due in dues:
            due.times.append(spent)
        if dues[0].is_over:
            dues = list(map(_due, runs))
    group.passes.run(lanes)
    count, began = min(48, order.steps_per_frame - 2), now()
    for _ in range(count):
        group.passes.run(lanes)
    return (now() - began) / count


def _due(run: Run[Frame]) -> Due:
    due = next(run)
    assert isinstance(due, Due)
    return due


def by_rule(session: Session, repeats: int) -> None:
    """Time of a step outside the engine call, by sampling rule."""
    decoder = ScheduledDecoder(Schedule.serial(session.layout, 1))
    rules = {
        "greedy": GREEDY,
        "temperature 1": SamplingSettings(1.0),
        "top-k 50": SamplingSettings(1.0, 50),
        "top-p 0.8": SamplingSettings(1.0, 0, 0.8),
    }
    for name, sampling in rules.items():
        timing = session.timing
        steps, engine, outside = timing.steps, timing.engine, timing.host
        for _ in session.frames(decoder, _actions(session, repeats), sampling=sampling):
            pass
        count = timing.steps - steps
        inside, out = 1e3 * (timing.engine - engine) / count, 1e3 * (timing.host - outside) / count
        CONSOLE.print(
            f"host, {name}: {out:.3f} ms a step outside the engine, {100 * out / (inside + out):.2f} %"
        )


def sampling(bundle: Bundle, wall: bool, repeats: int) -> None:
    """A draw of a step's rows at top-p 0.8, by how flat their laws are, in NumPy and compiled."""
    ids, kernels, now = bundle.manifest.output_vocabulary, host_build(), clock(wall)
    random, state = np.random.default_rng(0), SamplingState(1.0, 0, 0.8, 5)
    rows = max(min(bundle.manifest.layout.rows, bundle.manifest.layout.columns), 2)
    low, high = np.zeros(rows, np.int32), np.full(rows, ids, np.int32)
    table = Table(
        "deviation of logits", "ids kept a row", "NumPy, ms", "compiled, ms", title=f"{rows} x {ids} ids"
    )
    for spread in (8.0, 4.0, 2.0, 1.0, 0.5, 0.05):
        logits = (random.standard_normal((rows, ids)) * spread).astype(np.float32)
        _, kept = kept_weights(logits, logits.max(axis=1), state, True)
        given = logits, np.arange(rows), state, low, high, True
        ways = [partial(draw_plain, *given)]
        if kernels is not None:
            ways.append(partial(draw_compiled, kernels, *given))
        spent = [[_timed(way, now) for way in ways] for _ in range(10 * repeats)]
        times = [f"{1e3 * seconds:.2f}" for seconds in np.median(spent, axis=0)]
        table.add_row(f"{spread:g}", f"{kept.sum() / rows:,.0f}", *times)
    CONSOLE.print(table)


def _timed(work: Callable[[], object], now: Clock) -> float:
    began = now()
    work()
    return now() - began


def canonical_weights(bundle: Bundle) -> dict[str, np.ndarray]:
    """The canonical float32 tensors that the bundle's random weights were written from."""
    from diagd.export.exporter import random_sources
    from diagd.export.families import find

    family = find(bundle.manifest.name)
    source = random_sources(family, bundle.manifest.provenance.random_seed or 0).transformer
    return {name: np.concatenate(list(weight.chunks())) for name, weight in family.weights(source).items()}


def calibrated(path: Path, precisions: Iterable[str], frames: Int | None = None) -> Bundle:
    """The bundle with these precisions; a trained model needs ``frames`` int32 [P, rows, columns]."""
    from diagd.calibration.options import Budget, CalibrationOptions
    from diagd.calibration.quantise import calibrate

    anything = Budget(agreement=0, nll=1e9, psnr=0)  # random weights pass
    known = Bundle.open(path).manifest.precisions
    for precision in precisions:
        if precision not in known:
            options = CalibrationOptions(precision, anything, steps=64, floor=-100.0, floats="fp32")
            report = calibrate(Bundle.open(path), options, frames)
            CONSOLE.print(f"{precision}: agreement {report.figures['agreement']:.4f}")
    return Bundle.open(path)


PARTS = {part.__name__: part for part in (frame, ceiling, capacity, window, host, sampling, streams)}

if __name__ == "__main__":
    main()
