"""Matrices as the export stored them, and in fewer bits: modules that stand for them while a step is traced.

On the CPU static activations are uint8 with zero point 128, which is the same arithmetic as int8 with zero
point 0 and the faster product on every x86 with VNNI or AMX; TensorRT takes int8 with zero point 0 only.
Weight-only products are MatMulNBits on the CPU, which has no other quick kernel for them, and a
DequantizeLinear ahead of the product for TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diagd.bundle import Form
from diagd.bundle.precision import GROUP, Precision
from diagd.engines.engine import Float
from diagd.export.tracing import FunctionModule, cast, onnx_operator
from diagd.export.weights import StoredWeights, WeightSource, constant, row_chunks

Array = NDArray[Any]

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of a group's largest weight that are tried as its range."""

PERCENTILES = (99.9, 99.99, 99.999, 100.0)
"""Of the magnitudes of activations, that are tried as their range."""

SMALLEST = np.float32(1e-12)
E4M3_MAX = 448.0

INTEGER_ACCURACY = 4
"""MatMulNBits rounds activations to 8 bits by group; without it the product is 5 to 33 times slower."""

QUANTISED_OPSET, BLOCKED_OPSET = 19, 21
"""DequantizeLinear takes float16 scales from 19 on, blocks and 4 bits from 21 on. TensorRT 10.3 documents
opset 20: no graph declares more than it needs."""

INT4, FP8 = np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.float8_e4m3fn)

PLACEHOLDERS = {INT4: torch.int8, FP8: torch.float8_e4m3fn}
"""Types of buffers while they are traced, where PyTorch or its NumPy has no name for them."""

Sources = Mapping[str, WeightSource]


@dataclass(frozen=True)
class Weight:
    """A stored tensor [N] or [K, N] with factors of its rows and columns, read in blocks.

    ``rows``: float32 [K], multiplied. ``columns``: float32 [N], divided by. ``dtype``: of what is computed
    with it.
    """

    stored: StoredWeights
    name: str
    dtype: np.dtype[Any]
    rows: Float | None = None
    columns: Float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[K, N]; K is 1 for vectors."""
        shape: tuple[int, int] = np.atleast_2d(self.stored[self.name]).shape
        return shape

    def block(self, rows: slice, columns: slice = slice(None)) -> Float:
        """float32 [rows, columns]."""
        # Mapped anew each time: pages of a map that is kept would add up to the whole file.
        block = np.asarray(np.atleast_2d(self.stored[self.name])[rows, columns], np.float32)
        if self.rows is not None:
            block = block * self.rows[rows, None]
        return block if self.columns is None else block / self.columns[columns]

    def source(self) -> WeightSource:
        """The tensor with its factors applied."""

        def chunks() -> Iterator[Array]:
            for rows in row_chunks(self.shape):
                yield self.block(rows)

        return WeightSource(self.stored[self.name].shape, chunks, self.dtype)


def fp8(values: Array) -> Array:
    """Round to E4M3, saturating."""
    return np.clip(values, -E4M3_MAX, E4M3_MAX).astype(FP8)


def column_limit(weight: str) -> float:
    """Largest number that a column's scale maps to."""
    return E4M3_MAX if weight == "fp8" else 127.0


def encode_columns(weight: Array, scale: Float, kind: str) -> Array:
    """Integers (or E4M3 numbers) of a block [n, N] with a scale for each column [N]."""
    scaled = weight / scale
    if kind == "fp8":
        return fp8(scaled)
    return np.clip(np.rint(scaled), -127, 127).astype(np.int8)


def encode_groups(
    weight: Array, bits: int, smallest: np.float32 = SMALLEST
) -> tuple[NDArray[np.int8], Float]:
    """Symmetric integers [g, GROUP, N] and scales [g, N] of rows [g * GROUP, N].

    The range of each 4-bit group is the share of its largest weight that costs the least squared error, and
    reaches as far as ``smallest``.
    """
    groups = weight.reshape(-1, GROUP, weight.shape[1])
    top = 2 ** (bits - 1) - 1
    largest = np.maximum(np.abs(groups).max(axis=1), smallest)
    best = np.full(largest.shape, np.inf, np.float32)
    scales = largest / top
    for clip in CLIPS if bits == 4 else (1.0,):
        scale = (largest * np.float32(clip) / top).astype(np.float32)
        rounded = np.clip(np.rint(groups / scale[:, None]), -top - 1, top) * scale[:, None]
        error = np.square(rounded - groups).sum(axis=1)
        scales = np.where(error < best, scale, scales)
        best = np.minimum(error, best)
    integers = np.clip(np.rint(groups / scales[:, None]), -top - 1, top).astype(np.int8)
    return integers, scales.astype(np.float32)


def pad_groups(weight: Array) -> Array:
    """Rows filled up with zeros to whole groups."""
    return np.pad(weight, ((0, -len(weight) % GROUP), (0, 0)))


