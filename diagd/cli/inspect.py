"""``diagd inspect``: what a bundle or an ONNX file holds, and what its schedule does."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from diagd.bundle import Bundle, Manifest
from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.errors import UsageError, pip_line
from diagd.export.onnx_file import OnnxFile, read_onnx
from diagd.options import File, checked, flag, positional
from diagd.schedule import NO_SINK, Block, Schedule, StreamLayout

EXAMPLES = """examples:
  diagd inspect crafter-3m.diagd
  diagd inspect crafter-3m.diagd --order k=2,chained --steps 4
  diagd inspect step.onnx --json

A step is printed as its fed tokens: the position of the token, @ the position it stands in for where it is a
row seed, > the cell its prediction fills.
"""

SHOWN_OPERATORS = 4

SHOWN_COLUMNS = 30
"""Grids up to so many columns are printed."""


@checked
class InspectOptions:
    """What is shown, of what."""

    path: File = positional("a bundle or an ONNX file")
    order: str | None = flag(
        "of the schedule shown, such as k=2,chained or 'next token' (default: the bundle's)", None
    )
    frames: int = flag("of the schedule shown", 3, ge=1, le=10_000)
    steps: int = flag("print so many steps of the table", 0, ge=0)
    json: bool = flag("machine-readable", False)


def run(options: InspectOptions) -> None:
    """Print the report; exit code 2 where the path is neither a bundle nor an ONNX file."""
    if options.path.is_file():
        if given := [name for name in ("order", "steps") if getattr(options, name)]:
            raise UsageError(f"--{given[0]} needs a bundle: an ONNX file has no schedule")
        graphs = {options.path.name: read_onnx(options.path)}
        if options.json:
            terminal.print_json({"graphs": _graphs_content(graphs)})
        else:
            _print_graphs(terminal.console(), graphs, {})
        return
    manifest = Bundle.seen(options.path).manifest
    files = [graph.file for graph in manifest.graphs]
    if manifest.tokenizer:
        files += [manifest.tokenizer.encoder, manifest.tokenizer.decoder]
    _report(options, manifest, {name: read_onnx(options.path / name) for name in files if find_spec("onnx")})


def _report(options: InspectOptions, manifest: Manifest, graphs: dict[str, OnnxFile]) -> None:
    schedule = manifest.schedule
    if options.order is not None:
        schedule = Schedule.parse(options.order, manifest.layout, schedule)
    table = schedule.table(1, options.frames, 0)
    cells, lines = steps_of_cells(table, schedule.layout), table_lines(table, options.steps)
    if options.json:
        content = {"manifest": manifest.model_dump(mode="json"), "graphs": _graphs_content(graphs)}
        told = {"order": schedule.name, "k": schedule.k, "d": schedule.d, "row_seed": schedule.row_seed.value}
        told |= {"steps_per_frame": schedule.steps_per_frame, "steps": 1 + int(cells.max())}
        told |= {"widths": table.widths.tolist(), "step_of_cell": cells.tolist(), "table": lines}
        terminal.print_json(content | {"schedule": told})
        return
    console = terminal.console()
    _print_manifest(console, manifest, options.path)
    _print_graphs(console, graphs, _uses(manifest))
    passes, widest = 1 + int(cells.max()), int(table.widths[1:].max(initial=1))
    console.print(
        f"schedule {schedule.name}: k={schedule.k} d={schedule.d} seeds={schedule.row_seed.value}\n"
        f"{passes} passes for {options.frames} frames: {cells.size / passes:.2f} times fewer than tokens\n"
        f"{schedule.steps_per_frame} from a frame's first cell to its last, up to {widest} rows a pass"
    )
    if schedule.layout.columns <= SHOWN_COLUMNS:
        console.print(f"the pass that decodes each cell of the first frame:\n{as_text(cells[0])}")
    for line in lines:
        console.print(line)


def _graphs_content(graphs: dict[str, OnnxFile]) -> dict[str, Any]:
    return {
        name: {
            "opset": graph.opset,
            "inputs": {value.name: [value.dtype, *value.shape] for value in graph.inputs},
            "outputs": {value.name: [value.dtype, *value.shape] for value in graph.outputs},
            "operators": dict(graph.operators.most_common()),
            "bytes": graph.bytes_by_dtype(),
        }
        for name, graph in graphs.items()
    }


def _print_manifest(console: Console, manifest: Manifest, path: Path) -> None:
    layout, cache, pixels = manifest.layout, manifest.cache, manifest.tokenizer
    rows = {
        "model": f"{manifest.name} ({manifest.family})",
        "grid": f"{layout.rows} x {layout.columns} cells, {layout.before} known tokens before, "
        f"{layout.after} after, {layout.prefix} ahead of all",
        "context": f"{manifest.context.frames} frames ({manifest.context.kind})",
        "vocabulary": f"{manifest.vocabulary} in, {manifest.output_vocabulary} out",
        "cache": f"{cache.layers} layers, {cache.kv_heads} heads of {cache.head_size}; bytes a token: "
        + ", ".join(_cache_bytes(manifest)),
        "tokenizer": f"{pixels.height} x {pixels.width} pixels, {pixels.temporal_factor} frames a latent one"
        if pixels
        else "none",
        "weights": ", ".join(filter(None, (manifest.provenance.source, manifest.provenance.tuned))),
        "licence": manifest.licence,
        "files": ", ".join(f"{name} {entry.bytes / 1e6:,.2f} MB" for name, entry in manifest.files.items()),
    }
    table = Table(show_header=False, title=str(path))
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _cache_bytes(manifest: Manifest) -> list[str]:
    """Bytes of K and V that one token takes, by the step graphs that keep them so."""
    cache = manifest.cache
    elements = 2 * cache.layers * cache.kv_heads * cache.head_size
    graphs: dict[np.dtype[np.generic], list[str]] = {}
    for graph in manifest.graphs:
        graphs.setdefault(manifest.cache_dtype(graph), []).append(f"{graph.form.value} {graph.precision}")
    return [
        f"{elements * kind.itemsize:,} ({kind}: {', '.join(dict.fromkeys(names))})"
        for kind, names in graphs.items()
    ]


def _uses(manifest: Manifest) -> dict[str, str]:
    """What each file of a step graph is for: form, precision, widths and slots."""
    uses = {}
    for file in dict.fromkeys(graph.file for graph in manifest.graphs):
        graphs = [graph for graph in manifest.graphs if graph.file == file]
        widths = "/".join(str(graph.width) for graph in graphs if graph.width)
        fixed = f"\nwidth {widths}, {graphs[0].capacity} slots" if widths else ""
        read = graphs[0].weights
        step = f"\nstreamed by a step {read.streamed / 1e6:,.3f} MB, looked up {read.looked_up / 1e6:,.3f} MB"
        uses[file] = f"{graphs[0].form.value} {graphs[0].precision}{fixed}{step}"
    return uses


def _print_graphs(console: Console, graphs: dict[str, OnnxFile], uses: dict[str, str]) -> None:
    table = Table("graph", "constants", "operators", title="graphs", show_lines=True)
    for name, graph in graphs.items():
        common = graph.operators.most_common()
        operators = ", ".join(f"{kind} {count}" for kind, count in common[:SHOWN_OPERATORS])
        more = f" and {len(common) - SHOWN_OPERATORS} kinds more" if len(common) > SHOWN_OPERATORS else ""
        sizes = graph.bytes_by_dtype().items()
        shown = [f"{dtype} {size / 1e6:,.3f} MB" for dtype, size in sizes if size >= 500]
        title = f"{name}\n{uses[name]}" if name in uses else name
        table.add_row(
            f"{title}\nopset {graph.opset}", "\n".join(shown), f"{graph.operators.total()}: {operators}{more}"
        )
    for name in uses.keys() - graphs.keys():
        table.add_row(f"{name}\n{uses[name]}", "", f"{pip_line('export')} to see them")
    console.print(table)
    for name, graph in graphs.items():
        for kind, values in (("in ", graph.inputs), ("out", graph.outputs)):
            shown = [f"{v.name} {v.dtype}{list(v.shape)}".replace("'", "") for v in values]
            more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
            console.print(f"{name} {kind}: {', '.join(shown[:8])}{more}")


def steps_of_cells(table: Block, layout: StreamLayout) -> NDArray[np.int64]:
    """The step of every cell [frames, rows, columns] that a table behind one known frame decodes."""
    step_of_row = np.repeat(np.arange(table.steps), table.widths)
    decoded = table.sinks != NO_SINK
    frame, cell = np.divmod(table.sinks[decoded] - layout.first_cell(1), layout.frame_length)
    steps = np.full((1 + frame.max(), layout.cells), -1)
    steps[frame, cell] = step_of_row[decoded]
    return steps.reshape(-1, layout.rows, layout.columns)


def as_text(steps: NDArray[np.int64]) -> str:
    """The step of each cell of a frame [rows, columns], a line for each row."""
    size = len(str(steps.max()))
    return "\n".join(" ".join(f"{step:{size}d}" for step in row) for row in steps)


def table_lines(table: Block, count: int) -> list[str]:
    """The first steps of a table in words: width, cells decoded, seeds, and positions that are only fed."""
    lines = []
    for index in range(min(count, table.steps)):
        step = table.step(index)
        decoded, seeds = (step.sinks != NO_SINK).sum(), (step.sources != step.positions).sum()
        rows = ", ".join(
            f"{source}" + (f"@{position}" if source != position else "") + (f">{sink}" if sink >= 0 else "")
            for source, position, sink in zip(step.sources, step.positions, step.sinks, strict=True)
        )
        shown = rows if len(rows) <= 200 else f"{rows[:197]}..."
        lines.append(f"step {index}: {step.width} rows, {decoded} cells, {seeds} seeds: {shown}")
    return lines


VERB = Verb(InspectOptions, run, EXAMPLES, prints=True)
