"""The step kernels by their host build, and what CMake and nvcc make of the device build."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diagd.engines.cuda.kernels import (
    ADVANCE,
    APPEND,
    HEADER_WORDS,
    AdvanceArguments,
    AppendArguments,
    compile_kernels,
    kernel_source,
)
from diagd.engines.cuda.record import RECORDS, RecordRing
from diagd.engines.engine import VOID, SamplingState, StepInputs
from tests.engines.host_device import ROOT, HostDevice, host_kernels

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
MAX_WIDTH, UPDATES, SCRATCH, CAPACITY = 6, 8, 50, 32


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return host_kernels(str(tmp_path_factory.mktemp("native")))


def test_arguments_have_the_layout_of_the_kernels(kernels: ctypes.CDLL) -> None:
    assert kernels.diagd_advance_arguments_size() == ctypes.sizeof(AdvanceArguments)
    assert kernels.diagd_append_arguments_size() == ctypes.sizeof(AppendArguments)


class Outputs:
    """The fixed tensors that ``advance`` fills."""

    def __init__(self) -> None:
        self.counter = np.zeros(1, np.int32)
        self.sources, self.positions, self.sinks = (np.full(MAX_WIDTH, -7, np.int32) for _ in range(3))
        self.uniforms = np.zeros(MAX_WIDTH, np.float32)
        self.write_index = np.zeros(1, np.int64)
        self.live, self.top_k = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self.temperature, self.top_p = np.zeros(1, np.float32), np.zeros(1, np.float32)
        self.slot_position = np.full(CAPACITY, VOID, np.int32)

    def arguments(self, ring: RecordRing, width: int) -> AdvanceArguments:
        return AdvanceArguments(
            records=ring.address,
            **{name: array.ctypes.data for name, array in vars(self).items()},
            records_in_ring=RECORDS,
            max_width=MAX_WIDTH,
            max_updates=UPDATES,
            width=width,
            scratch=SCRATCH,
        )


@settings(max_examples=25, deadline=None)
@given(data=st.data(), threads=st.sampled_from([1, 3, 256]))
def test_advance_spreads_the_record_of_each_step(
    kernels: ctypes.CDLL, data: st.DataObject, threads: int
) -> None:
    device, outputs = HostDevice(kernels), Outputs()
    ring = RecordRing(device, MAX_WIDTH, UPDATES, SCRATCH)
    expected_slots = outputs.slot_position.copy()
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    for step in range(RECORDS + 3):
        rows = int(random.integers(1, MAX_WIDTH + 1))
        width = int(random.integers(rows, MAX_WIDTH + 1))
        sources, positions, sinks = random.integers(0, SCRATCH, (3, rows), np.int32)
        decoded = np.flatnonzero(random.random(rows) < 0.5).astype(np.int32)
        draws = random.random(len(decoded), np.float32)
        inputs = StepInputs(sources, positions, sinks, decoded, draws, step, step + 1)
        changed = random.permutation(CAPACITY)[: random.integers(0, UPDATES + 1)].astype(np.int32)
        expected_slots[changed] = new = random.integers(0, 99, len(changed), np.int32)
        ring.send(inputs, SamplingState(0.5, step, 0.9), changed, new)
        arguments = outputs.arguments(ring, width)
        kernels.diagd_advance(ctypes.byref(arguments), threads)

        assert outputs.counter[0] == (step + 1) % RECORDS
        np.testing.assert_array_equal(outputs.sources[:width], np.r_[sources, np.zeros(width - rows)])
        padded = np.r_[positions, np.full(width - rows, positions[-1])]
        np.testing.assert_array_equal(outputs.positions[:width], padded)
        wanted = np.full(width, SCRATCH)
        wanted[decoded] = sinks[decoded]
        np.testing.assert_array_equal(outputs.sinks[:width], wanted)
        np.testing.assert_array_equal(outputs.uniforms[decoded], draws)
        np.testing.assert_array_equal(outputs.slot_position, expected_slots)
        assert (outputs.write_index[0], outputs.live[0], outputs.top_k[0]) == (step, step + 1, step)
        assert (outputs.temperature[0], outputs.top_p[0]) == (np.float32(0.5), np.float32(0.9))


def test_a_record_is_sent_without_its_unused_end(kernels: ctypes.CDLL) -> None:
    device = HostDevice(kernels)
    ring = RecordRing(device, MAX_WIDTH, UPDATES, SCRATCH)
    row = np.zeros(1, np.int32)
    step = StepInputs(row, row, row, row, np.zeros(1, np.float32), 0, 1)
    ring.send(step, SamplingState(1.0, 0, 1.0), np.array([3], np.int32), np.array([9], np.int32))
    assert device.log[-1] == ("upload", ring.address, 4 * (HEADER_WORDS + 4 * MAX_WIDTH + 2))


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 3),
    width=st.integers(1, 5),
    start=st.integers(0, 7),
    dtype=st.sampled_from([np.int8, np.float16, np.float32]),
    threads=st.sampled_from([1, 5, 1024]),
)
def test_append_writes_rows_and_tokens(
    kernels: ctypes.CDLL, groups: int, width: int, start: int, dtype: type, threads: int
) -> None:
    capacity, size, count = 12, 16, 4
    random = np.random.default_rng(width)
    buffers = [(99 * random.random((groups, capacity, size))).astype(dtype) for _ in range(count)]
    rows = [(99 * random.random((groups, width, size))).astype(dtype) for _ in range(count)]
    expected = [buffer.copy() for buffer in buffers]
    for buffer, new in zip(expected, rows, strict=True):
        buffer[:, start : start + width] = new
    tokens, sinks = random.integers(0, 99, width, np.int32), random.permutation(20)[:width].astype(np.int32)
    token_buffer, write_index = np.zeros(20, np.int32), np.array([start], np.int64)
    row_pointers = np.array([array.ctypes.data for array in rows], np.uint64)
    buffer_pointers = np.array([array.ctypes.data for array in buffers], np.uint64)
    arguments = AppendArguments(
        rows=row_pointers.ctypes.data,
        buffers=buffer_pointers.ctypes.data,
        write_index=write_index.ctypes.data,
        tokens=tokens.ctypes.data,
        sinks=sinks.ctypes.data,
        token_buffer=token_buffer.ctypes.data,
        tensors=count,
        groups=groups,
        capacity=capacity,
        width=width,
        row_chunks=size * np.dtype(dtype).itemsize // 16,
    )
    kernels.diagd_append(ctypes.byref(arguments), threads)
    for buffer, wanted in zip(buffers, expected, strict=True):
        np.testing.assert_array_equal(buffer, wanted)
    np.testing.assert_array_equal(token_buffer[sinks], tokens)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cmake_builds_ptx_with_both_kernels(tmp_path: Path, kernels: ctypes.CDLL) -> None:
    del kernels
    target = tmp_path / "step_kernels.ptx"
    source = ROOT / "native" / "step_kernels.cu"
    command = ["nvcc", "-ptx", "-std=c++17", "-arch=compute_75", "-o", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    text = target.read_text()
    assert text.count(".entry") == 2
    assert all(f".entry {name}(" in text for name in (ADVANCE, APPEND))


def test_the_source_is_found_in_a_checkout() -> None:
    source, header = kernel_source()
    assert f"void {ADVANCE}(" in source and f"void {APPEND}(" in source
    assert "struct AdvanceArguments" in header


def test_nvrtc_compiles_the_kernels_without_a_gpu() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    pytest.importorskip("nvidia.cu13", reason="NVRTC's library is not installed")
    code = compile_kernels(90)
    assert code.startswith(b"\x7fELF")
    assert f".text.{ADVANCE}\0".encode() in code and f".text.{APPEND}\0".encode() in code
