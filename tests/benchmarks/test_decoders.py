"""The table of decoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.decoders import costs, decoders, flips, measure, table
from diagd.bundle import Bundle
from diagd.profiling.measure import random_workload
from diagd.runtime.load import open_session
from diagd.schedule import StreamLayout
from tests.models import export_small
from tests.oracles.models import small_model


def test_every_decoder_has_a_line_and_exact_ones_ntps_tokens(tmp_path: Path) -> None:
    layout, frames = StreamLayout(4, 6, after=3), 4
    bundle = Bundle.open(export_small(small_model(layout, context_frames=4), tmp_path / "small.diagd"))
    with open_session(bundle) as session:
        workload = random_workload(session, 1, frames)
    counts = measure(bundle, workload, frames, 0, pixels=False)
    assert counts.keys() == decoders(layout).keys()
    assert counts["next token"].passes == layout.cells * (frames - 1)
    truth = np.stack(counts["next token"].tokens)
    for name, count in counts.items():
        assert count.rows > count.passes > 0 or name == "next token"
        if name.startswith("jacobi"):
            np.testing.assert_array_equal(np.stack(count.tokens), truth)
    assert table([counts], "").row_count == len(counts)
    assert flips(bundle, workload, counts["next token"].tokens, 0) == (0, frames * layout.cells)
    with open_session(bundle) as session:
        shown = costs(session, workload, [0.5, 0.9])
    windows = [str(cell).removeprefix("jacobi ") for cell in shown.columns[0].cells][3:]
    assert windows == ["1", "8", "16", "24"]
    for chance, column in zip((0.5, 0.9), shown.columns[2:], strict=True):
        passes = [float(str(cell).partition("(")[2].strip("()")) for cell in list(column.cells)[3:]]
        expected = [layout.cells * (1 - chance) / (1 - chance ** int(rows)) for rows in windows]
        np.testing.assert_allclose(passes, expected, atol=0.06)
