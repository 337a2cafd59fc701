"""``diagd export``: a checkpoint to a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, field_validator

from diagd.bundle.targets import bundle_target
from diagd.cli import terminal
from diagd.cli.paths import path
from diagd.cli.settings import add_set_option, parse_settings
from diagd.errors import UsageError, require
from diagd.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from diagd.export.exporter import Exporter, GraphOptions, Sources
    from diagd.export.families.family import Family

EPILOG = """examples:
  diagd-export --model crafter-3m
  diagd-export --model mineworld-300m --random-weights --output mineworld.diagd
  diagd-export --model mineworld-300m --checkpoint 300M_16f.ckpt --set tokenizer=vae/vae.ckpt
"""


class ExportSettings(BaseModel):
    """Options behind ``--set``."""

    model_config = ConfigDict(extra="forbid")
    widths: tuple[int, ...] | None = Field(
        None,
        description="step widths of the GPU forms, as 16,64; a step takes the next wider one. Reading the "
        "weights bounds a step of 16 rows as it does one of 1, and each width costs memory and build time "
        "(default: 16 and what k=1 with chained frames feeds at once, 64 at least)",
    )
    window: int | None = Field(None, description="frames that fixed KV buffers hold (default: the context)")
    tokenizer: str | None = Field(None, description="checkpoint of the video tokenizer, or 'none'")

    @field_validator("widths", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(value.split(",")) if isinstance(value, str) else value


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.epilog = EPILOG
    parser.add_argument("--model", required=True, help="name of the model; `diagd models` lists them")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", help="file, folder or hf://org/name[@revision]")
    source.add_argument("--random-weights", action="store_true", help="no checkpoint: measure latency only")
    parser.add_argument("--seed", type=int, default=0, help="of random weights (default %(default)s)")
    parser.add_argument("--output", type=path, help="bundle to write (default MODEL.diagd)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16"), help="default %(default)s")
    parser.add_argument(
        "--form",
        help="prefix (CPU), modern (GPU, TensorRT 10.15 and later), portable (TensorRT 10.3 to 10.14), "
        "or several: prefix,modern (default: prefix for fp32, modern for fp16)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print files, sizes and memory; write nothing")
    add_set_option(parser, ExportSettings)


def run(args: argparse.Namespace) -> int:
    """Export, or say what would be written."""
    settings = parse_settings(ExportSettings, args.settings)
    if args.checkpoint is not None and not args.checkpoint.strip():
        raise UsageError("--checkpoint is empty (a variable that is not set?); give a file, folder or hf://")
    output = bundle_target(args.output or Path(f"{args.model}.diagd"))
    require("torch", extra="export", purpose="export a model")

    from diagd.export.exporter import Exporter, export
    from diagd.export.families.registry import find
    from diagd.export.resume import is_resumable

    console = terminal.console()
    family = find(args.model, args.checkpoint)
    options = _graph_options(args, settings)
    if args.dry_run:
        _print_plan(console, Exporter(family, options, settings.tokenizer != "none"), output)
        return 0
    try:
        result = export(family, options, _sources(args, settings, family), output, Progress(console))
    except KeyboardInterrupt:
        if is_resumable(output):
            console.print("the weights so far are kept: the same command goes on where this one stopped")
        raise
    size = result.bytes / 1e6
    console.print(f"exported {args.model} in {result.seconds:.1f} s: {size:,.1f} MB at {result.path}")
    return 0


def _graph_options(args: argparse.Namespace, settings: ExportSettings) -> GraphOptions:
    from diagd.bundle import Form
    from diagd.export.exporter import GraphOptions

    try:
        chosen = args.form or ("prefix" if args.precision == "fp32" else "modern")
        forms = tuple(Form(name) for name in chosen.split(","))
    except ValueError as error:
        raise UsageError(
            f"--form {args.form}: {error}; choose prefix, modern, portable or several: prefix,modern"
        ) from error
    return GraphOptions(forms, args.precision, settings.widths, settings.window)


def _sources(args: argparse.Namespace, settings: ExportSettings, family: Family) -> Sources:
    from dataclasses import replace

    from diagd.export.exporter import open_sources, random_sources

    pixels = settings.tokenizer != "none"
    if not args.random_weights:
        return open_sources(family, args.checkpoint, settings.tokenizer, pixels=pixels)
    sources = random_sources(family, args.seed)
    return sources if pixels else replace(sources, tokenizer=None)


def _print_plan(console: Console, exporter: Exporter, output: Path) -> None:
    from rich.table import Table

    plan = exporter.plan()
    table = Table("file", "MB", title=f"{output} (nothing was written)")
    for name, size in plan.files.items():
        table.add_row(name, f"{size / 1e6:,.2f}")
    table.add_row("total", f"{plan.total_bytes / 1e6:,.2f}")
    console.print(table)
    console.print(f"peak memory of the export: about {plan.peak_bytes / 1e9:.1f} GB")
