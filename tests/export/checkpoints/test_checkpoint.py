"""Renamed views."""

import pytest
import torch

from diagd.errors import CheckpointError
from diagd.export.checkpoints import open_checkpoint, select


@pytest.fixture
def checkpoint(tmp_path):
    names = ("transformer.a", "transformer.b._extra_state", "tokenizer.a")
    torch.save({"state_dict": {name: torch.ones(2) for name in names}, "epoch": 4}, tmp_path / "w.ckpt")
    return open_checkpoint(tmp_path / "w.ckpt")


def test_select_renames_and_drops(checkpoint):
    def rename(name):
        return name.removeprefix("transformer.") if name == "transformer.a" else None

    view = select(checkpoint, rename)
    assert list(view) == ["a"]
    assert view["a"] is checkpoint["transformer.a"]
    assert (view.source, view.metadata) == (checkpoint.source, {"epoch": 4})
    assert "1 tensors" in repr(view)


def test_two_tensors_of_one_name_are_refused(checkpoint):
    with pytest.raises(CheckpointError, match=r"'transformer.a' and 'tokenizer.a', which both mean 'a'"):
        select(checkpoint, lambda name: name.rpartition(".")[2])