def rounded_weight(weight: Float, scheme: Precision, grouped: bool) -> Float:
    """The weight [K, N] as a graph of the scheme sees it; ``grouped`` for 8 bits in groups."""
    if scheme.kind == "int4" or grouped:
        bits = 4 if scheme.kind == "int4" else 8
        integers, scales = encode_groups(pad_groups(weight), bits)
        return (integers * scales[:, None]).reshape(-1, weight.shape[1])[: len(weight)]
    scale = np.maximum(np.abs(weight).max(axis=0), SMALLEST) / np.float32(column_limit(scheme.kind))
    rounded: Float = encode_columns(weight, scale, scheme.kind).astype(np.float32) * scale
    return rounded


def rounded_rows(rows: Float, limit: float | None, scheme: Precision) -> Float:
    """Activations [n, K] as a graph of the scheme sees them; ``limit`` is the static range."""
    if scheme.scaling is None:
        return rows
    if scheme.scaling == "row":
        scale: Any = np.maximum(np.abs(rows).max(axis=1, keepdims=True), SMALLEST) / np.float32(127)
    else:
        scale = np.maximum(np.float32(limit or 0.0), SMALLEST) / np.float32(column_limit(scheme.kind))
    rounded: Float
    if scheme.kind == "fp8":
        rounded = fp8(rows / scale).astype(np.float32) * scale
    else:
        rounded = (np.clip(np.rint(rows / scale), -128, 127) * scale).astype(np.float32)
    return rounded


def ranges(values: Float) -> list[float]:
    """Limits worth trying: magnitudes below which ``PERCENTILES`` per cent of the values [n] lie."""
    return [float(limit) for limit in np.percentile(np.abs(values), PERCENTILES)]


class QuantisedMatrix(FunctionModule):
    """A module in the place of a matrix [K, N].

    ``sources``: data of its buffers, by their names; to be read in order. ``outputs``: N.
    """

    q: Tensor
    scale: Tensor

    def __init__(self, outputs: int, sources: Sources) -> None:
        super().__init__()
        self.outputs, self.sources = outputs, sources
        for name, source in sources.items():
            dtype = PLACEHOLDERS.get(source.dtype) or torch.from_numpy(np.empty(0, source.dtype)).dtype
            self.register_buffer(name, torch.empty(source.shape, dtype=dtype, device="meta"))


