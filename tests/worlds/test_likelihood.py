"""The likelihood of recorded clips, against the released network in NumPy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import diagd
from diagd.cli.main import main
from diagd.export.exporter import export, random_sources
from diagd.export.families import cosmos
from diagd.export.families.cosmos import CosmosDvConfig
from diagd.export.options import GraphOptions
from diagd.runtime.clip import Clip
from diagd.runtime.decoders import ForcedDecoder, RasterDecoder
from diagd.runtime.video import VideoWriter
from diagd.schedule import Schedule, StreamLayout
from tests.export.test_families_cosmos import CODES, TEXT, small
from tests.runtime.test_acting import GRID, WINDOW, wham_case
from worlds.likelihood import clip_likelihood


def test_likelihood_is_that_of_the_network(tmp_path: Path) -> None:
    """Over the ids that a cell may have: a frame's first one is not id 0."""
    case, random = wham_case(tmp_path), np.random.default_rng(2)
    manifest = case.bundle.manifest
    layout, codec = manifest.layout, manifest.actions
    assert codec is not None
    tokens = random.integers(1, 24, (WINDOW, *GRID)).astype(np.int32)
    led = np.array([[random.choice(slot.ids) for slot in codec.slots] for _ in tokens], np.int32)
    stream = np.concatenate([np.append(a, f.ravel()) for a, f in zip(led, tokens, strict=True)])[layout.gap :]
    expected, ranges = [], manifest.sampling.range_table(layout)
    for frame in (1, 2):
        for cell in range(layout.cells):
            position = layout.first_cell(frame) + cell
            low, high = ranges[cell]
            logits = case.logits(stream[:position], frame)[low:high]
            shares = np.exp(logits - logits.max())
            expected.append(-np.log(shares[stream[position] - low] / shares.sum()))
    clip = Clip(tokens, led)
    with diagd.load(case.bundle.path, threads=1) as session:
        raster = RasterDecoder(tokens[1:], session.engine.max_width)
        found = clip_likelihood(session, clip, 1, raster)
        one = clip_likelihood(session, clip, 1, ForcedDecoder(Schedule.next_token(layout), tokens[1:]))
        diagonal = clip_likelihood(session, clip, 1, ForcedDecoder(Schedule.serial(layout, 1), tokens[1:]))
    assert found == pytest.approx(np.mean(expected), rel=1e-4)
    assert one == pytest.approx(found, rel=1e-4)
    assert abs(diagonal - found) > 1e-3


def test_models_that_attend_to_text_are_told_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = CosmosDvConfig(
        height=16,
        width=32,
        stem_channels=4,
        channels=(4, 8),
        res_blocks=1,
        latent_channels=4,
        levels=(8, 5),
    )
    config = replace(small(text=True, yarn=False), layout=StreamLayout(2, 4, prefix_tokens=(CODES,)))
    family, clips = replace(cosmos.family("small", config), tokenizer=sizes), tmp_path / "clips"
    bundle = export(family, GraphOptions(), random_sources(family, 0), tmp_path / "small.diagd").path
    clips.mkdir()
    with VideoWriter(clips / "one.gif", 10, (32, 64)) as video:
        video.write(np.random.default_rng(0).integers(0, 256, (17, 32, 64, 3), dtype=np.uint8))
    command = ["eval", str(bundle), "--data", str(clips), "--set", "frames=1", "--order", "k=1,serial"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "--set resize=true" in capsys.readouterr().err
    command += ["--set", "resize=true"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "--set text=FILE" in capsys.readouterr().err
    assert main(["serve", str(bundle), "--sessions", "1", "--port", "0"]) == 2  # and nothing is served
    assert "--set text=FILE" in capsys.readouterr().err
    found = []
    for seed in (0, 1):
        np.save(tmp_path / "text.npy", np.random.default_rng(seed).normal(size=(TEXT.length, TEXT.width)))
        told = ["--output", str(tmp_path / f"{seed}"), "--set", f"text={tmp_path / 'text.npy'}"]
        assert main([*command, *told]) == 0
        found.append(json.loads((tmp_path / f"{seed}" / "eval.json").read_text())["figures"])
    assert found[0]["NLL next token"]["mean"] != found[1]["NLL next token"]["mean"]
    assert main([*command, *told, "--decoders", "jacobi"]) == 2
    assert "'decoders' has no effect" in capsys.readouterr().err
    assert main([*command, *told, "--set", "skip=2"]) == 2
    assert "'skip' has no effect" in capsys.readouterr().err
