"""Hostile pickles: each really runs when unpickled normally, and does nothing here."""

import builtins
import functools
import io
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diagd.errors import CheckpointError
from diagd.export.checkpoints import open_checkpoint
from diagd.export.checkpoints.torch_file import plain


class Calls:
    """Pickles to a call."""

    def __init__(self, function: "Callable[..., object] | Calls", *arguments: object) -> None:
        self.reduction = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.reduction


def attacks(path: Path) -> dict[str, Calls]:
    command = f"import pathlib; pathlib.Path({str(path)!r}).touch()"
    return {
        "os.system": Calls(os.system, f"touch {path}"),
        "exec": Calls(exec, command),
        "eval": Calls(eval, f"__import__('os').system('touch {path}')"),
        "subprocess": Calls(subprocess.check_call, ["touch", str(path)]),
        "open": Calls(open, str(path), "w"),
        "partial": Calls(functools.partial(os.system, f"touch {path}")),
        "getattr": Calls(Calls(getattr, os, "system"), f"touch {path}"),
    }


def write_checkpoint(path: Path, hostile: bytes) -> None:
    """A torch archive with a pickle PyTorch itself would not write."""
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", hostile)
        archive.writestr(f"{root}/data/0", bytes(8))


def load(pickled: bytes, path: Path) -> object:
    """What ``hyper_parameters`` become that a checkpoint pickles as these bytes."""
    weight = b"X\x0a\x00\x00\x00state_dict}X\x01\x00\x00\x00w" + tensor_bytes(0, (2,), (1,)) + b"ss"
    write_checkpoint(path, b"\x80\x02}" + weight + b"X\x10\x00\x00\x00hyper_parameters" + pickled + b"s.")
    return open_checkpoint(path).metadata["hyper_parameters"]