class GroupedMatrix(QuantisedMatrix):
    """MatMulNBits (com.microsoft): packed groups [N, groups, GROUP * bits / 8], scales [N, groups]."""

    def __init__(self, weight: Weight, bits: int) -> None:
        (inputs, outputs), groups = weight.shape, -(-weight.shape[0] // GROUP)
        scales = np.empty((outputs, groups), np.float32)

        def packed() -> Iterator[Array]:
            for columns in row_chunks((outputs, inputs)):
                integers, scale = encode_groups(pad_groups(weight.block(slice(None), columns)), bits)
                scales[columns] = scale.T
                yield _packed(integers.transpose(2, 0, 1), bits)

        q = WeightSource((outputs, groups, GROUP * bits // 8), packed, np.dtype(np.uint8))
        super().__init__(outputs, {"q": q, "scale": constant(scales)})
        self._attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": GROUP}

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] times the matrix."""
        return onnx_operator(
            "com.microsoft::MatMulNBits",
            (x, self.q, self.scale),
            x.dtype,
            (*x.shape[:-1], self.outputs),
            accuracy_level=INTEGER_ACCURACY,
            **self._attributes,
        )


class DequantisedMatrix(QuantisedMatrix):
    """DequantizeLinear of the weight ahead of the product, and of a rounded input where ``x_scale`` is given.

    Its ``x_zero`` is then given too. ``axis``: of the scales. ``group``: rows that share one, 0 where a scale
    is a column's. ``kernel``: name of a function that the whole product is.
    """

    x_scale: Tensor
    x_zero: Tensor

    def __init__(
        self, outputs: int, sources: Sources, axis: int = 1, group: int = 0, kernel: str = ""
    ) -> None:
        super().__init__(outputs, sources)
        self._attributes = {"axis": axis, "block_size": group} if group else {"axis": axis}
        self._kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] times the matrix."""
        rounding = (self.x_scale, self.x_zero) if "x_scale" in self.sources else ()
        return self.call(self._kernel, self._product, (x, self.q, self.scale, *rounding), self.outputs)

    def _product(self, x: Tensor, q: Tensor, scale: Tensor, *rounding: Tensor) -> Tensor:
        if rounding:
            x_q = onnx_operator("QuantizeLinear", (x, *rounding), rounding[1].dtype, x.shape)
            x = onnx_operator("DequantizeLinear", (x_q, *rounding), x.dtype, x.shape)
        return x @ onnx_operator("DequantizeLinear", (q, scale), x.dtype, q.shape, **self._attributes)


class RowScaledMatrix(QuantisedMatrix):
    """MatMulInteger of rows that are divided by their largest magnitude / 127: none depends on another."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [W, K] times the matrix."""
        return self.call("Int8ProductByRow", self._product, (x, self.q, self.scale), self.outputs)

    def _product(self, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        # ONNX Runtime 1.31 keeps the reduced axis of an array without rows at its full size.
        first = torch.zeros(1, dtype=torch.int64, device=x.device)
        reach = onnx_operator("Gather", (largest, first), x.dtype, largest.shape, axis=-1)
        reach = reach.clamp(min=float(SMALLEST))
        x_scale = reach * (1 / 127)
        one = torch.ones((), dtype=x.dtype, device=x.device)
        zero = torch.full((), 128, dtype=torch.uint8, device=x.device)
        x_q = onnx_operator("QuantizeLinear", (x / x_scale, one, zero), torch.uint8, x.shape)
        total = onnx_operator("MatMulInteger", (x_q, q, zero), torch.int32, (*x.shape[:-1], q.shape[1]))
        return cast(total, x.dtype) * (x_scale * scale)


class EitherMatrix(nn.Module):
    """A matrix, as ``plain``, and what may stand for it: one trace serves every choice among them.

    ``on`` and ``off`` are 1 and 0 for the stand-in, 0 and 1 for the matrix; what is not chosen adds zero.
    """

    on: Tensor
    off: Tensor

    def __init__(self, rounded: QuantisedMatrix, inputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rounded = rounded
        self.plain = nn.Parameter(torch.empty(inputs, rounded.outputs, dtype=dtype, device="meta"))
        for name in ("on", "off"):
            self.register_buffer(name, torch.empty((), dtype=dtype, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] times one of both."""
        rounded: Tensor = self.rounded(x * self.on)
        return rounded + (x * self.off) @ self.plain


def quantised_matrix(weight: Weight, limit: float | None, scheme: Precision, form: Form) -> QuantisedMatrix:
    """What stands for a matrix in graphs of a form.

    ``limit``: range of static activations, None for schemes without. The weight is migrated.
    """
    if scheme.scaling is None and form.traits.host:
        return GroupedMatrix(weight, 4 if scheme.kind == "int4" else 8)
    outputs = weight.shape[1]
    if scheme.kind == "int4":
        return DequantisedMatrix(outputs, _blocks(weight), axis=0, group=GROUP)
    columns = _columns(weight, scheme)
    if scheme.scaling == "row":
        return RowScaledMatrix(outputs, columns)
    if limit is None:
        return DequantisedMatrix(outputs, columns)
    kernel = "Int8Product" if form.traits.host and scheme.kind == "int8" else ""
    rounding = _input_scale(limit, weight.dtype, scheme, form)
    return DequantisedMatrix(outputs, {**columns, **rounding}, kernel=kernel)


def _columns(weight: Weight, scheme: Precision) -> Sources:
    """int8 or E4M3 [K, N] and a scale for each column [N]."""

    @cache
    def scale() -> Array:
        reach = np.zeros(weight.shape[1], np.float32)
        for rows in row_chunks(weight.shape):
            reach = np.maximum(reach, np.abs(weight.block(rows)).max(axis=0))
        found = np.maximum(reach, SMALLEST) / np.float32(column_limit(scheme.kind))
        smallest = np.finfo(weight.dtype).tiny
        return np.asarray(np.maximum(found.astype(weight.dtype), smallest))

    def encoded() -> Iterator[Array]:
        for rows in row_chunks(weight.shape):
            yield encode_columns(weight.block(rows), scale().astype(np.float32), scheme.kind)

    dtype = FP8 if scheme.kind == "fp8" else np.dtype(np.int8)
    return {
        "q": WeightSource(weight.shape, encoded, dtype),
        "scale": WeightSource(weight.shape[1:], lambda: iter([scale()]), weight.dtype),
    }


def _blocks(weight: Weight) -> Sources:
    """int4 [K, N] and a scale for each ``GROUP`` rows and column."""
    inputs, outputs = weight.shape
    scales: Float = np.empty((-(-inputs // GROUP), outputs), np.float32)
    smallest = np.float32(8 * np.finfo(weight.dtype).smallest_subnormal)  # no scale may become 0

    def encoded() -> Iterator[Array]:
        for rows in row_chunks(weight.shape, GROUP):
            block = weight.block(rows)
            integers, scale = encode_groups(pad_groups(block), 4, np.maximum(smallest, SMALLEST))
            scales[rows.start // GROUP : rows.start // GROUP + len(scale)] = scale
            yield integers.reshape(-1, outputs)[: len(block)].astype(INT4)

    return {
        "q": WeightSource(weight.shape, encoded, INT4),
        "scale": WeightSource(scales.shape, lambda: iter([scales]), weight.dtype),
    }


def _input_scale(limit: float, dtype: np.dtype[Any], scheme: Precision, form: Form) -> Sources:
    scale = max(limit / column_limit(scheme.kind), float(np.finfo(dtype).tiny))
    if scheme.kind == "fp8":
        zero: NDArray[Any] = np.zeros((), FP8)
    else:
        zero = np.asarray(128, np.uint8) if form.traits.host else np.asarray(0, np.int8)
    return {"x_scale": constant(np.asarray(scale, dtype)), "x_zero": constant(zero)}


def _packed(integers: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Symmetric integers as unsigned ones, two 4-bit ones in a byte, the first in the low half."""
    unsigned: NDArray[np.uint8] = (integers.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 8:
        return unsigned
    packed: NDArray[np.uint8] = (unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)).astype(np.uint8)
    return packed
