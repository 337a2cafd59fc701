"""``diagd export``: a checkpoint to a bundle."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from diagd.bundle.targets import bundle_target
from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.errors import UsageError, require
from diagd.export.options import GraphOptions
from diagd.options import SEED, SIZE, File, checked, flag, setting
from diagd.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from diagd.export.exporter import Exporter, Sources
    from diagd.export.families import Family

EXAMPLES = """examples:
  diagd-export --model crafter-3m
  diagd-export --model mineworld-300m --random-weights --output mineworld.diagd
  diagd-export --model mineworld-300m --checkpoint 300M_16f.ckpt --set tokenizer=vae/vae.ckpt
"""


@checked
class ExportOptions:
    """What to export, and where to."""

    model: str = flag("name of the model; `diagd models` lists them")
    checkpoint: str | None = flag("file, folder or hf://org/name[@revision]", None)
    random_weights: bool = flag("no checkpoint: measure latency only", False)
    seed: int = flag("of random weights (default 0)", 0, **SEED)
    output: File | None = flag("bundle to write (default MODEL.diagd)", None)
    dry_run: bool = flag("print files, sizes and memory; write nothing", False)
    tokenizer: str | None = setting("checkpoint of the video tokenizer, or 'none'", None)
    size: Annotated[tuple[int, int] | None, SIZE] = setting(
        "height and width of the pictures of a Cosmos model that was post-trained at another, "
        "such as 384x640 or 640x848",
        None,
    )
    graphs: GraphOptions = GraphOptions()

    def __post_init__(self) -> None:
        tokenizer = None if self.tokenizer == "none" else self.tokenizer
        for told, given in (("--checkpoint ", self.checkpoint), ("--set tokenizer=", tokenizer)):
            if given is not None and self.random_weights:
                raise UsageError(f"{told}{given} and --random-weights: weights come from one of them")

    def sources(self, family: Family) -> Sources:
        """Where the weights come from."""
        from diagd.export.exporter import open_sources, random_sources

        if self.random_weights:
            return random_sources(family, self.seed)
        return open_sources(family, self.checkpoint, self.tokenizer)


def run(options: ExportOptions) -> None:
    """Export, or say what would be written."""
    output = bundle_target(options.output or Path(f"{options.model}.diagd"))
    require("torch", extra="export", purpose="export a model")

    from diagd.export.exporter import Exporter, export
    from diagd.export.families import find
    from diagd.export.weights import is_resumable

    console = terminal.console()
    pixels = options.tokenizer != "none"
    family = find(options.model, options.checkpoint, options.size, options.tokenizer if pixels else None)
    if not pixels:
        family = replace(family, tokenizer=None)
    if options.dry_run:
        exporter = Exporter(family, options.graphs)
        _check_local(exporter, options)
        _print_plan(console, exporter, output)
        return
    try:
        began = time.perf_counter()
        made = export(family, options.graphs, options.sources(family), output, Progress(console))
    except KeyboardInterrupt:
        if is_resumable(output):
            console.print("the weights so far are kept: the same command goes on where this one stopped")
        raise
    seconds = time.perf_counter() - began
    console.print(f"exported {options.model} in {seconds:.1f} s: {made.size / 1e6:,.1f} MB at {made.path}")


def _check_local(exporter: Exporter, options: ExportOptions) -> None:
    """Raise CheckpointError where files that were given do not fit; nothing is downloaded."""
    from diagd.export.exporter import open_sources

    family, checkpoint = exporter.family, options.checkpoint
    if (options.tokenizer or family.default_tokenizer or "").startswith("hf:"):
        family = replace(family, tokenizer=None)
    if checkpoint is not None and not checkpoint.startswith("hf:"):
        exporter.check(open_sources(family, checkpoint, options.tokenizer))


def _print_plan(console: Console, exporter: Exporter, output: Path) -> None:
    plan = exporter.plan()
    sizes = {**plan.files, "total": plan.total_bytes}
    rows = ((name, f"{size / 1e6:,.2f}") for name, size in sizes.items())
    terminal.print_table(console, ("file", "MB"), rows, f"{output} (nothing was written)")
    console.print(f"peak memory of the export: about {plan.peak_bytes / 1e9:.1f} GB")


VERB = Verb(ExportOptions, run, EXAMPLES)
