"""The likelihood of recorded clips, against the released network in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import diagd
from diagd.runtime.clip import Clip
from diagd.runtime.decoders import ForcedDecoder, RasterDecoder
from diagd.schedule import Schedule
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
