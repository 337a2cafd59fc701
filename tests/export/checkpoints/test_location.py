"""Folders and sharded sets."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import format_utils, state_dict_saver

from diagd.errors import CheckpointError
from diagd.export.checkpoints import check, open_checkpoint
from diagd.export.checkpoints.location import choose_file

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_sharded(folder: Path) -> tuple[dict[str, Tensor], Path]:
    tensors = {f"layers.{layer}.weight": torch.full((2, 2), float(layer)) for layer in range(4)}
    weight_map: dict[str, str] = {}
    for shard, layers in zip(SHARDS, ((0, 2), (1, 3)), strict=True):
        chosen = {f"layers.{layer}.weight": tensors[f"layers.{layer}.weight"] for layer in layers}
        save_file(chosen, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 64}, "weight_map": weight_map}))
    return tensors, index


def test_sharded_set_is_one_checkpoint(tmp_path: Path) -> None:
    tensors, index = write_sharded(tmp_path)
    for spec in (tmp_path, index, str(tmp_path) + "/"):
        checkpoint = open_checkpoint(spec)
        assert set(checkpoint) == set(tensors)
        assert checkpoint.metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(checkpoint[name].read(), tensor.numpy())


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of 2 shards: {SHARDS[1]}"):
        open_checkpoint(tmp_path)


def test_shard_of_another_version(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"layers.3.weight": torch.ones(2, 2)}, tmp_path / SHARDS[1])
    with pytest.raises(CheckpointError, match=r"lacks tensor 'layers\.1\.weight'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", " ", "[]", "{}", '{"weight_map": 3}'])
def test_malformed_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not the index" if text else "is empty"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/passwd", "..\\secret", "..", "", "model.safetensors.index.json"],
)
def test_index_cannot_reach_outside_its_folder(tmp_path: Path, shard: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CheckpointError, match="beside the index"):
        open_checkpoint(tmp_path)


def test_sharded_pytorch_bins(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "pytorch_model-2.bin")
    weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert {name: handle.read().sum() for name, handle in open_checkpoint(tmp_path).items()} == {
        "a": 2,
        "b": 0,
    }


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.pt", "config.json"], "model.pt"),
        (["model.pt", "aux_vars.pt"], "model.pt"),
        (["encoder.jit", "decoder.jit", "autoencoder.jit"], "autoencoder.jit"),
        ([*SHARDS, "x.safetensors.index.json"], "x.safetensors.index.json"),
        (["WHAM_200M.ckpt", "README.md"], "WHAM_200M.ckpt"),
    ],
)
def test_choice_of_a_file(names: list[str], chosen: str) -> None:
    assert choose_file(names, "folder") == chosen


def test_choice_that_is_the_users() -> None:
    with pytest.raises(CheckpointError, match=r"2 checkpoints \(WHAM_1.6B_v1.ckpt, WHAM_200M.ckpt\)"):
        choose_file(["WHAM_200M.ckpt", "WHAM_1.6B_v1.ckpt"], "folder")
    with pytest.raises(CheckpointError, match=r"no checkpoint: found README.md, expected .*\.safetensors"):
        choose_file(["README.md"], "folder")
    with pytest.raises(CheckpointError, match="shards without their index"):
        choose_file(["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "folder")


def test_index_that_an_editor_marked_as_unicode(tmp_path: Path) -> None:
    tensors, index = write_sharded(tmp_path)
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert set(open_checkpoint(tmp_path)) == set(tensors)


def test_part_of_a_set_is_told_as_one(tmp_path: Path) -> None:
    tensors, _ = write_sharded(tmp_path)
    with pytest.raises(CheckpointError, match=r"one part of a set: .*NAME\.index\.json"):
        check(open_checkpoint(tmp_path / SHARDS[0]), {name: tuple(t.shape) for name, t in tensors.items()})


def test_distributed_checkpoint_is_told_with_the_line_that_converts_it(tmp_path: Path) -> None:
    folder = tmp_path / "step 1"
    state_dict_saver.save({"model": {"w": torch.ones(2)}}, checkpoint_id=folder, no_dist=True)
    for spec in (folder, folder / "__0_0.distcp"):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(spec)
        command = shlex.split(str(caught.value).partition("with: ")[2])
        assert command[:3] == ["python", "-m", "torch.distributed.checkpoint.format_utils"]
    format_utils.dcp_to_torch_save(command[4], tmp_path / command[5])
    assert list(open_checkpoint(tmp_path / command[5])) == ["w"]


def test_folder_without_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint: found no file"):
        open_checkpoint(tmp_path)
