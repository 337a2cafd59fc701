"""Rollouts of an evaluation: a bundle's, sixteen in the same passes, against PyTorch's loop.

    python -m benchmarks.rollouts crafter-3m.diagd --world diagd/models/crafter-3m --data recordings

All take turns in one process: CPU time of one thread; with --workers wall time of so many processes of one
thread against PyTorch with as many threads. Each order is rolled out alone, behind prompts that are fed for
it, and then all of them in one call, as an evaluation does it: the bundle feeds a prompt once, and guesses
for next token what another order drew; PyTorch's loop takes one order after the other, each with its prompts.

Beside them what the machine takes for the bundle's own passes, in one thread: the bare products with weights,
then with the products and the softmax of attention besides, as ONNX Runtime computes them. What is left is
what stands between the products, sampling and the host, less what our own attention gains.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from rich.table import Table

from benchmarks import CONSOLE, parser
from benchmarks.cpu import bare_products
from diagd.bundle import Bundle
from diagd.bundle.transformer import TransformerConfig
from diagd.cluster.workers import Processes
from diagd.engines.prefix import PrefixEngine
from diagd.progress import Progress
from diagd.runtime.group import Group
from diagd.runtime.step import PassTime
from diagd.schedule import Schedule
from diagd.tuning.recordings import cached_tokens
from diagd.tuning.rollouts import TOGETHER, Streams
from worlds.folder import load_world
from worlds.model import BundleModel, ModelWorker, ParallelModel, Rollouts, TorchModel, WorldModel
from worlds.options import EvalOptions

ORDERS = ("next token", "k=1 chained", "k=1 serial", "k=2 serial")
TASKS = {order: [order] for order in ORDERS} | {"all, as an evaluation": list(ORDERS)}


def main() -> None:
    options = parser(__doc__, "bundle")
    options.add_argument("--world", type=Path, required=True, help="folder that the bundle was exported from")
    options.add_argument("--data", type=Path, required=True, help="recording")
    options.add_argument("--rollouts", type=int, help=f"default: {TOGETHER} for each worker")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--workers", type=int, help="processes that roll out (default: this one)")
    args = options.parse_args()
    torch.set_num_threads(args.workers or 1)
    alone = BundleModel(str(args.bundle), 1)
    ours: WorldModel = alone
    with ExitStack() as stack:
        streams = _streams(ours, args.data, args.rollouts or TOGETHER * (args.workers or 1))
        if args.workers:
            make = partial(ModelWorker, args.bundle, None, "cpu")
            ours = ParallelModel(ours, stack.enter_context(Processes(make, args.workers)))
        models = {"PyTorch": TorchModel(load_world(args.world)), "bundle": ours}
        bundle = Bundle.open(args.bundle)
        least = {task: least_seconds(alone, bundle, streams, orders) for task, orders in TASKS.items()}
        compare(models, streams, args.repeats, least, wall=bool(args.workers))


def _streams(model: WorldModel, data: Path, count: int) -> Streams:
    """Windows of a recording, as many frames as an evaluation has them."""
    recording, options = cached_tokens(data, model.encoder), EvalOptions()
    starts = recording.window_starts(options.prompt + options.frames)
    chosen = np.random.default_rng(0).choice(starts, count, replace=False)
    return recording.windows(chosen, options.prompt + options.frames)


def compare(
    models: dict[str, WorldModel],
    streams: Streams,
    repeats: int,
    least: dict[str, tuple[float, float]],
    *,
    wall: bool,
) -> None:
    """Print what rollouts of every task take, beside what ``least_seconds`` says."""
    now, options = time.perf_counter if wall else time.process_time, EvalOptions()
    spent: dict[tuple[str, str], list[float]] = {(task, name): [] for task in TASKS for name in models}
    made: dict[tuple[str, str], list[Streams]] = {}
    for task in Progress(CONSOLE).each(list(TASKS) * (repeats + 1), "rolling out"):
        for name, model in models.items():
            schedules, began = [Schedule.parse(order, model.layout) for order in TASKS[task]], now()
            made[task, name] = model.roll_out(
                Rollouts(streams, options.prompt, schedules, options.sampling, 0)
            )
            spent[task, name].append(now() - began)
    names = (f"{name}, s" for name in models)
    table = Table("order", *names, "gain", "equal tokens", "products, s", "and attention, s")
    for task in TASKS:
        theirs, ours = (float(np.median(spent[task, name][1:])) for name in models)
        other, own = (made[task, name] for name in models)
        equal = np.equal(other, own).mean()
        products, attention = least[task]
        bounds = (f"{bound:.2f} ({theirs / bound:.2f}x)" for bound in (products, products + attention))
        table.add_row(task, f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.2f}x", f"{equal:.1%}", *bounds)
    CONSOLE.print(table)


class Shape(NamedTuple):
    """Of a pass: streams in it, rows of each, slots that are bound."""

    streams: int
    rows: int
    slots: int


def least_seconds(
    model: BundleModel, bundle: Bundle, streams: Streams, orders: Sequence[str]
) -> tuple[float, float]:
    """CPU seconds of one thread for products with weights of rollouts by some orders, and for attention."""
    options, schedules = EvalOptions(), [Schedule.parse(order, model.layout) for order in orders]
    shapes = shapes_of(
        model._group,
        lambda: model.roll_out(Rollouts(streams[:TOGETHER], options.prompt, schedules, options.sampling, 0)),
    )
    config = bundle.manifest.transformer
    with_weights, inputs = bare_products(bundle, wall=False)
    attention, random = bare_attention(config), np.random.default_rng(0)
    most = max(shape.slots * shape.streams for shape in shapes)
    buffers = random.random((2 * config.layers, most, config.kv_heads, config.head_size), np.float32)
    totals = np.zeros(2)
    for shape, count in shapes.items():
        rows = shape.streams * shape.rows
        fed = {name: np.ones((rows, size), np.float32) for name, size in inputs.items()}
        queries = (shape.streams, config.kv_heads, config.heads // config.kv_heads * shape.rows)
        given = {"queries": np.ones((*queries, config.head_size), np.float32)}
        for number, buffer in enumerate(buffers):
            bound = buffer[: shape.slots * shape.streams]
            given[f"rows_{number}"] = bound.reshape(shape.slots, shape.streams, *bound.shape[1:])
        runs = partial(with_weights.run, ["y"], fed), partial(attention.run, None, given)
        totals += [count * _seconds(run) for run in runs]
    products, attended = totals * len(streams) / min(len(streams), TOGETHER)
    return float(products), float(attended)


def shapes_of(group: Group, work: Callable[[], object]) -> Counter[Shape]:
    """What passes of a group are run while it works."""
    engine, run, shapes = group.engine, group.passes.run, Counter[Shape]()
    assert isinstance(engine, PrefixEngine)

    def watched(lanes: Sequence[int]) -> PassTime:
        spent = run(lanes)
        slots, streams = engine.outputs[1].shape()[:2]
        shapes[Shape(streams, engine._bound_width, slots)] += 1
        return spent

    group.passes.run = watched  # type: ignore[method-assign]
    try:
        work()
    finally:
        group.passes.run = run  # type: ignore[method-assign]
    return shapes


def _seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return float(np.median(times[1:]))


def bare_attention(config: TransformerConfig) -> onnxruntime.InferenceSession:
    """The products of attention and the softmax between them, layer by layer, over K/V rows as they lie."""
    from onnx import TensorProto, helper

    nodes, names = [], ["queries"]
    for layer in range(config.layers):
        keys, values = f"rows_{2 * layer}", f"rows_{2 * layer + 1}"
        chain: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = (
            ("Transpose", [keys], f"k{layer}", {"perm": [1, 2, 3, 0]}),
            ("MatMul", ["queries", f"k{layer}"], f"s{layer}", {}),
            ("Softmax", [f"s{layer}"], f"p{layer}", {"axis": -1}),
            ("Transpose", [values], f"v{layer}", {"perm": [1, 2, 0, 3]}),
            ("MatMul", [f"p{layer}", f"v{layer}"], f"y{layer}", {}),
        )
        nodes += [helper.make_node(kind, fed, [out], **given) for kind, fed, out, given in chain]
        names += [keys, values]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in tensors]
        for tensors in (names, [f"y{layer}" for layer in range(config.layers)])
    )
    graph = helper.make_graph(nodes, "attention", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


if __name__ == "__main__":
    main()
