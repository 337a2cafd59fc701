"""Renamed views, and one error for everything that does not fit."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from diagd.errors import CheckpointError
from diagd.export.checkpoints import Checkpoint, RandomCheckpoint, Shape, check, open_checkpoint, select


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    names = ("transformer.a", "transformer.b._extra_state", "tokenizer.a")
    torch.save({"state_dict": {name: torch.ones(2) for name in names}, "epoch": 4}, tmp_path / "w.ckpt")
    return open_checkpoint(tmp_path / "w.ckpt")


def test_select_renames_and_drops(checkpoint: Checkpoint) -> None:
    def rename(name: str) -> str | None:
        return name.removeprefix("transformer.") if name == "transformer.a" else None

    view = select(checkpoint, rename)
    assert list(view) == ["a"]
    assert view["a"] is checkpoint["transformer.a"]
    assert (view.source, view.metadata) == (checkpoint.source, {"epoch": 4})
    assert "1 tensors" in repr(view)


def test_two_tensors_of_one_name_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"'transformer.a' and 'tokenizer.a', which both mean 'a'"):
        select(checkpoint, lambda name: name.rpartition(".")[2])


MODEL = {
    "embed.weight": (10, 4),
    **{f"layers.{layer}.{part}.weight": (4, 4) for layer in range(20) for part in ("q", "k")},
    "norm.weight": (4,),
}


def report(found: Mapping[str, Shape], expected: Mapping[str, Shape] = MODEL) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        check(RandomCheckpoint(found, seed=0), expected)
    return str(caught.value).splitlines()


def test_exact_fit_passes() -> None:
    check(RandomCheckpoint(MODEL, seed=0), MODEL)


def test_every_kind_of_problem_is_listed_at_once() -> None:
    found = {name: shape for name, shape in MODEL.items() if ".q." not in name}
    found |= {"embed.weight": (12, 4), "head.weight": (10, 4), "layers.3.k.weight": (8, 4)}
    lines = report(found)
    assert lines[0] == "random weights, seed 0 does not fit the model: 20 missing, 1 extra, 2 wrong shape"
    assert lines[1:] == [
        "  missing: layers.*.q.weight [4, 4] (20 tensors)",
        "  extra: head.weight [10, 4]",
        "  wrong shape: embed.weight expected [10, 4], found [12, 4]",
        "  wrong shape: layers.3.k.weight expected [4, 4], found [8, 4]",
        "Check that the model name and size are those of the checkpoint.",
    ]


def test_another_family_is_recognised() -> None:
    lines = report({"predictor.gpt_model.wte": (3, 3)})
    assert "42 missing, 1 extra" in lines[0]
    assert "another model family" in lines[-1]


def test_names_behind_those_of_a_module_around_the_model_are_recognised() -> None:
    lines = report({"net.model." + name: shape for name, shape in MODEL.items()})
    assert lines[-1] == (
        "Its names begin with 'net.model.', as those of a module around the model: save them without."
    )


def test_long_lists_are_cut_with_a_count() -> None:
    expected = {f"part_{chr(97 + letter)}.weight": (1,) for letter in range(26)}
    lines = report({"part_a.weight": (1,)}, expected)
    assert len(lines) == 1 + 12 + 1 + 1
    assert lines[-2] == "  missing: ... and 13 more tensors"


def test_unusable_dtypes_are_refused_together(tmp_path: Path) -> None:
    tensors = {
        "a.0": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "a.1": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "b": torch.zeros(2, dtype=torch.int8),
        "c": torch.zeros(2, dtype=torch.bfloat16),
    }
    torch.save(tensors, tmp_path / "w.pt")
    checkpoint = open_checkpoint(tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as caught:
        check(checkpoint, dict.fromkeys(tensors, (2,)))
    lines = str(caught.value).splitlines()
    assert "3 unusable dtype" in lines[0]
    assert lines[1].endswith("found float8_e4m3fn (2 tensors)") and "a.*" in lines[1]
    assert "b expected one of float64, float32, float16, bfloat16, found int8" in lines[2]
    assert "convert these tensors" in lines[3]
    check(checkpoint_without(checkpoint, "a.0", "a.1", "b"), {"c": (2,)})


def checkpoint_without(checkpoint: Checkpoint, *names: str) -> Checkpoint:
    return select(checkpoint, lambda name: None if name in names else name)
