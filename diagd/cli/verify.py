"""``diagd verify``: are the engine's tokens and logits those of a plain reference on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic.dataclasses import dataclass

from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.engines.backend import CHOICES
from diagd.errors import UsageError
from diagd.options import OPTIONS, File, Numbers, flag, positional, setting
from diagd.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from diagd.bundle import Bundle
    from diagd.engines.engine import Int
    from diagd.profiling.measure import Workload
    from diagd.profiling.report import Skipped
    from diagd.profiling.tensors import TensorVerdict
    from diagd.profiling.verify import Candidate, Exactness, Verdict
    from diagd.schedule import Schedule

EXAMPLES = """examples:
  diagd verify crafter-3m.diagd
  diagd verify crafter-3m.diagd --engine prefix --k 1,2,3 --frames 2 --json
  diagd verify crafter-3m.diagd --prompt first.png
  diagd verify small-fp16.diagd --reference small-fp32.diagd
  diagd verify mineworld-300m.diagd --engine tensorrt --tensors

Greedy decoding: the reference sees the tokens that the engine chose and says at every cell which one it would
have taken. Exit code 1 where an engine fails its gate: all tokens for FP32, 98 % for FP16, 90 % for quantised
weights, which lose more on random prompts than on real ones. --tensors says in which layer a difference
begins: every output of one step of a modern or portable graph, against the same graph on ONNX Runtime with
its optimiser off, by Polygraphy.

