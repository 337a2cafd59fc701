"""What a user may pass that is no checkpoint."""

import json
import os
import pickle
import shlex
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diagd.errors import CheckpointError
from diagd.export.checkpoints import open_checkpoint


def refused(spec: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(spec)
    return str(caught.value)


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "300M_16f.ckpt")
    assert f"did you mean '{tmp_path / '300M_16f.ckpt'}'?" in refused(tmp_path / "300M-16f.ckpt")
    assert f"{tmp_path} holds 300M_16f.ckpt" in refused(tmp_path / "x")


def test_missing_folder_names_the_part_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    message = refused(tmp_path / "model" / "cosmos" / "model.pt")
    assert f"'{tmp_path}' has no 'model'; did you mean '{tmp_path / 'models'}'?" in message


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    assert list(open_checkpoint("~/w.pt")) == ["w"]


def test_legacy_pickle_and_the_advice_for_it(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(4.0)}
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    message = refused(tmp_path / "old.pt")
    assert "before 1.6" in message
    command = shlex.split(message[message.index("python -c") :])
    assert command[:2] == ["python", "-c"]
    exec(command[2])
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "old-zip.pt")["w"].read(), np.arange(4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"\xef\xbb\xbf<html>", "web page"),
        (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ", "what macOS notes about a file"),
        (b"GGUF\x03\x00\x00\x00", "begins with b'GGUF"),
        (b"PK", "cut short"),
        (pickle.dumps({"w": 1}), "before 1.6"),
        (bytes(257) + b"ustar" + bytes(300), "before 1.6"),
        (b"\x93\x12\xfe\x07" + bytes(600), "is not a checkpoint"),
    ],
)
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "MODEL.SAFETENSORS"])
def test_other_files_whatever_their_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    printed = refused(tmp_path / name)
    assert message in printed or (name != "model.pt" and "not a safetensors file" in printed)
    assert "\n" not in printed
    assert refused(tmp_path) == printed


WEB = b"<!DOCTYPE html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:7\nsize 5165520\n"


@pytest.mark.parametrize(
    ("content", "message"), [(WEB, "web page"), (POINTER, "git lfs pull"), (b"", "is empty")]
)
def test_what_stands_in_for_a_file_is_told_before_its_suffix(
    tmp_path: Path, content: bytes, message: str
) -> None:
    for name in ("model.safetensors", "model.pt", "weights"):
        (tmp_path / name).write_bytes(content)
        assert message in refused(tmp_path / name)
    index = {"weight_map": {"w": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(content or b" ")
    assert (message if content else "is not the index") in refused(tmp_path)


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("nvidia/Cosmos-Predict1-4B", "hf://nvidia/Cosmos-Predict1-4B"),
        ("nvidia/Cosmos-Predict1-4B@main/model.pt", "hf://nvidia/Cosmos-Predict1-4B@main/model.pt"),
        ("microsoft/wham/models/WHAM_200M.ckpt", "hf://microsoft/wham/models/WHAM_200M.ckpt"),
        ("https://huggingface.co/nvidia/Cosmos-Predict1-4B", "hf://nvidia/Cosmos-Predict1-4B"),
        ("https://huggingface.co/org/a/blob/v1/b/model.pt", "hf://org/a@v1/b/model.pt"),
        ("huggingface.co/org/a/resolve/main/model.pt?download=true", "hf://org/a@main/model.pt"),
        ("hf.co/org/a/tree/main", "hf://org/a@main"),
    ],
)
def test_repository_of_the_hub_without_its_scheme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vid").mkdir()
    assert f"did you mean '{meant}'?" in refused(spec)


@pytest.mark.parametrize("spec", ["s3://a/b.pt", "https://a.org/b.ckpt", "file:///b.pt", "HF://org/name"])
def test_other_addresses_are_not_taken_for_paths(spec: str) -> None:
    assert f"'{spec}' is no address that is read, only hf://org/name is" in refused(spec)


@pytest.mark.parametrize("spec", ["hf://../..", "hf://org/a--b", "hf://-org/name"])
def test_names_that_the_hub_does_not_give(spec: str) -> None:
    assert f"'{spec}' names no repository" in refused(spec)


@pytest.mark.parametrize("spec", ["checkpoints/model.pt", "here/name", "./org/name", "/org/name", "a b/c"])
def test_paths_are_not_taken_for_repositories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert "hf://" not in refused(spec)


