"""``diagd plan``: memory and speed of a model on a device, before anything is done."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from diagd.bundle import Bundle, read_manifest
from diagd.bundle.manifest import sliding_context
from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.errors import UsageError, unknown
from diagd.export.families import find
from diagd.options import checked, flag, positional, setting
from diagd.profiling import cost
from diagd.profiling.cost import Device, ModelSize
from diagd.profiling.doctor import check_fastest, this_device
from diagd.profiling.plan import Plan, Planned, drafting, make_plan, most_sessions

EXAMPLES = """examples:
  diagd plan mineworld-300m --device orin-agx
  diagd plan crafter-3m.diagd --device this --json
  diagd plan mineworld-1200m --device rtx4090 --precision int8 --set window=8
  diagd plan mineworld-1200m --device rtx4090 --set drafter=mineworld-300m
  diagd plan mineworld-300m --device h200 --precision int8 --set fps=8
  diagd plan wham-1.6b --device orin-nano --precision int4-weight --kv-cache int8

Only dimensions and file headers are read. Frames a second are upper bounds: what memory and arithmetic of the
device allow, pixels not included; good engines reach about two thirds of them.
"""


@checked
class PlanOptions:
    """Which model is planned, and for what."""

    model: str = positional("name of a model, or a bundle")
    device: str = flag(f"{', '.join(cost.DEVICES)} or {cost.THIS} (default)", cost.THIS)
    how: Planned = Planned()
    checkpoint: str | None = flag("file or folder; only its header is read", None)
    json: bool = flag("machine-readable", False)
    fps: float | None = setting("frames a second of each session: how many a device plays", None, gt=0)
    drafter: str | None = setting("name of a model, or a bundle: can drafting with it pay", None)
    guess: float = setting("chance that a guess of Jacobi decoding comes out right", 0.93, gt=0, lt=1)


def run(options: PlanOptions) -> int:
    """Print the plan; exit code 1 where the model does not fit."""
    device = _device(options.device)
    model = _model(options.model, options.checkpoint)
    plan = make_plan(model, device, options.how)
    stored = _stored(options.model, options.how.clip)
    drafted = None
    if options.drafter is not None:
        precision = cost.precisions(plan.kv_cache)[plan.precision]
        drafted = drafting(model, _model(options.drafter, None), device, precision, options.guess)
    most = None if options.fps is None else most_sessions(plan, options.fps)
    if options.json:
        content = asdict(plan) | {"fits": plan.fits, "builds": plan.builds, "running": plan.memory.running}
        content |= {"stored": stored} | ({} if most is None else {"most_sessions": most})
        if drafted is not None:
            content |= {"drafting": asdict(drafted) | {"least_kept": drafted.least_kept}}
        terminal.print_json(content)
    else:
        console = terminal.console()
        _print(console, plan)
        if most is not None:
            console.print(
                f"{most} sessions at {options.fps:g} frames a second each, decoded frame by frame, where the "
                "engine reaches two thirds of what its device allows"
            )
        _print_stored(console, stored)
        if drafted is not None:
            console.print(drafted.verdict, highlight=False, soft_wrap=True)
        if options.device == cost.THIS and Path(options.model).is_dir():
            fastest = check_fastest(Bundle.open(options.model))
            console.print(f"fastest here: {fastest.found} ({fastest.fix})", highlight=False, soft_wrap=True)
    return 0 if plan.fits else 1


def _device(name: str) -> Device:
    if name == cost.THIS:
        return this_device()
    if name not in cost.DEVICES:
        raise unknown("device", name, [*cost.DEVICES, cost.THIS])
    return cost.DEVICES[name]


def _model(name: str, checkpoint: str | None) -> ModelSize:
    """Dimensions of a bundle, or of a model by name; a checkpoint's header is checked against them."""
    if Path(name).is_dir():
        if checkpoint is not None:
            raise UsageError(f"--checkpoint {checkpoint}: a bundle says itself what it holds; leave it out")
        return cost.read_model(_bundle(name)).size
    if checkpoint is not None and checkpoint.startswith("hf:"):
        raise UsageError(
            f"--checkpoint {checkpoint}: a plan reads files that are here; leave the option out to plan by "
            "the published dimensions, or give the path of your own copy"
        )
    family = find(name, checkpoint)
    if checkpoint is not None:
        from diagd.export.checkpoints import check, open_checkpoint, select

        check(select(open_checkpoint(checkpoint), family.rename), family.expected)
    config, tokenizer = family.transformer, family.tokenizer
    return cost.size_of(
        name,
        config,
        sliding_context(config),
        tokenizer=tokenizer.parameter_count() if tokenizer else 0,
        pixel_frames=tokenizer.temporal_factor if tokenizer else 1,
    )


