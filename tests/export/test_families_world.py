"""Descriptions of trained worlds that were damaged or made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diagd.errors import CheckpointError, DiagdError
from diagd.export.families.registry import find
from diagd.export.families.world import DESCRIPTION, SHIPPED, load_description


@pytest.mark.parametrize("text", ["", "3", "[]", "{}", '{"size": 1}', "[" * 100_000, '{"rows": "x"}'])
def test_what_is_no_description_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / DESCRIPTION).write_text(text)
    with pytest.raises(CheckpointError, match="no readable world model") as caught:
        load_description(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"rows": "x"}, {"rows": -1}, {"size": "9m"}, {"actions": 3}, {"codes": None}]
)
def test_descriptions_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    fields = json.loads((SHIPPED / "crafter-3m" / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps(fields | change))
    with pytest.raises(DiagdError):
        find("world", str(tmp_path))