The second table is of the bundle's own sampling: the share of each decoder's cells that next-token prediction
draws with the same seed behind the same tokens. Flips are draws that depend on how wide a pass is; where
there are none, jacobi is exact.
"""


@dataclass(frozen=True, config=OPTIONS)
class VerifyOptions:
    """What is checked, against what, and on what."""

    bundle: File = positional("what to check")
    engine: str | None = flag(
        f"form of the step graph: prefix, modern or portable (default: all), or a backend: {CHOICES}", None
    )
    reference: File | None = flag("bundle with the FP32 prefix graph (default: itself)", None)
    prompt: File | None = flag("image, video or .npy tokens (default: random tokens)", None)
    k: Numbers = flag("row lags, each serial and chained", (1, 2))
    frames: int = flag("of each order", 5)
    tensors: bool = flag("compare every output of one step as well", False)
    json: bool = flag("machine-readable", False)
    window: int | None = setting("frames that a token may see (default: at most 4)", None, ge=2)
    prompt_frames: int = setting("frames known ahead", 1, ge=1)
    seed: int = setting("of the random prompt", 0)
    threads: int = setting("CPU threads of the engine, 0 for one a core", 0, ge=0)


def run(options: VerifyOptions) -> int:
    """Print a verdict for each engine and order; exit code 1 where one failed."""
    from diagd.bundle import Bundle

    if options.frames < 1:
        raise UsageError(f"--frames {options.frames}: decode at least one")
    bundle, console = Bundle.open(options.bundle), terminal.console(stderr=options.json)
    reference = Bundle.open(options.reference) if options.reference else bundle
    _check_same(bundle, reference)
    verdicts: list[Verdict] = []
    skipped: list[Skipped] = []
    tensors: list[TensorVerdict] = []
    exact: list[Exactness] = []
    for candidate in _candidates(options, bundle):
        with closing(candidate):
            orders, left_out = _orders(options, candidate)
            skipped += left_out
            verdicts += _verdicts(options, candidate, reference, orders, Progress(console))
            exact.append(_exactness(options, candidate, orders, Progress(console)))
            tensors += candidate.tensors() if options.tensors else []
    if options.tensors and not tensors:
        console.print("nothing to compare by tensor: only modern and portable graphs run on several engines")
    if options.json:
        found = {
            "verdicts": [asdict(verdict) for verdict in verdicts],
            "exactness": [asdict(entry) for entry in exact],
            "tensors": [asdict(verdict) for verdict in tensors],
            "skipped": [entry.model_dump() for entry in skipped],
        }
        terminal.print_json(found)
    else:
        _print(console, verdicts)
        _print_exactness(console, exact)
        for entry in skipped:
            console.print(f"{entry.order} was skipped: {entry.reason}", highlight=False)
        _print_tensors(console, tensors)
    passed = [verdict.passed for verdict in verdicts] + [verdict.passed for verdict in tensors]
    return 0 if all(passed) else 1


def _orders(options: VerifyOptions, candidate: Candidate) -> tuple[list[Schedule], list[Skipped]]:
    """Orders that the engine can decode, and the others with the reason."""
    from diagd.profiling.orders import decoding_orders, split_orders

    session = candidate.session
    orders = decoding_orders(session.manifest, options.k)
    possible, late = split_orders(orders, session, options.prompt_frames + options.frames)
    return possible, [
        entry.model_copy(update={"order": f"{candidate.name}, {entry.order}"}) for entry in late
    ]


def _verdicts(
    options: VerifyOptions,
    candidate: Candidate,
    reference: Bundle,
    orders: list[Schedule],
    progress: Progress,
) -> Iterator[Verdict]:
    from diagd.profiling.verify import open_reference, verify

    session, name = candidate.session, candidate.name
    workload = _workload(options, candidate)
    with open_reference(reference, session) as plain:
        for order in progress.each(orders, name):
            yield verify(session, plain, name, candidate.precision, order, workload, options.frames)


def _exactness(
    options: VerifyOptions, candidate: Candidate, orders: list[Schedule], progress: Progress
) -> Exactness:
    from diagd.profiling.verify import exactness

    workload, session = _workload(options, candidate), candidate.session
    with progress.task(f"{candidate.name}, auditing"):
        return exactness(session, candidate.name, orders, workload, options.frames, options.seed)


def _workload(options: VerifyOptions, candidate: Candidate) -> Workload:
    from diagd.profiling.measure import random_workload

    workload = random_workload(candidate.session, options.prompt_frames, options.frames, options.seed)
    if options.prompt is None:
        return workload
    return replace(workload, prompt=_read_prompt(options.prompt, candidate.bundle, options))


def _candidates(options: VerifyOptions, bundle: Bundle) -> Iterator[Candidate]:
    """Every precision and form of the bundle, or those of one engine; each is opened when it is its turn."""
    from diagd.engines.onnxruntime_session import CpuOptions
    from diagd.profiling.verify import candidates

    window = options.window or min(bundle.manifest.context.frames, 4)
    return candidates(bundle, options.engine, window, CpuOptions(options.threads))


def _read_prompt(path: Path, bundle: Bundle, options: VerifyOptions) -> Int:
    """Tokens [prompt, h, w] of a file, its last frames."""
    from diagd.engines.onnxruntime_session import CpuOptions
    from diagd.runtime.clip import read_prompt, read_tokens
    from diagd.runtime.pixels import PixelCodec

    if path.suffix.lower() == ".npy":
        return read_tokens(path, bundle.manifest)[-options.prompt_frames :]
    pixels = PixelCodec(bundle, CpuOptions(options.threads))
    return read_prompt(path, pixels, options.prompt_frames, resize=True)


def _check_same(bundle: Bundle, reference: Bundle) -> None:
    """Refuse a reference that is another model."""
    for field in ("layout", "vocabulary", "output_vocabulary", "context"):
        mine, other = (getattr(b.manifest, field) for b in (bundle, reference))
        if mine != other:
            raise UsageError(
                f"--reference {reference.path}: its {field} differs; give the same model in FP32"
            )


def _print(console: Console, verdicts: list[Verdict]) -> None:
    heads, rows = ("engine", "order", "cells", "differs at", "agreement", "error", ""), []
    for verdict in verdicts:
        first = verdict.first_difference
        where = "nowhere" if first is None else f"({first.frame}, {first.row}, {first.column})"
        share, error = f"{100 * verdict.agreement:.2f} %", f"{verdict.error:.1e}"
        cells, mark = str(verdict.cells), _mark(verdict.passed)
        rows.append((verdict.engine, verdict.order, cells, where, share, error, mark))
    terminal.print_table(console, heads, rows, whole=range(len(heads)))


def _print_exactness(console: Console, exact: list[Exactness]) -> None:
    rows = (
        (
            entry.engine,
            f"{100 * entry.flips:.3g} %",
            *(f"{100 * share:.2f} %" for share in entry.shares.values()),
        )
        for entry in exact
    )
    heads = ("engine", "flips", *exact[0].shares)
    terminal.print_table(console, heads, rows, "cells that are next-token prediction's")


def _mark(passed: bool) -> Text:
    return terminal.styled("ok", "green") if passed else terminal.styled("failed", "red")


def _print_tensors(console: Console, verdicts: list[TensorVerdict]) -> None:
    if not verdicts:
        return
    rows = ((one.engine, one.tensor, f"{one.error:.1e}", _mark(one.passed)) for one in verdicts)
    terminal.print_table(console, ("engine", "tensor", "greatest error", ""), rows, "outputs of one step")


VERB = Verb(VerifyOptions, run, EXAMPLES, prints=True)
