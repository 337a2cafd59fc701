"""Rounding, against plain arithmetic."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagd.bundle.precision import GROUP
from diagd.calibration.matrices import (
    encode_groups,
    pad_groups,
    ranges,
    rounded_rows,
    rounded_weight,
)
from diagd.calibration.options import SCHEMES, CalibrationOptions
from diagd.errors import UsageError
from diagd.export.weights import row_chunks


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def test_eight_bit_columns_are_off_by_half_a_step_at_most() -> None:
    weight = matrix(100, 7) * np.logspace(-3, 3, 7, dtype=np.float32)
    steps = np.abs(weight).max(0) / 127
    error = np.abs(rounded_weight(weight, SCHEMES["int8"], grouped=False) - weight)
    assert (error <= 0.5001 * steps).all()
    assert (error.max(0) > 0.3 * steps).all()


@pytest.mark.parametrize(("bits", "top"), [(4, 7), (8, 127)])
def test_groups_have_scales_of_their_own(bits: int, top: int) -> None:
    weight = matrix(2 * GROUP, 3)
    weight[GROUP:] *= 1000
    integers, scales = encode_groups(weight, bits)
    assert integers.shape == (2, GROUP, 3)
    assert integers.min() >= -top - 1
    assert integers.max() <= top
    error = np.abs((integers * scales[:, None]).reshape(weight.shape) - weight)
    assert error[:GROUP].max() < 1  # a scale shared with the large half would be hundreds


def test_clipping_a_group_never_costs_more_than_its_largest_value() -> None:
    weight = matrix(GROUP, 50)
    integers, scales = encode_groups(weight, 4)
    plain_scale = np.abs(weight).max(0) / 7
    plain = np.clip(np.rint(weight / plain_scale), -8, 7) * plain_scale
    ours = (integers * scales[:, None]).reshape(weight.shape)
    assert (((ours - weight) ** 2).sum(0) <= ((plain - weight) ** 2).sum(0) * 1.0001).all()
    assert ((ours - weight) ** 2).sum() < 0.95 * ((plain - weight) ** 2).sum()


@given(st.integers(1, 400))
def test_groups_are_filled_up_with_zeros(rows: int) -> None:
    weight = np.ones((rows, 2), np.float32)
    padded = pad_groups(weight)
    assert len(padded) % GROUP == 0
    assert len(padded) - rows < GROUP
    assert padded.sum() == weight.sum()


def test_fp8_is_the_type_s_own_rounding() -> None:
    weight = matrix(64, 4)
    scale = np.abs(weight).max(0) / 448
    expected = (weight / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    assert np.allclose(rounded_weight(weight, SCHEMES["fp8"], grouped=False), expected)


def test_a_row_s_scale_is_its_own() -> None:
    rows = matrix(5, 40)
    rows[2] *= 1e4
    rows[4] = 0
    rounded = rounded_rows(rows, None, SCHEMES["int8-dynamic"])
    assert np.array_equal(rounded[:2], rounded_rows(rows[:2], None, SCHEMES["int8-dynamic"]))
    assert not rounded[4].any()


def test_static_activations_saturate_at_the_range() -> None:
    rounded = rounded_rows(np.asarray([[100.0, -100.0, 0.5]], np.float32), 1.27, SCHEMES["int8"])
    assert np.allclose(rounded, [[1.27, -1.28, 0.5]], atol=0.005)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_static_activations_that_are_always_zero_stay_zero(scheme: str) -> None:
    zeros = np.zeros((2, 5), np.float32)
    with np.errstate(all="raise"):
        assert not rounded_rows(zeros, max(ranges(zeros)), SCHEMES[scheme]).any()


@given(st.integers(1, 300), st.integers(1, 3000), st.sampled_from([1, GROUP]))
def test_chunks_cover_every_row_once(rows: int, columns: int, multiple: int) -> None:
    covered = [
        row for chunk in row_chunks((rows, columns), multiple) for row in range(chunk.start, chunk.stop)
    ]
    assert covered == list(range(rows))


def test_ranges_give_up_a_lone_outlier_or_keep_it() -> None:
    values = matrix(400, 1000).ravel()
    values[0] = 20
    limits = ranges(values)
    assert 2 < min(limits) < 15
    assert max(limits) <= 20.0001


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="did you mean 'int4-weight'"):
        _ = CalibrationOptions("int4-weights").scheme
