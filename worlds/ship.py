"""Makes the world that comes with diagd ready to be played: ``python -m worlds.ship crafter-3m``.

Exports the shipped model, quantises it behind the gate, keeps one step graph and the weights it reads, and
adds pictures of recorded games to start from. The result is part of the package, which plays it without the
exporter.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console

from diagd.bundle import Bundle, Form, Manifest, atomic_bundle, seal
from diagd.calibration.options import CalibrationOptions
from diagd.calibration.quantise import calibrate
from diagd.cluster import ClusterOptions
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import QualityError
from diagd.export.exporter import export, open_sources
from diagd.export.families import find
from diagd.export.families.world import SHIPPED
from diagd.export.options import GraphOptions
from diagd.runtime.pixels import PixelCodec, Pixels
from diagd.tuning.recordings import load_episode
from diagd.web.folder import save_trimmed
from worlds.collect import collect
from worlds.folder import save_prompts
from worlds.options import CollectOptions

PRECISION = "int8-dynamic"
"""The scheme with the smallest error that takes a byte a weight."""

MAX_BYTES = 6_000_000
GAMES, MOVES, FIRST_SEED = 12, 40, 4_000_000
GRAPH, WEIGHTS = "step.onnx", "weights.bin"


def recorded(folder: Path) -> list[Pixels]:
    """Frames uint8 [T, height, width, 3] of games."""
    one = ClusterOptions(workers=1)
    options = CollectOptions(folder, episodes=GAMES, steps=MOVES, seed=FIRST_SEED, who=one)
    return [load_episode(path).frames for path in sorted(collect(options))]


def reduced(bundle: Bundle, folder: Path) -> Manifest:
    """Copy what a device needs of a bundle: the step graph, the tensors it reads, the pixel graphs."""
    manifest = bundle.at_precision(PRECISION).manifest
    graph, tokenizer = manifest.graph(Form.PREFIX), manifest.tokenizer
    assert tokenizer is not None
    save_trimmed(bundle.file(graph.file), folder / GRAPH, WEIGHTS)
    for name in {tokenizer.encoder, tokenizer.decoder, *tokenizer.weight_files}:
        (folder / name).write_bytes(bundle.file(name).read_bytes())
    weights = graph.weights.model_copy(update={"files": (WEIGHTS,)})
    kept = graph.model_copy(update={"file": GRAPH, "weights": weights})
    return manifest.model_copy(update={"graphs": (kept,)})


def ship(name: str, console: Console) -> Path:
    """Write the ready world of a shipped model.

    Raises:
        QualityError: it does not pass the gate, or is too large.
    """
    target = SHIPPED / name / "ready"
    with tempfile.TemporaryDirectory() as work:
        games, family = recorded(Path(work) / "games"), find(name)
        made = export(family, GraphOptions(), open_sources(family, None, None), Path(work) / "a.diagd").path
        codec = PixelCodec(Bundle.open(made), CpuOptions())
        calibrate(Bundle.open(made), CalibrationOptions(PRECISION), codec.encode(np.concatenate(games)))
        with atomic_bundle(target) as folder:
            save_prompts(folder, (frames[-1] for frames in games))
            seal(folder, reduced(Bundle.open(made), folder))
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    if size > MAX_BYTES:
        raise QualityError(f"{target} has {size} bytes, at most {MAX_BYTES} are shipped")
    console.print(f"{target}: {size / 1e6:.2f} MB")
    return target


if __name__ == "__main__":
    ship(sys.argv[1], Console(soft_wrap=True))
