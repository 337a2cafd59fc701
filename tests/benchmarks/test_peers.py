"""The comparison with peers over a small model: all read the same cache and give the same logits."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import peers
from diagd.bundle import Bundle, Form
from diagd.export.options import GraphOptions
from diagd.schedule import Schedule
from diagd.schedule.table import Block
from tests.models import export_small
from tests.oracles.models import small_model
from tests.profiling.conftest import LAYOUT


class Runtime:
    """Stands for a runtime in PyTorch, which tests/oracles compare with the oracle."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def prefill(self, live: int) -> None:
        assert live == 39

    def decode(self, block: Block) -> None:
        self.steps.append(block.steps)
        began = time.process_time()
        while time.process_time() == began:
            np.ones((64, 64)) @ np.ones((64, 64))


FORMS = (Form.PREFIX, Form.MODERN, Form.PORTABLE)


def test_both_are_timed_on_the_same_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "CONSOLE", Console(width=160))
    in_fp32 = {name: way for name, way in peers.RUNTIMES.items() if "fp32" in name}
    monkeypatch.setattr(peers, "RUNTIMES", in_fp32)
    model, path = small_model(LAYOUT, context_frames=4), tmp_path / "small.diagd"
    bundle = Bundle.open(export_small(model, path, GraphOptions(FORMS, "fp32", (1, 8, 64))))
    peers.compare_steps(bundle, 40, 1)
    printed = capsys.readouterr().out
    for name in in_fp32:
        row = next(line for line in printed.splitlines() if name in line)
        numbers = [
            float(number) for number in re.findall(r"\d\S*\d|\d", row.replace(name, "").replace("x)", ""))
        ]
        assert len(numbers) == 5
        assert min(numbers[:4]) > 0
        assert numbers[4] < 1e-4
        assert (numbers[4] == 0) == (name == "diagd, fp32")
    form = Runtime()
    peers.compare_frames(bundle, 40, 1, {"a form": form})
    assert form.steps == [LAYOUT.cells, Schedule.serial(LAYOUT, 1).total_steps(1)]
    printed = capsys.readouterr().out
    for name in (*in_fp32, "a form"):
        assert len(re.findall(r"\d+x\)", next(line for line in printed.splitlines() if name in line))) == 2


def test_times_of_zero_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with np.errstate(divide="ignore", invalid="ignore"):
        peers.show({("ours", "ms"): [0.5], ("theirs", "ms"): [0.0]}, "ours", "a title")
        assert "0 (infx)" in capsys.readouterr().out
        peers.show({("ours", "ms"): [0.0]}, "ours", "a title")
    assert "0 (nanx)" in capsys.readouterr().out