@pytest.mark.parametrize("spec", ["", "  "])
def test_empty_path_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    assert "path of the checkpoint is empty" in refused(spec)
    assert list(open_checkpoint(".")) == ["w"]


def test_upper_case_and_wrong_suffixes(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "MODEL.SAFETENSORS")
    assert list(open_checkpoint(tmp_path)) == ["w"]
    (tmp_path / "MODEL.SAFETENSORS").rename(tmp_path / "model.pt")
    torch.save({"v": torch.ones(1)}, tmp_path / "X.CKPT")
    assert list(open_checkpoint(tmp_path / "model.pt")) == ["w"]
    assert list(open_checkpoint(tmp_path / "X.CKPT")) == ["v"]
    (tmp_path / "X.CKPT").rename(tmp_path / "x.safetensors")
    assert list(open_checkpoint(tmp_path / "x.safetensors")) == ["v"]


def test_what_macos_leaves_beside_a_file(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "x.ckpt")
    (tmp_path / "._x.ckpt").write_bytes(b"\x00\x05\x16\x07" + bytes(60))
    assert list(open_checkpoint(tmp_path)) == ["w"]
    assert "pass the file itself, x.ckpt" in refused(tmp_path / "._x.ckpt")


def test_linked_weights(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "blobs" / "0a1b")
    (tmp_path / "model.safetensors").symlink_to(Path("blobs") / "0a1b")
    assert list(open_checkpoint(tmp_path)["w"].read()) == [1]
    (tmp_path / "blobs" / "0a1b").unlink()
    assert "a link to 'blobs/0a1b', which does not exist" in refused(tmp_path / "model.safetensors")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    assert "a link to 'loop.pt'" in refused(tmp_path / "loop.pt")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_name_that_is_no_unicode(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors"))
    save_file({"w": torch.arange(3.0)}, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").rename(path)
    torch.save({"w": torch.arange(3.0)}, path.with_suffix(".pt"))
    for found in (path, path.with_suffix(".pt")):
        assert list(open_checkpoint(found)["w"].read()) == [0, 1, 2]
    path.write_bytes(b"")
    assert "is empty" in refused(path).encode().decode()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module."]
)
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_names_that_training_wrapped(
    tmp_path: Path, prefix: str, save: Callable[[dict[str, Tensor], Path], None]
) -> None:
    names = ("model.embed", "model.layers.0.w")
    save({prefix + name: torch.ones(1) for name in names}, tmp_path / "model.pt")
    assert set(open_checkpoint(tmp_path)) == set(names)
    save(
        {"model._orig_mod.layers.0._orig_mod.w": torch.ones(1), "module.w": torch.ones(1)}, tmp_path / "b.bin"
    )
    assert set(open_checkpoint(tmp_path / "b.bin")) == {"model.layers.0.w", "module.w"}


def test_names_that_averaging_wrapped(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2))
    torch.save(averaged.state_dict(), tmp_path / "model.pt")
    assert set(open_checkpoint(tmp_path)) == {"weight", "bias"}


def test_zip_that_is_no_torch_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "validation.zip", "w") as archive:
        for name in ("a.mp4", "a.jsonl", "b.mp4", "b.jsonl"):
            archive.writestr(name, b"")
    message = refused(tmp_path / "validation.zip")
    assert "PyTorch did not write" in message and "a.mp4, a.jsonl, b.mp4, ..." in message
    np.savez(tmp_path / "weights.npz", w=np.ones(2))
    (tmp_path / "weights.npz").rename(tmp_path / "weights.pt")
    assert "it holds w.npy" in refused(tmp_path / "weights.pt")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    assert "it holds nothing" in refused(tmp_path / "empty.zip")


def test_neither_file_nor_folder() -> None:
    if not Path("/dev/null").exists():
        pytest.skip("needs /dev/null")
    assert "neither a file nor a folder" in refused("/dev/null")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_unreadable_file(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "w.pt")
    (tmp_path / "w.pt").chmod(0)
    assert "Permission denied" in refused(tmp_path / "w.pt")


def test_name_too_long_for_the_system() -> None:
    # Python 3.14 only says that it does not exist
    told = "cannot read" if sys.version_info < (3, 14) else "no checkpoint at"
    assert told in refused("x" * 5000)
