"""A soak goes on where it stopped, and its lines say what it took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import soak
from diagd.bundle import Bundle
from diagd.runtime.load import open_session
from diagd.schedule import StreamLayout
from tests.models import export_small
from tests.oracles.models import small_model


def test_a_soak_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "BLOCK", 5)
    bundle = Bundle.open(export_small(small_model(StreamLayout(3, 4)), tmp_path / "small.diagd"))

    def run(log: Path, frames: int) -> list[str]:
        streams = []
        with open_session(bundle) as session:
            for line in soak.soak(session, log, frames):
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                streams.append(session.stream.past[-1].tokens.tobytes().hex())
        return streams

    whole = run(tmp_path / "whole.jsonl", 21)
    log = tmp_path / "parts.jsonl"
    before, after = run(log, 11), run(log, 21)
    assert before == whole[:2]
    assert len(before + after) == len(whole) == 4  # frames in flight begin anew, so tokens may differ
    lines = soak.lines_of(log)
    assert [line["frames"] for line in lines] == [6, 11, 16, 21]
    assert all(min(line["peak"], line["resident"]) > 1 << 20 for line in lines)
    console = Console(record=True, width=120)
    console.print(soak.summary(lines))
    assert "4 blocks" in console.export_text()
