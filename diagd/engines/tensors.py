"""The tensors of a step at their fixed addresses, and the programs that are bound to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from diagd.bundle import Manifest
from diagd.bundle.manifest import StepGraph
from diagd.engines.devices import Device
from diagd.errors import BundleError, EngineError

ALIGNMENT = 64

WIDTH = -1

REFUSAL_WORDS = 3
"""Words behind the token buffer for the sampler's refusal, two at an even place."""


def aligned_zeros(
    shape: Sequence[int], dtype: np.dtype[np.generic] | type[np.generic]
) -> NDArray[np.generic]:
    """A zero-filled array whose data starts on a cache line; untouched pages take no memory."""
    size: int = np.empty(0, dtype).itemsize * math.prod(shape)
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def cache_tensors(layers: int) -> list[str]:
    """Names of the K/V buffers in graph order: key_0, value_0, key_1, ..."""
    return [f"{kind}_{layer}" for layer in range(layers) for kind in ("key", "value")]


def text_buffers(manifest: Manifest) -> dict[str, NDArray[np.generic]]:
    """Buffers of a text's keys and values by input of the step graph; none for models without text."""
    if manifest.text is None:
        return {}
    cache = manifest.cache
    shape = (cache.kv_heads, manifest.text.length, cache.head_size)
    dtype = np.dtype(cache.dtype)
    return {f"text_{name}": aligned_zeros(shape, dtype) for name in cache_tensors(cache.layers)}


def rotate_pairs(keys: NDArray[np.generic], angles: NDArray[np.float64]) -> None:
    """Turn keys [..., D] in rotate-half layout by ``angles`` [D / 2], in place.

    The two channels of a pair share the scale of their integers, so int8 keys are turned as they are.
    """
    half = keys.shape[-1] // 2
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = keys[..., :half].astype(np.float32), keys[..., half:].astype(np.float32)
    turned = np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
    if keys.dtype == np.int8:
        turned = np.clip(np.rint(turned), -127, 127)
    keys[...] = turned


