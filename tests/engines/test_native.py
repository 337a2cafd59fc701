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

from diagd.engines.devices.kernels import (
    ADVANCE,
    APPEND,
    HEADER_WORDS,
    AdvanceArguments,
    AppendArguments,
    compile_kernels,
    kernel_source,
)
from diagd.engines.engine import VOID, SamplingState, Steps
from diagd.engines.records import HALF_WORDS, RecordRing
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
        self.cursor = np.zeros(1, np.int32)
        self.sources, self.positions, self.sinks = (np.full(MAX_WIDTH, -7, np.int32) for _ in range(3))
        self.uniforms = np.zeros(MAX_WIDTH, np.float32)
        self.write_index = np.zeros(1, np.int64)
        self.live, self.top_k = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self.temperature, self.top_p = np.zeros(1, np.float32), np.zeros(1, np.float32)
        self.slot_position = np.full(CAPACITY, VOID, np.int32)

    def register(self, device: HostDevice) -> None:
        """Let the device know the memory, as if it had allocated it."""
        for array in vars(self).values():
            device._memory[array.ctypes.data] = array.view(np.uint8)

    def arguments(self, ring: RecordRing, width: int) -> AdvanceArguments:
        return AdvanceArguments(
            records=ring.address,
            **{name: array.ctypes.data for name, array in vars(self).items()},
            width=width,
            scratch=SCRATCH,
        )


def random_steps(random: np.random.Generator, count: int, first: int) -> Steps:
    """Steps of any widths that change any slots; step n writes slot ``first`` + n."""
    widths = random.integers(1, MAX_WIDTH + 1, count)
    offsets = np.cumsum([0, *widths]).astype(np.int32)
    sources, positions, sinks = random.integers(0, SCRATCH, (3, offsets[-1]), np.int32)
    decoding = random.random(offsets[-1]) < 0.5
    sinks[~decoding] = SCRATCH
    draws = np.searchsorted(np.flatnonzero(decoding), offsets).astype(np.int32)
    rows = np.concatenate([np.arange(width) for width in widths])
    changes = [random.permutation(CAPACITY)[: random.integers(0, UPDATES + 1)] for _ in range(count)]
    updates = np.cumsum([0, *map(len, changes)]).astype(np.int32)
    start = np.arange(first, first + count, dtype=np.int32)
    return Steps(
        offsets,
        sources,
        positions,
        sinks,
        draws,
        rows[decoding].astype(np.int32),
        random.random(int(decoding.sum()), np.float32),
        start,
        start + 1,
        updates,
        np.concatenate(changes).astype(np.int32),
        random.integers(0, 99, updates[-1], np.int32),
        SamplingState(0.5, first, 0.9),
    )


@pytest.mark.parametrize("build", ["host build", "NumPy"])
@settings(max_examples=25, deadline=None)
@given(data=st.data(), threads=st.sampled_from([1, 3, 256]))
def test_advance_spreads_the_record_of_each_step(
    kernels: ctypes.CDLL, build: str, data: st.DataObject, threads: int
) -> None:
    device, outputs = HostDevice(kernels if build == "host build" else None), Outputs()
    outputs.register(device)
    ring = RecordRing(device)
    expected_slots = outputs.slot_position.copy()
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    for block in range(5):
        steps = random_steps(random, int(random.integers(1, 6)), 10 * block)
        assert ring.send(steps, 0) == len(steps)
        for n in range(len(steps)):
            rows = slice(int(steps.offsets[n]), int(steps.offsets[n + 1]))
            drawn = slice(int(steps.decode_offsets[n]), int(steps.decode_offsets[n + 1]))
            changed = slice(int(steps.update_offsets[n]), int(steps.update_offsets[n + 1]))
            count = rows.stop - rows.start
            width = int(random.integers(count, MAX_WIDTH + 1))
            expected_slots[steps.update_slots[changed]] = steps.update_positions[changed]
            device.launch(ADVANCE, outputs.arguments(ring, width), 1, threads)

            sources, positions, sinks = steps.sources[rows], steps.positions[rows], steps.sinks[rows]
            np.testing.assert_array_equal(outputs.sources[:width], np.r_[sources, np.zeros(width - count)])
            padded = np.r_[positions, np.full(width - count, positions[-1])]
            np.testing.assert_array_equal(outputs.positions[:width], padded)
            wanted = np.full(width, SCRATCH)
            wanted[steps.decoded[drawn]] = sinks[steps.decoded[drawn]]
            np.testing.assert_array_equal(outputs.sinks[:width], wanted)
            np.testing.assert_array_equal(outputs.uniforms[steps.decoded[drawn]], steps.uniforms[drawn])
            np.testing.assert_array_equal(outputs.slot_position, expected_slots)
            numbers = (outputs.write_index[0], outputs.live[0], outputs.top_k[0])
            assert numbers == (10 * block + n, 10 * block + n + 1, 10 * block)
            assert (outputs.temperature[0], outputs.top_p[0]) == (np.float32(0.5), np.float32(0.9))
        assert outputs.cursor[0] == (HALF_WORDS if block % 2 == 0 else 0)


def test_a_block_is_sent_without_the_unused_end_of_its_buffer(kernels: ctypes.CDLL) -> None:
    device = HostDevice(kernels)
    ring = RecordRing(device)
    row = np.zeros(1, np.int32)
    ring.send(Steps.single(row, row, row, row, np.zeros(1, np.float32), 0, 1), 0)
    assert device.log[-1] == ("upload", ring.address, 4 * (HEADER_WORDS + 4 + 2))


@pytest.mark.parametrize("build", ["host build", "NumPy"])
@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 3),
    width=st.integers(1, 5),
    start=st.integers(0, 7),
    dtype=st.sampled_from([np.int8, np.float16, np.float32]),
    threads=st.sampled_from([1, 5, 1024]),
)
def test_append_writes_rows_and_tokens(
    kernels: ctypes.CDLL, build: str, groups: int, width: int, start: int, dtype: type, threads: int
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
    device = HostDevice(kernels if build == "host build" else None)
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
        row_chunks=size * np.dtype(dtype).itemsize // device.chunk_bytes,
    )
    memory = [*rows, *buffers, row_pointers, buffer_pointers, tokens, sinks, token_buffer, write_index]
    device._memory |= {array.ctypes.data: array.reshape(-1).view(np.uint8) for array in memory}
    device.launch(APPEND, arguments, 1, threads)
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
