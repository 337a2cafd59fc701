"""``diagd verify``: are the engine's tokens and logits those of a plain reference on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from rich.console import Console
from rich.text import Text

from diagd.bundle import Bundle
from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.engines.backend import CHOICES
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.options import SEED, File, Numbers, checked, flag, positional, setting
from diagd.profiling import verify
from diagd.profiling.measure import Workload, random_workload
from diagd.profiling.plan import orders_of, split_orders
from diagd.profiling.report import Skipped
from diagd.profiling.verify import Candidate
from diagd.progress import Progress
from diagd.runtime.clip import read_prompt, read_tokens
from diagd.runtime.pixels import PixelCodec

EXAMPLES = """examples:
  diagd verify crafter-3m.diagd
  diagd verify crafter-3m.diagd --engine prefix --k 1,2,3 --frames 2 --json
  diagd verify crafter-3m.diagd --prompt first.png
  diagd verify small-fp16.diagd --reference small-fp32.diagd
  diagd verify mineworld-300m.diagd --engine tensorrt --tensors

Greedy decoding: the reference sees the tokens that the engine chose and says at every cell which one it would
have taken. Exit code 1 where an engine fails its gate: all tokens for FP32, 98 % for FP16, 95 % for bfloat16,
90 % for quantised weights, which lose more on random prompts than on real ones. --tensors says in which layer
a difference begins: every output of one step of a modern or portable graph, against the same graph on ONNX
Runtime with its optimiser off.

The second table is of the bundle's own sampling: the share of each decoder's cells that next-token prediction
draws with the same seed behind the same tokens. Flips are draws that depend on how wide a pass is; where
there are none, jacobi is exact.
"""


@checked
class VerifyOptions:
    """What is checked, against what, and on what."""

    bundle: File = positional("what to check")
    engine: str | None = flag(
        f"form of the step graph: prefix, modern or portable (default: all), or a backend: {CHOICES}", None
    )
    reference: File | None = flag("bundle with the FP32 prefix graph (default: itself)", None)
    prompt: File | None = flag("image, video or .npy tokens (default: random tokens)", None)
    k: Numbers = flag("row lags, each serial and chained", (1, 2))
    frames: int = flag("of each order", 5, ge=1, le=1_000_000)
    tensors: bool = flag("compare every output of one step as well", False)
    json: bool = flag("machine-readable", False)
    window: int | None = setting("frames that a token may see (default: at most 4)", None, ge=2)
    prompt_frames: int = setting("frames known ahead", 1, ge=1, le=1_000_000)
    seed: int = setting("of the random prompt", 0, **SEED)
    threads: int = setting("CPU threads of the engine, 0 for one a core", 0, ge=0)


@dataclass
class _Found:
    """What was found of all engines."""

    verdicts: list[verify.Verdict] = field(default_factory=list)
    exactness: list[verify.Exactness] = field(default_factory=list)
    tensors: list[verify.TensorVerdict] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def run(options: VerifyOptions) -> int:
    """Print a verdict for each engine and order; exit code 1 where one failed."""
    bundle, console, found = Bundle.open(options.bundle), terminal.console(stderr=options.json), _Found()
    reference = Bundle.open(options.reference) if options.reference else bundle
    for name in ("layout", "vocabulary", "output_vocabulary", "context"):
        if getattr(bundle.manifest, name) != getattr(reference.manifest, name):
            raise UsageError(f"--reference {reference.path}: its {name} differs; give the same model in FP32")
    window = options.window or min(bundle.manifest.context.frames, 4)
    for candidate in verify.candidates(bundle, options.engine, window, CpuOptions(options.threads)):
        with candidate.session:
            _examine(options, candidate, reference, found, Progress(console))
    if options.tensors and not found.tensors:
        console.print("nothing to compare by tensor: only modern and portable graphs run on several engines")
    if options.json:
        skipped = [entry.model_dump() for entry in found.skipped]
        terminal.print_json(asdict(found) | {"skipped": skipped})
    else:
        _print(console, found)
    passed = [one.passed for one in found.verdicts] + [one.passed for one in found.tensors]
    return 0 if all(passed) else 1


def _examine(
    options: VerifyOptions, candidate: Candidate, reference: Bundle, found: _Found, progress: Progress
) -> None:
    """Add what there is to say of an engine, and of the orders that it cannot decode."""
    session, name, workload = candidate.session, candidate.name, _workload(options, candidate)
    wanted = orders_of(session.layout, options.k, session.manifest.schedule.row_seed)
    orders, late = split_orders(wanted, session, workload, options.frames)
    found.skipped += [entry.model_copy(update={"order": f"{name}, {entry.order}"}) for entry in late]
    with verify.open_reference(reference, session) as plain:
        found.verdicts += [
            verify.verify(session, plain, name, candidate.precision, order, workload, options.frames)
            for order in progress.each(orders, name)
        ]
    with progress.task(f"{name}, auditing"):
        audited = verify.exactness(session, name, orders, workload, options.frames, options.seed)
        found.exactness.append(audited)
    found.tensors += candidate.tensors() if options.tensors else []


def _workload(options: VerifyOptions, candidate: Candidate) -> Workload:
    workload = random_workload(candidate.session, options.prompt_frames, options.frames, options.seed)
    if (path := options.prompt) is None:
        return workload
    if path.suffix.lower() == ".npy":
        tokens = read_tokens(path, candidate.bundle.manifest)[-options.prompt_frames :]
    else:
        pixels = PixelCodec(candidate.bundle, CpuOptions(options.threads))
        tokens = read_prompt(path, pixels, options.prompt_frames, resize=True)
    return replace(workload, prompt=tokens)


def _print(console: Console, found: _Found) -> None:
    heads, rows = ("engine", "order", "cells", "differs at", "agreement", "error", ""), []
    for verdict in found.verdicts:
        first = verdict.first_difference
        where = "nowhere" if first is None else f"({first.frame}, {first.row}, {first.column})"
        share, error = f"{100 * verdict.agreement:.2f} %", f"{verdict.error:.1e}"
        cells, mark = str(verdict.cells), _mark(verdict.passed)
        rows.append((verdict.engine, verdict.order, cells, where, share, error, mark))
    terminal.print_table(console, heads, rows, whole=range(len(heads)))
    shares = (
        (one.engine, f"{100 * one.flips:.3g} %", *(f"{100 * share:.2f} %" for share in one.shares.values()))
        for one in found.exactness
    )
    of_shares = ("engine", "flips", *found.exactness[0].shares)
    terminal.print_table(console, of_shares, shares, "cells that are next-token prediction's")
    for entry in found.skipped:
        console.print(f"{entry.order} was skipped: {entry.reason}", highlight=False)
    if found.tensors:
        errors = ((one.engine, one.tensor, f"{one.error:.1e}", _mark(one.passed)) for one in found.tensors)
        of_errors = ("engine", "tensor", "greatest error", "")
        terminal.print_table(console, of_errors, errors, "outputs of one step")


def _mark(passed: bool) -> Text:
    return terminal.styled("ok", "green") if passed else terminal.styled("failed", "red")


VERB = Verb(VerifyOptions, run, EXAMPLES, prints=True)