@dataclass(frozen=True)
class Tensor:
    """A tensor at a fixed address; -n in ``shape`` is n times the width of the step."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    def at_width(self, width: int) -> tuple[int, ...]:
        """Its shape in a step of ``width`` rows."""
        return tuple(-length * width if length < 0 else length for length in self.shape)

    def part(self, lane: int, streams: int, width: int) -> int:
        """Where the part of one of the streams that share it begins, in a step of ``width`` rows."""
        return self.address + lane * (math.prod(self.at_width(width)) // streams) * self.dtype.itemsize


class Program(Protocol):
    """A compiled step graph.

    ``capturable``: what it queues can be recorded into a graph of the device.
    """

    capturable: bool

    def enqueue(self, width: int) -> None:
        """Queue one step of ``width`` rows."""


MakeProgram = Callable[[Mapping[str, Tensor]], Program]
"""Binds a graph to tensors by name; names the graph does not have are ignored."""


def check_shapes(
    there: Mapping[str, Iterable[object]], inputs: Iterable[str], bound: Mapping[str, Sequence[int]]
) -> None:
    """Refuse (BundleError) a graph whose inputs and outputs are not those of its form and its manifest.

    A length that is no number, or below 0, is any. ``there``: of the graph, by name. ``bound``: of what the
    engine binds; it may have more, but for K/V rows.
    """
    rows = [name for name in bound if name.startswith("past_")]
    for name in (*rows, *inputs, "logits"):
        shape, told = list(there.get(name, [])), list(bound.get(name, []))
        known = [length if isinstance(length, int) else -1 for length in shape]
        if len(shape) != len(told) or any(a != b for a, b in zip(known, told, strict=True) if min(a, b) >= 0):
            raise BundleError(
                f"'{name}' has the shape {shape} in the step graph, by its form and the manifest {told}: the "
                "bundle is of another version of diagd, or its manifest was changed; export it again"
            )


class StepTensors:
    """Allocates once; every width reads and writes the same memory.

    Attributes:
        streams: that share a step.
        named: tensors by their names in step graphs.
        cache: K/V buffers [B, G, S, D] by ``key_0``, ``value_0``, ...
        text: rows of a text by their names in step graphs.
        rows: new K/V rows [B, G, W, D] in the order of ``cache``; none where the graph writes the buffers.
    """

    def __init__(
        self,
        manifest: Manifest,
        graph: StepGraph,
        max_width: int,
        tokens: int,
        device: Device,
        watch: Mapping[str, tuple[int, DTypeLike] | None],
    ) -> None:
        streams, capacity = graph.streams, int(graph.capacity or 0)
        self._device, self._max_width, self.streams = device, max_width, streams
        self.named: dict[str, Tensor] = {}
        lead = (streams,) if streams > 1 else ()
        for name in ("sources", "positions"):
            self._add(name, (*lead, WIDTH), np.int32)
        self._add("token_buffer", (streams * tokens,), np.int32, spare=REFUSAL_WORDS * 4)
        self._add("slot_position", (*lead, capacity), np.int32)
        self._add("write_index", (streams,), np.int64)
        self._add("live", (streams,), np.int32)
        self._add("logits", (streams * WIDTH, manifest.output_vocabulary), np.float32)
        for name, described in watch.items():
            if described is not None:
                self._add(name, (WIDTH, described[0]), np.dtype(described[1]))
        shape = (streams, manifest.cache.kv_heads, capacity, manifest.cache.head_size)
        dtype = manifest.cache_dtype(graph)
        names = cache_tensors(manifest.cache.layers)
        self.cache = {name: self._add(f"past_{name}", shape, dtype) for name in names}
        self.text = {
            name: self._add(name, array.shape, array.dtype) for name, array in text_buffers(manifest).items()
        }
        self.rows: list[Tensor] = []
        if graph.form.traits.rows_out:
            self._add_rows(shape, dtype)
        else:
            self.named |= {f"present_{name}": tensor for name, tensor in self.cache.items()}

    @property
    def token_buffer(self) -> Tensor:
        """Tokens of the window, int32 [N]."""
        return self.named["token_buffer"]

    @property
    def refusal_place(self) -> int:
        """Word of the token buffer, behind its tokens, at which a refusal of the sampler stands: 64 bits."""
        return self.token_buffer.shape[0] + 1 & ~1

    def clear(self) -> None:
        """Zero buffers and tokens: what a hidden slot holds must be finite."""
        for tensor in (*self.cache.values(), self.token_buffer):
            self._device.clear(tensor.address, math.prod(tensor.shape) * tensor.dtype.itemsize)

    def _add(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[np.generic] | type[np.generic],
        spare: int = 0,
    ) -> Tensor:
        kind = np.dtype(dtype)
        size = math.prod(Tensor(0, shape, kind).at_width(self._max_width)) * kind.itemsize
        self.named[name] = Tensor(self._device.allocate(size + spare), shape, kind)
        return self.named[name]

    def _add_rows(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
        chunk = self._device.chunk_bytes
        if shape[3] * dtype.itemsize % chunk:
            raise EngineError(
                f"a row of {shape[3]} values of {dtype} has {shape[3] * dtype.itemsize} bytes, the append "
                f"kernel moves {chunk} at a time: it needs heads of a multiple of "
                f"{chunk // dtype.itemsize} channels"
            )
        streams, groups, _, size = shape
        self.rows = [self._add(f"new_{name}", (streams, groups, WIDTH, size), dtype) for name in self.cache]

    def pointers(self, tensors: Iterable[Tensor], lane: int, width: int) -> int:
        """A device array of where a stream's part of each tensor begins, in a step of ``width`` rows."""
        tensors = list(tensors)
        addresses = self._device.host_array((len(tensors),), np.uint64)
        addresses[:] = [tensor.part(lane, self.streams, width) for tensor in tensors]
        target = self._device.allocate(addresses.nbytes)
        self._device.upload(target, addresses)
        self._device.synchronise()
        return target
