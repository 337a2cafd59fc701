"""Handles against PyTorch's own view of the same bytes, and the memory reading takes."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from diagd.errors import CheckpointError
from diagd.export.checkpoints import open_checkpoint, torch_file
from diagd.export.checkpoints.torch_file import MappedTensor


def as_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    return array.astype(np.float32)


@st.composite
def views(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A strided view of a storage: permuted, sliced, expanded."""
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    base = torch.arange(math.prod(shape)).to(dtype).reshape(shape)
    view = base.permute(draw(st.permutations(range(len(shape)))))
    for axis in range(view.ndim):
        start = draw(st.integers(0, view.shape[axis]))
        view = view.narrow(axis, start, view.shape[axis] - start)
    if draw(st.booleans()):
        view = view.unsqueeze(0).expand(3, *view.shape)
    return base, view


@settings(max_examples=60)
@given(views(), st.data())
def test_any_view_of_a_shared_storage_reads_as_in_torch(
    tmp_path_factory: pytest.TempPathFactory, pair: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    base, view = pair
    path = tmp_path_factory.mktemp("views") / "views.pt"
    torch.save({"base": base, "view": view}, path)
    handles = open_checkpoint(path)
    start = data.draw(st.integers(0, view.shape[0]))
    stop = data.draw(st.integers(start, view.shape[0]))
    for name, tensor in (("base", base), ("view", view)):
        array = handles[name].read()
        assert array.flags.c_contiguous
        assert handles[name].shape == array.shape == tuple(tensor.shape)
        assert handles[name].size == array.size
        np.testing.assert_array_equal(as_float32(array), tensor.float().numpy())
    np.testing.assert_array_equal(
        as_float32(handles["view"].read_rows(start, stop)), view[start:stop].float().numpy()
    )


def test_scalar_keeps_its_shape(tmp_path: Path) -> None:
    torch.save({"scale": torch.tensor(2.5)}, tmp_path / "scalar.pt")
    handle = open_checkpoint(tmp_path / "scalar.pt")["scale"]
    assert handle.read().shape == () and handle.read() == np.float32(2.5)
    with pytest.raises(IndexError):
        handle.read_rows(0, 0)


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    import ml_dtypes

    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    torch.save({"w": bits.view(torch.bfloat16)}, tmp_path / "bits.pt")
    array = open_checkpoint(tmp_path / "bits.pt")["w"].read()
    assert array.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(array.view(np.int16), bits.numpy())


def test_misaligned_tensor_is_realigned(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"\x00" + np.arange(6, dtype="<f4").tobytes())
    array = MappedTensor((2, 3), "float32", tmp_path / "raw", 1, (3, 1)).read()
    assert array.flags.aligned
    np.testing.assert_array_equal(array, np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 4), (3, 2)])
def test_rows_outside_are_refused(tmp_path: Path, start: int, stop: int) -> None:
    torch.save({"w": torch.ones(3, 2)}, tmp_path / "w.pt")
    with pytest.raises(IndexError, match="rows"):
        open_checkpoint(tmp_path / "w.pt")["w"].read_rows(start, stop)


def test_file_cut_after_opening_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(64, 64)}, path)
    handle = open_checkpoint(path)["w"]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        handle.read()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_file_replaced_after_opening_is_reported(tmp_path: Path, name: str) -> None:
    """As training does, that goes on while its last checkpoint is exported."""
    path, later = tmp_path / name, tmp_path / f"later-{name}"
    for number, file in enumerate((path, later)):
        tensors = {"w": torch.full((64, 64), float(number))}
        (save_file if name.endswith(".safetensors") else torch.save)(tensors, file)
    os.utime(later, ns=(1, 1))
    handle = open_checkpoint(path)["w"]
    assert not handle.read_rows(0, 1).any()
    later.replace(path)
    with pytest.raises(CheckpointError, match=r"changed since it was opened.*pass a copy"):
        handle.read_rows(1, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_tensor_without_memory_to_map_it_is_no_changed_file(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(1 << 25)}, path)
    code = """
import resource, sys
from diagd.export.checkpoints import open_checkpoint
handle = open_checkpoint(sys.argv[1])["w"]
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), -1))
try:
    handle.read()
except MemoryError:
    print("no memory")
"""
    command = [sys.executable, "-c", code, str(path)]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stdout == "no memory\n"


def test_unreadable_dtype_says_so(tmp_path: Path) -> None:
    handle = MappedTensor((4,), "float8_e4m3fn", tmp_path / "w.pt", 0, (1,))
    assert handle.size == 4
    with pytest.raises(CheckpointError, match="float8_e4m3fn"):
        handle.read()
    with pytest.raises(CheckpointError, match="float8_e4m3fn"):
        handle.read_rows(0, 1)


@given(st.lists(st.integers(1, 6), max_size=4).map(tuple))
def test_contiguous_tensors_span_the_whole_storage(shape: tuple[int, ...]) -> None:
    strides = torch.empty(shape).stride()
    assert torch_file._span(shape, strides) == math.prod(shape)
    assert torch_file._span((0, *shape), (1, *strides)) == 0


PEAK_PROGRAM = """
import re, sys
import numpy, ml_dtypes
from pathlib import Path
from diagd.export.checkpoints import open_checkpoint

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

if sys.argv[1].endswith("pt"):
    import diagd.export.checkpoints.torch_file  # PyTorch reads this format, and takes memory of its own
loaded, before = "torch" in sys.modules, peak()
handles = open_checkpoint(sys.argv[1])
total = sum(float(handle.read().astype(numpy.float32).sum()) for handle in handles.values())
print(total, peak() - before, loaded == ("torch" in sys.modules), loaded)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_reading_64_mb_takes_the_memory_of_one_tensor(tmp_path: Path, suffix: str) -> None:
    tensors = {f"layers.{layer}.weight": torch.full((1024, 2048), 1.0).bfloat16() for layer in range(16)}
    path = tmp_path / f"big.{suffix}"
    (torch.save if suffix == "pt" else save_file)(tensors, path)
    assert path.stat().st_size > 64e6
    program = [sys.executable, "-c", PEAK_PROGRAM, str(path)]
    total, growth, imports_settled, torch_loaded = subprocess.run(
        program, check=True, capture_output=True, text=True
    ).stdout.split()
    assert float(total) == 16 * 1024 * 2048
    # One tensor is 4 MB as stored and 8 MB as float32.
    assert float(growth) < 24
    assert imports_settled == "True"
    assert torch_loaded == str(suffix == "pt")


def test_opening_leaves_no_file_open(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(3)}, path)
    handle = open_checkpoint(path)["w"]
    if Path("/proc/self/fd").is_dir():
        opened = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
        assert path.resolve() not in opened
    assert re.fullmatch(r"float32", handle.dtype)
