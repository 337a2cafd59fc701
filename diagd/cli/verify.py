"""``diagd verify``: are the engine's tokens and logits those of a plain reference on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from diagd.cli import terminal
from diagd.cli.lags import parse_lags
from diagd.cli.paths import path
from diagd.cli.settings import add_set_option, parse_settings
from diagd.errors import UsageError
from diagd.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from diagd.bundle import Bundle
    from diagd.engines.engine import Int
    from diagd.profiling.exactness import Exactness
    from diagd.profiling.measure import Workload
    from diagd.profiling.report import Skipped
    from diagd.profiling.tensors import TensorVerdict
    from diagd.profiling.verify import Candidate, Verdict
    from diagd.schedule import Schedule

EPILOG = """examples:
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


class VerifySettings(BaseModel):
    """Options behind ``--set``."""

    model_config = ConfigDict(extra="forbid")
    window: int | None = Field(None, ge=2, description="frames that a token may see (default: at most 4)")
    prompt: int = Field(1, ge=1, description="frames known ahead")
    seed: int = Field(0, description="of the random prompt")
    threads: int = Field(0, ge=0, description="CPU threads of the engine, 0 for one a core")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=path, help="what to check")
    parser.add_argument(
        "--engine",
        help="form of the step graph: prefix, modern or portable (default: all), or on a GPU cuda, tensorrt "
        "or tensorrt_rtx",
    )
    parser.add_argument("--reference", type=path, help="bundle with the FP32 prefix graph (default: itself)")
    parser.add_argument("--prompt", type=path, help="image, video or .npy tokens (default: random tokens)")
    parser.add_argument("--k", default="1,2", help="row lags, each serial and chained (default %(default)s)")
    parser.add_argument("--frames", type=int, default=5, help="of each order (default %(default)s)")
    parser.add_argument("--tensors", action="store_true", help="compare every output of one step as well")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    add_set_option(parser, VerifySettings)


def run(args: argparse.Namespace) -> int:
    """Print a verdict for each engine and order; exit code 1 where one failed."""
    from diagd.bundle import Bundle

    settings = parse_settings(VerifySettings, args.settings)
    if args.frames < 1:
        raise UsageError(f"--frames {args.frames}: decode at least one")
    bundle = Bundle.open(args.bundle)
    reference = Bundle.open(args.reference) if args.reference else bundle
    _check_same(bundle, reference)
    console = terminal.console(stderr=args.json)
    verdicts: list[Verdict] = []
    skipped: list[Skipped] = []
    tensors: list[TensorVerdict] = []
    exact: list[Exactness] = []
    for candidate in _candidates(args, settings, bundle):
        with closing(candidate):
            orders, left_out = _orders(args, settings, candidate)
            skipped += left_out
            verdicts += _verdicts(args, settings, candidate, reference, orders, Progress(console))
            exact.append(_exactness(args, settings, candidate, orders, Progress(console)))
            tensors += candidate.tensors() if args.tensors else []
    if args.tensors and not tensors:
        console.print("nothing to compare by tensor: only modern and portable graphs run on several engines")
    if args.json:
        found = {
            "verdicts": [asdict(verdict) for verdict in verdicts],
            "exactness": [asdict(entry) for entry in exact],
            "tensors": [asdict(verdict) for verdict in tensors],
            "skipped": [entry.model_dump() for entry in skipped],
        }
        print(json.dumps(found, indent=2))  # noqa: T201
    else:
        _print(console, verdicts)
        _print_exactness(console, exact)
        for entry in skipped:
            console.print(f"{entry.order} was skipped: {entry.reason}", highlight=False)
        _print_tensors(console, tensors)
    passed = [verdict.passed for verdict in verdicts] + [verdict.passed for verdict in tensors]
    return 0 if all(passed) else 1


def _orders(
    args: argparse.Namespace, settings: VerifySettings, candidate: Candidate
) -> tuple[list[Schedule], list[Skipped]]:
    """Orders that the engine can decode, and the others with the reason."""
    from diagd.profiling.orders import decoding_orders, split_orders

    session = candidate.session
    orders = decoding_orders(session.manifest, parse_lags(args.k))
    possible, late = split_orders(orders, session, settings.prompt + args.frames)
    return possible, [
        entry.model_copy(update={"order": f"{candidate.name}, {entry.order}"}) for entry in late
    ]