@pytest.mark.parametrize("name", ["os.system", "exec", "eval", "subprocess", "open", "partial"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_attack_is_refused_and_does_not_run(tmp_path: Path, name: str, protocol: int) -> None:
    mark = tmp_path / "ran"
    hostile = pickle.dumps({"state_dict": {"w": attacks(mark)[name]}}, protocol=protocol)
    pickle.loads(hostile)
    assert mark.exists()
    mark.unlink()
    write_checkpoint(tmp_path / "evil.ckpt", hostile)
    with pytest.raises(CheckpointError, match="may be malicious"):
        open_checkpoint(tmp_path / "evil.ckpt")
    assert not mark.exists()


AUDIT_PROGRAM = """
import sys
import encodings.cp437  # zipfile loads it for names, which would count as an event
import diagd.export.checkpoints.torch_file  # so does the import of PyTorch
from diagd.export.checkpoints import open_checkpoint
from diagd.errors import CheckpointError
events = []
sys.addaudithook(lambda event, _: events.append(event))
try:
    open_checkpoint(sys.argv[1])
except CheckpointError as error:
    print(error)
print([e for e in events if e.split(".")[0] in ("os", "subprocess", "exec", "compile", "import", "pickle")])
"""


def test_no_audited_action_happens(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "evil.pt", pickle.dumps(attacks(tmp_path / "ran")["os.system"], protocol=2))
    program = [sys.executable, "-c", AUDIT_PROGRAM, str(tmp_path / "evil.pt")]
    lines = subprocess.run(program, check=True, capture_output=True, text=True).stdout.splitlines()
    assert "asks to run 'posix.system'" in lines[0] or "asks to run 'nt.system'" in lines[0]
    assert lines[1] == "[]"


@pytest.mark.parametrize("function", [getattr, setattr, print, map, type, vars, torch.load, pickletools.dis])
def test_other_functions_are_only_recorded(
    tmp_path: Path, function: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = pickle.dumps(Calls(function, "argument"), protocol=2)[2:-1]
    name = f"{function.__module__}.{function.__name__}"
    assert load(pickled, tmp_path / "w.ckpt") == {"__class__": name, "__args__": ["argument"]}
    assert capsys.readouterr().out == ""


def test_records_do_not_become_attributes_of_other_code(tmp_path: Path) -> None:
    """BUILD with a dict alters the object on the stack; PyTorch's must not be alterable."""
    for name in ("torch._utils\n_rebuild_tensor_v2", "torch\nFloatStorage", "collections\nOrderedDict"):
        state = pickle.dumps({"function": 1, "__defaults__": (1,)}, protocol=2)[2:-1]
        for tail in (state + b"b", b"N" + state + b"\x86b"):
            with pytest.raises(CheckpointError, match="damaged pickle"):
                load(b"c" + name.encode() + b"\n" + tail, tmp_path / "w.ckpt")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)
    assert not vars(torch._utils._rebuild_tensor_v2)


def test_classes_are_those_of_one_file(tmp_path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    assert load(b"cfoo\nBar\n", tmp_path / "a.ckpt") == "foo.Bar"
    assert set(torch.serialization.get_safe_globals()) == set(before)  # the allowance ends with the reading


def test_tensor_subclasses_and_attributes(tmp_path: Path) -> None:
    tensor = torch.arange(3.0)
    vars(tensor)["note"] = "kept by torch, dropped here"
    parameter = torch.nn.Parameter(torch.arange(3.0))
    vars(parameter)["note"] = "too"
    torch.save({"tensor": tensor, "parameter": parameter}, tmp_path / "notes.pt")
    assert [list(handle.read()) for handle in open_checkpoint(tmp_path / "notes.pt").values()] == [
        [0, 1, 2]
    ] * 2


@pytest.mark.parametrize(
    "storage",
    ["not a tuple", ("module", "source"), ("storage", "FloatStorage", "0", "cpu", 1), ("storage", None)],
)
def test_unknown_persistent_ids(tmp_path: Path, storage: object) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return storage if value is builtins else None

    target = io.BytesIO()
    Pickler(target, protocol=2).dump(builtins)
    write_checkpoint(tmp_path / "w.pt", target.getvalue())
    with pytest.raises(CheckpointError, match="damaged pickle"):
        open_checkpoint(tmp_path / "w.pt")


def tensor_bytes(offset: object, shape: object, strides: object) -> bytes:
    """A pickled tensor with the given numbers, on storage 0 of 2 floats."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
    numbers = b"".join(pickle.dumps(value, protocol=2)[2:-1] for value in (offset, shape, strides))
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"\x89ccollections\nOrderedDict\n)RtR"
    )


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (-1, (2,), (1,)),
        (1, (2,), (1,)),
        (0, (-2,), (1,)),
        (0, (2, 2), (1,)),
        (0, (2,), (2,)),
        (0, (2**62, 2**62), (2**62, 1)),
        (2**70, (1,), (1,)),
        (0, ("2",), (1,)),
        (0.0, (2,), (1,)),
    ],
)
def test_tensors_beyond_their_storage_are_refused(
    tmp_path: Path, offset: object, shape: object, strides: object
) -> None:
    write_tensor(tmp_path / "w.pt", offset, shape, strides)
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(tmp_path / "w.pt")


def write_tensor(path: Path, offset: object, shape: object, strides: object) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "w/data.pkl", b"\x80\x02}X\x01\x00\x00\x00w" + tensor_bytes(offset, shape, strides) + b"s."
        )
        archive.writestr("w/data/0", np.array([1, 2], "<f4").tobytes())


def test_negative_strides_do_not_lead_out_of_a_storage(tmp_path: Path) -> None:
    write_tensor(tmp_path / "w.pt", 0, (2,), (-1,))  # PyTorch takes the tensor for a contiguous one
    assert list(open_checkpoint(tmp_path / "w.pt")["w"].read()) == [1, 2]


@settings(max_examples=300)
@given(st.binary(max_size=60), st.integers(0, 200))
def test_any_bytes_load_or_raise_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, garbage: bytes, cut: int
) -> None:
    good = b"\x80\x02}X\x01\x00\x00\x00w" + tensor_bytes(0, (2,), (1,)) + b"s."
    path = tmp_path_factory.getbasetemp() / "garbage.pt"
    write_checkpoint(path, good[:cut] + garbage)
    try:
        open_checkpoint(path)
    except CheckpointError as error:
        assert "garbage.pt" in str(error)


def test_plain_ends_on_cycles_and_on_shared_towers() -> None:
    cycle: dict[str, Any] = {"x": 1}
    cycle["self"] = cycle
    copied: Any = plain(cycle)
    assert copied["self"]["self"]["x"] == 1
    assert "..." in str(copied)
    tower: list[Any] = ["leaf"]
    for _ in range(30):
        tower = [tower, tower]
    assert "leaf" in str(plain(tower))
    assert plain({3: {1.5}, "none": None, "bytes": b"a"}) == {"3": [1.5], "none": None, "bytes": "b'a'"}
