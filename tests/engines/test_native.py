"""The step kernels by their host build, and what CMake and nvcc make of the device build."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass, replace
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

from diagd.engines.devices.kernels import (
    ADVANCE,
    APPEND,
    HEADER_WORDS,
    HOST_NAME,
    KERNELS,
    SAMPLE,
    AdvanceArguments,
    AppendArguments,
    DrawArguments,
    SampleArguments,
    address,
    compile_kernels,
    fits,
    host_build,
    kernel_source,
)
from diagd.engines.engine import VOID, SamplingState, Steps
from diagd.engines.records import HALF_WORDS, RecordRing
from diagd.engines.sampler import draw_compiled, draw_plain
from diagd.errors import EngineError
from tests.engines.host_device import ROOT, HostDevice, host_kernels
from tests.engines.sampling_reference import kept_probabilities, rows

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
MAX_WIDTH, UPDATES, PLACES, CAPACITY, PREFIX = 6, 8, 50, 32, 3


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return host_kernels()


def test_arguments_have_the_layout_of_the_kernels(kernels: ctypes.CDLL) -> None:
    assert kernels.diagd_advance_arguments_size() == ctypes.sizeof(AdvanceArguments)
    assert kernels.diagd_sample_arguments_size() == ctypes.sizeof(SampleArguments)
    assert kernels.diagd_append_arguments_size() == ctypes.sizeof(AppendArguments)
    assert kernels.diagd_draw_arguments_size() == ctypes.sizeof(DrawArguments)
    assert fits(kernels) and not fits(ctypes.CDLL(None))


def test_a_host_build_of_another_system_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / (HOST_NAME + EXTENSION_SUFFIXES[0])).write_bytes(b"\x7fELF of another system")
    monkeypatch.setattr("diagd.engines.devices.kernels.__file__", str(tmp_path / "kernels.py"))
    assert host_build.__wrapped__() is None


class Outputs:
    """The fixed tensors that ``advance`` fills."""

    def __init__(self) -> None:
        self.cursor = np.zeros(2, np.int32)
        self.sources, self.positions = (np.full(MAX_WIDTH, -7, np.int32) for _ in range(2))
        self.write_index, self.live = np.zeros(1, np.int64), np.zeros(1, np.int32)
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
        )


def random_steps(random: np.random.Generator, count: int, first: int) -> Steps:
    """Steps of any widths that change any slots; step n writes slot ``first`` + n."""
    widths = random.integers(1, MAX_WIDTH + 1, count)
    offsets = np.cumsum([0, *widths]).astype(np.int32)
    sources, positions = random.integers(0, PLACES, (2, offsets[-1]), np.int32)
    decoding = random.random(offsets[-1]) < 0.5
    sinks = random.integers(0, PLACES, int(decoding.sum()), np.int32)
    draws = np.searchsorted(np.flatnonzero(decoding), offsets).astype(np.int32)
    rows = np.concatenate([np.arange(width) for width in widths])
    changes = [random.permutation(CAPACITY)[: random.integers(0, UPDATES + 1)] for _ in range(count)]
    updates = np.cumsum([0, *map(len, changes)]).astype(np.int32)
    start = np.arange(first, first + count, dtype=np.int32)
    return Steps(
        offsets,
        sources,
        positions,
        draws,
        rows[decoding].astype(np.int32),
        sinks,
        random.integers(0, 1 << 40, len(sinks)),
        start,
        start + 1,
        updates,
        np.concatenate(changes).astype(np.int32),
        random.integers(0, 99, updates[-1], np.int32),
        SamplingState(0.5, first, 0.9, (7 << 32) + first),
    )


@pytest.mark.parametrize("build", ["host build", "NumPy"])
@settings(max_examples=25)
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

            sources, positions = steps.sources[rows], steps.positions[rows]
            np.testing.assert_array_equal(outputs.sources[:width], np.r_[sources, np.zeros(width - count)])
            padded = np.r_[positions, np.full(width - count, positions[-1])]
            np.testing.assert_array_equal(outputs.positions[:width], padded)
            np.testing.assert_array_equal(outputs.slot_position, expected_slots)
            assert (outputs.write_index[0], outputs.live[0]) == (10 * block + n, 10 * block + n + 1)
            record = device._words(ring.address)[int(outputs.cursor[1]) :]
            whole = device._words(ring.address)
            count = drawn.stop - drawn.start
            assert record[4] == count
            assert record[[5, 7]].view(np.float32).tolist() == [0.5, np.float32(0.9)]
            assert record[[6, 8, 9]].tolist() == [10 * block, 10 * block, 7]
            columns: list[np.ndarray] = [steps.decoded, steps.sinks, steps.cells]
            for start, column in zip(record[13:16], columns, strict=True):
                found = whole[start : start + count * column.itemsize // 4].copy().view(column.dtype)
                np.testing.assert_array_equal(found, column[drawn])
        assert outputs.cursor[0] == (HALF_WORDS if block % 2 == 0 else 0)


def test_a_block_is_sent_without_the_unused_end_of_its_buffer(kernels: ctypes.CDLL) -> None:
    device = HostDevice(kernels)
    ring = RecordRing(device)
    row = np.zeros(1, np.int32)
    ring.send(Steps.single(row, row, row, row, 0, 1), 0)
    assert device.log[-1] == ("upload", ring.address, 4 * (HEADER_WORDS + 2 + 4 + 2))


Kind = type[np.generic]


@pytest.mark.parametrize("build", ["host build", "NumPy"])
@settings(max_examples=25)
@given(
    groups=st.integers(1, 3),
    width=st.integers(1, 5),
    start=st.integers(0, 7),
    dtype=st.sampled_from([np.int8, np.float16, np.float32]),
    threads=st.sampled_from([1, 5, 1024]),
)
def test_append_writes_rows(
    kernels: ctypes.CDLL, build: str, groups: int, width: int, start: int, dtype: Kind, threads: int
) -> None:
    capacity, size, count = 12, 16, 4
    random = np.random.default_rng(width)
    buffers = [(99 * random.random((groups, capacity, size))).astype(dtype) for _ in range(count)]
    rows = [(99 * random.random((groups, width, size))).astype(dtype) for _ in range(count)]
    expected = [buffer.copy() for buffer in buffers]
    for buffer, new in zip(expected, rows, strict=True):
        buffer[:, start : start + width] = new
    write_index = np.array([start], np.int64)
    row_pointers = np.array([array.ctypes.data for array in rows], np.uint64)
    buffer_pointers = np.array([array.ctypes.data for array in buffers], np.uint64)
    device = HostDevice(kernels if build == "host build" else None)
    arguments = AppendArguments(
        rows=row_pointers.ctypes.data,
        buffers=buffer_pointers.ctypes.data,
        write_index=write_index.ctypes.data,
        tensors=count,
        groups=groups,
        capacity=capacity,
        width=width,
        row_chunks=size * np.dtype(dtype).itemsize // device.chunk_bytes,
    )
    memory = [*rows, *buffers, row_pointers, buffer_pointers, write_index]
    device._memory |= {array.ctypes.data: array.reshape(-1).view(np.uint8) for array in memory}
    device.launch(APPEND, arguments, 1, threads)
    for buffer, wanted in zip(buffers, expected, strict=True):
        np.testing.assert_array_equal(buffer, wanted)


@dataclass(frozen=True)
class Law:
    """Logits [R, V] of the cells [R], the ids [low, high) at each place of a frame, and the rules."""

    logits: np.ndarray
    cells: np.ndarray
    ranges: np.ndarray
    state: SamplingState
    keep_crossing: bool

    @property
    def allowed(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.ranges[(self.cells - PREFIX) % len(self.ranges)].T
        return low, high

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.logits, self.cells, self.state, *self.allowed, self.keep_crossing)

    def sampled(self) -> np.ndarray:
        return draw_plain(*self.arguments)

    def launched(self, device: HostDevice, threads: int) -> tuple[np.ndarray, int]:
        """Tokens [R] that a device writes, -1 where none, and its refusal."""
        rows, ids = self.logits.shape
        order = np.random.default_rng(0).permutation(rows).astype(np.int32)  # draws are in any order of rows
        ring, cursor = RecordRing(device), device.allocate(8)
        arrays = {
            "logits": self.logits,
            "ranges": self.ranges,
            "token_buffer": np.full(rows, -1, np.int32),
            "refused": np.zeros(1, np.uint64),
        }
        device._memory |= {array.ctypes.data: array.reshape(-1).view(np.uint8) for array in arrays.values()}
        steps = Steps.single(order, order, order, order, 0, 1, self.state)
        ring.send(replace(steps, cells=self.cells[order]), 0)
        arguments = SampleArguments(
            records=ring.address,
            cursor=cursor,
            **{name: array.ctypes.data for name, array in arrays.items()},
            prefix=PREFIX,
            frame_length=len(self.ranges),
            vocabulary=ids,
            keep_crossing=self.keep_crossing,
            width=rows,
        )
        device.launch(SAMPLE, arguments, rows, threads)
        return arrays["token_buffer"], int(arrays["refused"][0])


@st.composite
def laws(draw: st.DrawFn, ids: int, most: int) -> Law:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, places = draw(st.integers(1, most)), 5
    ranges = np.tile(np.array([0, ids], np.int32), (places, 1))
    if draw(st.booleans()):
        ranges[:, 0] = random.integers(0, ids // 3, places)
        ranges[:, 1] = random.integers(ids // 2, ids, places)
    logits = draw(rows(count, ids))
    logits[random.random(logits.shape) < draw(st.sampled_from([0.0, 0.1]))] = -np.inf
    logits[np.arange(count), ids // 2 - 1] = draw(st.sampled_from([-30.0, 0.0, -0.0, 9.0]))  # one is finite
    state = SamplingState(
        draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        draw(st.sampled_from([0, 0, 1, 2, 7, 50, ids - 1, ids, 10**9])),
        draw(st.sampled_from([1.0, 0.999999, 0.95, 0.8, 0.3, 1e-6])),
        draw(st.integers(0, 2**64 - 1)),
    )
    return Law(logits, random.integers(PREFIX, 1 << 40, count), ranges, state, draw(st.booleans()))


@pytest.mark.parametrize("build", ["host build", "NumPy"])
@pytest.mark.parametrize(("ids", "most"), [(107, 128), (600, 30), (8192, 8)])
@settings(max_examples=25)
@given(data=st.data(), threads=st.sampled_from([1, 3, 64]))
def test_sample_draws_what_numpy_draws(
    kernels: ctypes.CDLL, build: str, ids: int, most: int, data: st.DataObject, threads: int
) -> None:
    law = data.draw(laws(ids, most))
    device = HostDevice(kernels if build == "host build" else None)
    tokens, refused = law.launched(device, threads)
    np.testing.assert_array_equal(tokens, law.sampled())
    assert refused == 0


@pytest.mark.parametrize(("ids", "most"), [(5, 3), (107, 128), (600, 30), (8192, 8)])
@settings(max_examples=60)
@given(data=st.data())
def test_the_processor_draws_what_numpy_draws(
    kernels: ctypes.CDLL, ids: int, most: int, data: st.DataObject
) -> None:
    law = data.draw(laws(ids, most))
    np.testing.assert_array_equal(draw_compiled(kernels, *law.arguments), law.sampled())


def test_the_processor_draws_by_the_seed(kernels: ctypes.CDLL) -> None:
    logits, low, high = np.zeros((1, 99), np.float32), np.full(1, 3, np.int32), np.full(1, 98, np.int32)
    laws = [(logits, np.full(1, 7), SamplingState(1.0, 0, 0.9, n << 30), low, high, True) for n in range(40)]
    tokens = np.concatenate([draw_compiled(kernels, *law) for law in laws])
    np.testing.assert_array_equal(tokens, np.concatenate([draw_plain(*law) for law in laws]))
    assert len(set(tokens.tolist())) > 10


def test_rows_with_seeds_of_their_own_are_drawn_as_each_alone(kernels: ctypes.CDLL) -> None:
    random, rules, most = np.random.default_rng(3), SamplingState(0.9, 20, 0.9), 2**64 - 1
    logits, cells = random.standard_normal((9, 99)).astype(np.float32), random.integers(0, 1 << 40, 9)
    low, high = random.integers(0, 9, 9).astype(np.int32), random.integers(50, 99, 9).astype(np.int32)
    seeds = np.array([5, 5, most, 5, 0, most, 6, 6, 1 << 32], np.uint64)
    given = logits, cells, rules, low, high, True, seeds
    alone = [
        draw_plain(
            logits[row, None], cells[row, None], replace(rules, seed=int(seed)), low[[row]], high[[row]], True
        )[0]
        for row, seed in enumerate(seeds)
    ]
    np.testing.assert_array_equal(draw_compiled(kernels, *given), alone)
    np.testing.assert_array_equal(draw_plain(*given), alone)


@pytest.mark.parametrize("keep_crossing", [True, False])
@pytest.mark.parametrize("spread", [0.05, 0.6, 2.5, 8.0])
def test_a_vocabulary_of_64000_ids(kernels: ctypes.CDLL, spread: float, keep_crossing: bool) -> None:
    random = np.random.default_rng(0)
    logits = (random.standard_normal((3, 64_000)) * spread).astype(np.float32)
    ranges, cells = np.array([[0, 64_000]], np.int32), random.integers(0, 1 << 40, 3)
    for state in (SamplingState(1.0, 0, 0.8, 5), SamplingState(0.7, 1024, 0.95, 6)):
        law = Law(logits, cells, ranges, state, keep_crossing)
        tokens, _ = law.launched(HostDevice(kernels), 32)
        np.testing.assert_array_equal(tokens, law.sampled())
        np.testing.assert_array_equal(draw_compiled(kernels, *law.arguments), law.sampled())


def test_the_kernel_follows_the_exact_law(kernels: ctypes.CDLL) -> None:
    row = (np.random.default_rng(3).standard_normal(64) * 1.5).astype(np.float32)
    state, count = SamplingState(0.8, 40, 0.9, 17), 20_000
    ranges, parts = np.array([[0, 64]], np.int32), np.split(np.arange(count) + PREFIX, 4)
    drawn = [Law(np.tile(row, (len(cells), 1)), cells, ranges, state, True) for cells in parts]
    tokens = np.concatenate([law.launched(HostDevice(kernels), 1)[0] for law in drawn])
    expected, _ = kept_probabilities(row, state.temperature, state.top_k, state.top_p, True)
    observed, kept = np.bincount(tokens, minlength=64), expected > 0
    assert not observed[~kept].any()
    assert (expected[kept] * count).min() > 5
    assert scipy.stats.chisquare(observed[kept], expected[kept] * count).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [np.nan, -np.nan, np.inf, -np.inf], ids=str)
def test_rows_that_are_not_finite_are_refused(
    kernels: ctypes.CDLL, poison: float, temperature: float
) -> None:
    """NaN or infinity anywhere, or nothing but minus infinity; the other rows are drawn."""
    logits = np.zeros((3, 9), np.float32)
    logits[1, 4 if poison != -np.inf else slice(None)] = poison
    law = Law(logits, np.arange(3), np.array([[0, 9]], np.int32), SamplingState(temperature), True)
    tokens, refused = law.launched(HostDevice(kernels), 2)
    assert (tokens[[0, 2]] >= 0).all() and tokens[1] == -1
    largest = np.uint32(refused & 0xFFFFFFFF).view(np.float32)
    assert refused >> 32 and (np.isnan(largest) if np.isnan(poison) else largest == poison)
    expected = r"largest logit of row \d is (nan|inf|-inf); expected a finite"
    with pytest.raises(EngineError, match=expected):
        law.launched(HostDevice(None), 1)
    with pytest.raises(EngineError, match=expected) as plain:
        law.sampled()
    with pytest.raises(EngineError, match=expected) as compiled:
        draw_compiled(kernels, *law.arguments)
    assert str(compiled.value) == str(plain.value)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cmake_builds_ptx_with_all_kernels(tmp_path: Path, kernels: ctypes.CDLL) -> None:
    del kernels
    target = tmp_path / "step_kernels.ptx"
    source = ROOT / "native" / "step_kernels.cu"
    options = ["-ptx", "-std=c++17", "-fmad=false", "-arch=compute_75", "-o", str(target)]
    subprocess.run(["nvcc", *options, str(source)], check=True, capture_output=True)
    text = target.read_text()
    assert text.count(".entry") == 3
    assert all(f".entry {name}(" in text for name in KERNELS)
    assert "fma." not in text


def test_the_source_is_found_in_a_checkout() -> None:
    source, headers = kernel_source()
    assert all(f"void {name}(" in source for name in KERNELS)
    assert "struct AdvanceArguments" in headers["step_kernels.h"]
    assert "draw_row(" in headers["sampling.h"]


def test_addresses_are_those_that_numpy_tells() -> None:
    whole, still = np.zeros((2, 4, 6), np.float32)
    still.flags.writeable = False
    for array in (whole, whole[1:], whole[:, 1:], whole[:0], still):
        assert address(array) == array.ctypes.data


def test_nvrtc_compiles_the_kernels_without_a_gpu() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    pytest.importorskip("nvidia.cu13", reason="NVRTC's library is not installed")
    code = compile_kernels(90)
    assert code.startswith(b"\x7fELF")
    assert all(f".text.{name}\0".encode() in code for name in KERNELS)
