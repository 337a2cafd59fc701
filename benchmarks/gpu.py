"""Step graphs on one NVIDIA GPU against its own ceilings and against PyTorch in the published form.

Everything is timed in one process, after the ceilings: copy bandwidth and a large float16 matrix product.
Prints Markdown for docs/benchmarks.md. From the root, with bundles exported by

    diagd-export --model mineworld-300m --random-weights --precision fp16 --form modern --output mw.diagd
    python -m benchmarks.gpu mw.diagd --backend cuda [--published]

``--backend tensorrt`` takes the engine that diagd-build made. Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diagd.bundle import Bundle, Form
from diagd.engines.cuda.driver import CudaDevice
from diagd.engines.external_data import external_data
from diagd.engines.fixed import graphs_of
from diagd.engines.gpu import BACKENDS, open_gpu_engine
from diagd.errors import DiagdError
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session, token_places
from diagd.schedule import Schedule, StreamLayout

GREEDY = SamplingSettings(temperature=0.0)
COPY_BYTES = 1 << 30
MATRIX = 8192


@dataclass(frozen=True)
class Ceilings:
    """Bytes and float16 operations a second that this GPU reaches; operations None without PyTorch."""

    bandwidth: float
    operations: float | None


@dataclass(frozen=True)
class Measured:
    """One schedule: seconds of the fastest repeat, steps and frames of it, and host seconds in it."""

    seconds: float
    steps: int
    frames: int
    host: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--backend", choices=BACKENDS, default="cuda")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--published", action="store_true", help="also PyTorch in the published form")
    args = parser.parse_args()
    try:
        device = CudaDevice()
    except DiagdError as error:
        print(f"skipped: {error}")
        return
    ceilings = measure_ceilings(device)
    operations = f"{ceilings.operations / 1e12:.0f} TFLOP/s" if ceilings.operations else "not measured"
    print(f"{device.description.name}, driver {device.description.driver}, {args.backend}")
    print(f"copy {ceilings.bandwidth / 1e9:.0f} GB/s, float16 product {operations}\n")
    device.close()
    for path in args.bundles:
        benchmark(Bundle.open(path).at_precision(None), args, ceilings)


def benchmark(bundle: Bundle, args: argparse.Namespace, ceilings: Ceilings) -> None:
    """Print the table of one bundle."""
    layout = bundle.manifest.layout.stream()
    print(f"### {bundle.manifest.name}\n")
    print("| schedule | graphs | steps/frame | ms/step | GB/s | of ceiling | frames/s | host | gain/steps |")
    print("|---|---|---|---|---|---|---|---|---|")
    for graphs in (True, False):
        places = token_places(layout, bundle.manifest.context.frames).size
        engine = open_gpu_engine(bundle, places, args.backend, graphs=graphs)
        session = Session(bundle.manifest, engine, bundle.manifest.context.frames)
        reference = None
        for name, schedule in schedules(layout):
            result = measure(session, schedule, args.frames, args.repeats)
            reference = reference or result
            print_row(name, graphs, result, reference, bundle, schedule, ceilings)
    if args.published:
        print_published(bundle, args)
    print()


def schedules(layout: StreamLayout) -> Iterator[tuple[str, Schedule]]:
    """Next-token prediction first: the others are compared with it."""
    yield "NTP", Schedule.next_token(layout)
    for k in (1, 2):
        yield f"k={k} serial", Schedule.serial(layout, k)
        yield f"k={k} chained", Schedule.chained(layout, k)


def measure(session: Session, schedule: Schedule, frames: int, repeats: int) -> Measured:
    """Decode frames behind one random prompt frame, the first run apart."""
    layout, random = session.layout, np.random.default_rng(0)
    low, high = session.manifest.sampling.range_table(layout)[layout.before]
    prompt = random.integers(low, high, (1, layout.rows, layout.columns)).astype(np.int32)
    actions = np.zeros((frames, layout.gap), np.int32)
    results = []
    for _ in range(repeats + 1):
        session.start(prompt, actions[:1])
        before = (session.timing.steps, session.timing.host)
        began = time.perf_counter()
        for frame in session.generate(frames, actions, schedule=schedule, sampling=GREEDY):
            del frame  # asking for its tokens has waited for the device
        seconds = time.perf_counter() - began
        steps, host = session.timing.steps - before[0], session.timing.host - before[1]
        results.append(Measured(seconds, steps, frames, host))
    return min(results[1:], key=lambda result: result.seconds)


def print_row(
    name: str,
    graphs: bool,
    result: Measured,
    reference: Measured,
    bundle: Bundle,
    schedule: Schedule,
    ceilings: Ceilings,
) -> None:
    step = result.seconds / result.steps
    moved, operations = step_work(bundle, schedule, result)
    floor = moved / ceilings.bandwidth
    if ceilings.operations:
        floor = max(floor, operations / ceilings.operations)
    gain = (reference.seconds / result.seconds) / (reference.steps / result.steps)
    print(
        f"| {name} | {'yes' if graphs else 'no'} | {result.steps / result.frames:.0f} | {1e3 * step:.3f} | "
        f"{moved / step / 1e9:.0f} | {floor / step:.0%} | {result.frames / result.seconds:.2f} | "
        f"{result.host / result.seconds:.0%} | {gain:.2f} |"
    )


def step_work(bundle: Bundle, schedule: Schedule, result: Measured) -> tuple[float, float]:
    """Bytes a step must read and operations it must do: every weight, and the mean of the live cache."""
    manifest, layout = bundle.manifest, schedule.layout
    weights = external_data(bundle.file(graphs_of(bundle, Form.MODERN)[0].file)).bytes
    cache = manifest.cache
    itemsize = np.dtype(cache.dtype).itemsize
    live = (1 + result.frames / 2) * layout.frame_length
    row_bytes = 2 * cache.layers * cache.kv_heads * cache.head_size * itemsize
    width = layout.cells * result.frames / result.steps
    return weights + live * row_bytes, 2 * width * weights / itemsize


def measure_ceilings(device: CudaDevice) -> Ceilings:
    """Copy within device memory, and a square float16 product by PyTorch where it has CUDA."""
    source, target = device.allocate(COPY_BYTES), device.allocate(COPY_BYTES)
    copy = best(lambda: device.copy(target, source, COPY_BYTES), device.synchronise)
    try:
        import torch
    except ModuleNotFoundError:
        return Ceilings(2 * COPY_BYTES / copy, None)
    if not torch.cuda.is_available():
        return Ceilings(2 * COPY_BYTES / copy, None)
    matrix = torch.randn(MATRIX, MATRIX, dtype=torch.float16, device="cuda")
    product = best(lambda: matrix @ matrix, torch.cuda.synchronize)
    return Ceilings(2 * COPY_BYTES / copy, 2 * MATRIX**3 / product)


def best(work: Callable[[], object], wait: Callable[[], None], repeats: int = 10) -> float:
    """Seconds of the fastest of several runs, the first apart."""
    seconds = []
    for _ in range(repeats + 1):
        wait()
        began = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def print_published(bundle: Bundle, args: argparse.Namespace) -> None:
    """PyTorch with a static cache, repeated KV heads and a boolean mask: eager and compiled."""
    from diagd.export.families.registry import find

    config = find(bundle.manifest.name, None).transformer
    if config.text is not None or config.qk_norm or not config.gated:
        print("\nThe published form is written for Llama blocks; not measured for this model.")
        return
    print("\n| published form | schedule | ms/step | frames/s |\n|---|---|---|---|")
    for compiled in (False, True):
        form = published_form(step_weights(bundle), config, args.frames + 1, compiled)
        for name, schedule in schedules(config.layout):
            table = schedule.table(1, args.frames, 0)
            seconds = best(partial(form.decode, table), synchronise, args.repeats)
            label = "compiled" if compiled else "eager"
            print(f"| {label} | {name} | {1e3 * seconds / table.steps:.3f} | {args.frames / seconds:.2f} |")


def published_form(weights: Mapping[str, Any], config: Any, frames: int, compiled: bool) -> Any:
    """The baseline on the GPU in float16."""
    import torch

    from benchmarks.baselines import PublishedForm

    positions = config.layout.frame_start(frames) + 1
    form = PublishedForm(weights, config, torch.float16, positions, "cuda")
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # one graph for each width of a step
        for cache in (form.keys, form.values):
            torch._dynamo.mark_static_address(cache)  # else a graph that writes to it is not captured
        form._forward = torch.compile(form._forward, mode="reduce-overhead", dynamic=False)
    return form


def synchronise() -> None:
    """Wait for PyTorch's stream."""
    import torch

    torch.cuda.synchronize()


def step_weights(bundle: Bundle) -> dict[str, Any]:
    """The step graph's weights, mapped, under the transformer's names."""
    import onnx
    from onnx import helper

    graph = bundle.file(graphs_of(bundle, Form.MODERN)[0].file)
    tensors = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.name.startswith("transformer.") and where:
            tensors[tensor.name.removeprefix("transformer.")] = np.memmap(
                bundle.path / where["location"],
                helper.tensor_dtype_to_np_dtype(tensor.data_type),
                "r",
                int(where["offset"]),
                tuple(tensor.dims),
            )
    return tensors


if __name__ == "__main__":
    main()