def _verdicts(
    args: argparse.Namespace,
    settings: VerifySettings,
    candidate: Candidate,
    reference: Bundle,
    orders: list[Schedule],
    progress: Progress,
) -> Iterator[Verdict]:
    from diagd.profiling.verify import open_reference, verify

    session, name = candidate.session, candidate.name
    workload = _workload(args, settings, candidate)
    with open_reference(reference, session) as plain:
        for order in progress.each(orders, name):
            yield verify(session, plain, name, candidate.precision, order, workload, args.frames)


def _exactness(
    args: argparse.Namespace,
    settings: VerifySettings,
    candidate: Candidate,
    orders: list[Schedule],
    progress: Progress,
) -> Exactness:
    from diagd.profiling.exactness import exactness

    workload, session = _workload(args, settings, candidate), candidate.session
    with progress.task(f"{candidate.name}, auditing"):
        return exactness(session, candidate.name, orders, workload, args.frames, settings.seed)


def _workload(args: argparse.Namespace, settings: VerifySettings, candidate: Candidate) -> Workload:
    from diagd.profiling.measure import random_workload

    workload = random_workload(candidate.session, settings.prompt, args.frames, settings.seed)
    if args.prompt is None:
        return workload
    return replace(workload, prompt=_read_prompt(args.prompt, candidate.bundle, settings))


def _candidates(args: argparse.Namespace, settings: VerifySettings, bundle: Bundle) -> Iterator[Candidate]:
    """Every precision and form of the bundle, or those of one engine; each is opened when it is its turn."""
    from diagd.engines.onnxruntime_session import CpuOptions
    from diagd.profiling.verify import candidates

    window = settings.window or min(bundle.manifest.context.frames, 4)
    return candidates(bundle, args.engine, window, CpuOptions(settings.threads))


def _read_prompt(path: Path, bundle: Bundle, settings: VerifySettings) -> Int:
    """Tokens [prompt, h, w] of a file, its last frames."""
    from diagd.engines.onnxruntime_session import CpuOptions
    from diagd.runtime.pixels import PixelCodec
    from diagd.runtime.prompt import read_prompt, read_tokens

    if path.suffix.lower() == ".npy":
        return read_tokens(path, bundle.manifest)[-settings.prompt :]
    return read_prompt(path, PixelCodec(bundle, CpuOptions(settings.threads)), settings.prompt, resize=True)


def _check_same(bundle: Bundle, reference: Bundle) -> None:
    """Refuse a reference that is another model."""
    for field in ("layout", "vocabulary", "output_vocabulary", "context"):
        mine, other = (getattr(b.manifest, field) for b in (bundle, reference))
        if mine != other:
            raise UsageError(
                f"--reference {reference.path}: its {field} differs; give the same model in FP32"
            )


def _print(console: Console, verdicts: list[Verdict]) -> None:
    from rich.table import Table

    table = Table("engine", "order", "cells", "differs at", "agreement", "error", "")
    for column in table.columns:
        column.no_wrap = True
    for verdict in verdicts:
        first = verdict.first_difference
        where = "nowhere" if first is None else f"({first.frame}, {first.row}, {first.column})"
        mark = _mark(verdict.passed)
        share = f"{100 * verdict.agreement:.2f} %"
        cells, error = str(verdict.cells), f"{verdict.error:.1e}"
        table.add_row(verdict.engine, verdict.order, cells, where, share, error, mark)
    console.print(table)


def _print_exactness(console: Console, exact: list[Exactness]) -> None:
    from rich.table import Table

    table = Table("engine", "flips", *exact[0].shares, title="cells that are next-token prediction's")
    for entry in exact:
        shares = (f"{100 * share:.2f} %" for share in entry.shares.values())
        table.add_row(entry.engine, f"{100 * entry.flips:.3g} %", *shares)
    console.print(table)


def _mark(passed: bool) -> Text:
    return terminal.styled("ok", "green") if passed else terminal.styled("failed", "red")


def _print_tensors(console: Console, verdicts: list[TensorVerdict]) -> None:
    from rich.table import Table

    if not verdicts:
        return
    table = Table("engine", "tensor", "greatest error", "", title="outputs of one step")
    for verdict in verdicts:
        mark = _mark(verdict.passed)
        table.add_row(verdict.engine, verdict.tensor, f"{verdict.error:.1e}", mark)
    console.print(table)
