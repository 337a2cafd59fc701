"""What a user may pass that is no checkpoint."""

import os
import pickle
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diagd.errors import CheckpointError
from diagd.export.checkpoints import open_checkpoint


def refused(spec):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(spec)
    return str(caught.value)


def test_missing_file_names_its_neighbours(tmp_path):
    torch.save({}, tmp_path / "300M_16f.ckpt")
    assert f"did you mean '{tmp_path / '300M_16f.ckpt'}'?" in refused(tmp_path / "300M-16f.ckpt")
    assert f"{tmp_path} holds 300M_16f.ckpt" in refused(tmp_path / "x")


def test_missing_folder_names_the_part_that_is_missing(tmp_path):
    (tmp_path / "models").mkdir()
    message = refused(tmp_path / "model" / "cosmos" / "model.pt")
    assert f"'{tmp_path}' has no 'model'; did you mean '{tmp_path / 'models'}'?" in message


@pytest.mark.skipif(os.name != "posix", reason="such paths are fine on Windows")
@pytest.mark.parametrize(
    ("spec", "guess"),
    [
        ("C:\\Users\\me\\model.pt", "/mnt/c/Users/me/model.pt"),
        ("D:/models/model.pt", "/mnt/d/models/model.pt"),
        ("models\\model.pt", "models/model.pt"),
    ],
)
def test_windows_path(spec, guess):
    assert f"did you mean '{guess}'" in refused(spec)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    assert list(open_checkpoint("~/w.pt")) == ["w"]


def test_legacy_pickle_and_the_advice_for_it(tmp_path):
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
        (b"GGUF\x03\x00\x00\x00", "begins with b'GGUF"),
        (b"PK", "cut short"),
        (pickle.dumps({"w": 1}), "before 1.6"),
        (bytes(257) + b"ustar" + bytes(300), "before 1.6"),
        (b"\x93\x12\xfe\x07" + bytes(600), "is not a checkpoint"),
    ],
)
def test_other_files(tmp_path, content, message):
    (tmp_path / "model.pt").write_bytes(content)
    assert message in refused(tmp_path / "model.pt")


def test_zip_that_is_no_torch_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "validation.zip", "w") as archive:
        for name in ("a.mp4", "a.jsonl", "b.mp4", "b.jsonl"):
            archive.writestr(name, b"")
    message = refused(tmp_path / "validation.zip")
    assert "PyTorch did not write" in message and "a.mp4, a.jsonl, b.mp4, ..." in message
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    assert "it holds nothing" in refused(tmp_path / "empty.zip")


def test_neither_file_nor_folder():
    if not Path("/dev/null").exists():
        pytest.skip("needs /dev/null")
    assert "neither a file nor a folder" in refused("/dev/null")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_unreadable_file(tmp_path):
    torch.save({}, tmp_path / "w.pt")
    (tmp_path / "w.pt").chmod(0)
    assert "Permission denied" in refused(tmp_path / "w.pt")


def test_name_too_long_for_the_system():
    assert "cannot read" in refused("x" * 5000)
