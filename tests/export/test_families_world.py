"""Folders of trained worlds: which weights are read, and descriptions that were damaged or made by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diagd.errors import CheckpointError, DiagdError, UsageError
from diagd.export.exporter import open_sources
from diagd.export.families import find
from diagd.export.families.world import DESCRIPTION, SHIPPED, WEIGHTS, load_description


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


def test_a_checkpoint_that_is_not_there_is_told() -> None:
    with pytest.raises(UsageError, match=r"there is no nothing; .*out: crafter-3m is shipped"):
        find("crafter-3m", "nothing")


@pytest.mark.parametrize("name", ["crafter-3m", "doom-3m"])
def test_shipped_worlds_have_pictures_to_start_from(name: str) -> None:
    prompts = find(name, None).prompts
    assert prompts is not None and {file.suffix for file in prompts.iterdir()} == {".png"}
    assert find("world", str(SHIPPED / name)).prompts is None


def test_the_weights_that_are_named_are_read(tmp_path: Path) -> None:
    """Those of a fine-tuning, say, that lie beside the world's own."""
    folder = Path(shutil.copytree(SHIPPED / "crafter-3m", tmp_path / "world"))
    own = load_file(folder / WEIGHTS)
    other = folder / "aligned.safetensors"
    save_file(own | {"norm.weight": own["norm.weight"] + 1}, other)
    for named, gain in ((other, own["norm.weight"] + 1), (folder / WEIGHTS, own["norm.weight"])):
        for checkpoint in (str(named), None):
            sources = open_sources(find("world", str(named)), checkpoint, None)
            np.testing.assert_array_equal(sources.transformer["norm.weight"].read(), gain)
            assert sources.tokenizer is not None
    (tmp_path / "alone").mkdir()
    with pytest.raises(CheckpointError, match=r"name the folder .* or weights beside its config.json"):
        find("world", str(other.rename(tmp_path / "alone" / other.name)))