def _bundle(path: str) -> Bundle:
    """A bundle whose files are not looked at."""
    return Bundle(Path(path), read_manifest(Path(path)))


def _stored(path: str, clip: int) -> dict[str, dict[str, float]]:
    """Bytes that a pass reads of every step graph that a bundle has; none for a model by name."""
    if not Path(path).is_dir():
        return {}
    bytes_read, bundle = {}, _bundle(path)
    for graph in bundle.manifest.graphs:
        model = cost.read_model(bundle.at_precision(graph.precision), graph.form)
        cache = model.step_bytes(cost.live_tokens(model.size, clip)) - model.streamed_bytes
        name = f"{graph.form.value} {graph.precision}"
        bytes_read[name] = {"weights": float(model.streamed_bytes), "cache": cache}
    return bytes_read


def _print(console: Console, plan: Plan) -> None:
    device, memory = plan.device, plan.memory
    sizes = {name: size for name, size in asdict(memory).items() if name != "build_peak"}
    rows: list[tuple[str | Text, ...]] = [(name, f"{size / 1e6:,.1f}") for name, size in sizes.items()]
    running = "while it runs", f"{memory.running / 1e6:,.1f}"
    rows.append(tuple(terminal.styled(cell, "bold") for cell in running))
    rows.append(("while its engine is built", f"{memory.build_peak / 1e6:,.1f}"))
    kv_cache = f", K/V in {plan.kv_cache}" if plan.kv_cache else ""
    title = f"{plan.model.name} {plan.precision}{kv_cache}, {plan.window} frames"
    terminal.print_table(console, ("memory", "MB"), rows, title)
    _print_ceilings(console, plan)
    verdict = terminal.styled("fits", "green") if plan.fits else terminal.styled("does not fit", "red")
    console.print(
        verdict,
        f"{device.title}: {memory.running / cost.GB:.2f} of {device.usable / cost.GB:.2f} GB",
        soft_wrap=True,
    )
    for line in plan.advice:
        console.print(f"  {line}")
    console.print(f"{device.title}: {device.source}", style="dim")


def _print_stored(console: Console, stored: dict[str, dict[str, float]]) -> None:
    if not stored:
        return
    sizes = {name: (one["weights"], one["cache"], sum(one.values())) for name, one in stored.items()}
    rows = ((name, *(_short(size / 1e6) for size in each)) for name, each in sizes.items())
    heads = ("step graph", "weights", "K/V", "together")
    terminal.print_table(console, heads, rows, "MB a pass of what this bundle holds")


def _short(value: float) -> str:
    """Four digits, without an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _print_ceilings(console: Console, plan: Plan) -> None:
    title = f"frames a second at most: {plan.device.title}, {plan.device.bandwidth / 1e9:,.4g} GB/s"
    names = dict.fromkeys(row.precision for row in plan.ceilings)
    lines = []
    for order in dict.fromkeys(row.order for row in plan.ceilings):
        rows = [row for row in plan.ceilings if row.order == order]
        rates = [f"{_short(row.frames_per_second)}{'' if row.bound == 'memory' else ' *'}" for row in rows]
        lines.append((order, f"{rows[0].passes:g}", *rates))
    read = {row.precision: _short(row.bytes / 1e6) for row in plan.ceilings}
    lines.append(("MB a pass", "", *read.values()))
    terminal.print_table(console, ("order", "passes a frame", *names), lines, title)
    if any(row.bound != "memory" for row in plan.ceilings):
        console.print("* bound by arithmetic, not by memory", style="dim")


VERB = Verb(PlanOptions, run, EXAMPLES, prints=True)
