"""Two models' predictions against each other: the figures, against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from diagd.runtime.comparison import Cell, Comparison


def test_figures_are_the_textbook_s() -> None:
    random = np.random.default_rng(0)
    p, q = random.standard_normal((2, 50, 9)).astype(np.float32)
    comparison = Comparison(np.array([[0, 9]]))
    comparison.add(20, np.arange(20, dtype=np.int32), p[:20], q[:20])
    comparison.add(30, np.arange(20, 50, dtype=np.int32), p[20:], q[20:])
    figures = comparison.figures()
    p_log, q_log = log_softmax(p.astype(float), 1), log_softmax(q.astype(float), 1)
    entropy, crossed = -(np.exp(p_log) * p_log).sum(1), -(np.exp(p_log) * q_log).sum(1)
    assert figures["agreement"] == (p.argmax(1) == q.argmax(1)).mean()
    assert figures["nll"] == pytest.approx(crossed.mean() / entropy.mean() - 1)
    assert figures["divergence"] == pytest.approx((crossed - entropy).mean())
    assert comparison.agreement() == pytest.approx(figures["agreement"])
    assert comparison.error == pytest.approx(np.linalg.norm(p - q) / np.linalg.norm(p))
    assert comparison.worst == float(np.abs(p - q).max()) / float(np.abs(p).max())
    assert comparison.widths[30].predictions == 30


def test_only_ids_that_a_place_allows_count() -> None:
    """Two places a frame; what each has beyond its range is larger than all within."""
    reference = np.array([[1, 2, 9, 9], [9, 9, 4, 3]], np.float32)
    candidate = np.array([[1, 2, 0, 0], [9, 9, 3, 4]], np.float32)
    comparison = Comparison(np.array([[0, 2], [2, 4]]), first=5)
    comparison.add(2, np.array([7, 8]), reference, candidate)
    assert comparison.cells == [Cell(7, 1, 1, 0.0), Cell(8, 3, 2, 1.0)]
    p_log, q_log = log_softmax([4, 3]), log_softmax([3, 4])
    assert comparison.blocks[0].divergence == pytest.approx((np.exp(p_log) * (p_log - q_log)).sum())


def test_a_near_tie_agrees_and_a_token_of_the_sampler_counts() -> None:
    logits = np.array([[1.0, 1.01, 0.0], [0.0, 0.5, 2.0]], np.float32)
    comparison = Comparison(np.array([[0, 3]]))
    comparison.add(2, np.arange(2, dtype=np.int32), logits, logits, np.array([0, 0]))
    assert comparison.error == 0.0
    assert [comparison.agreement(tie) for tie in (0.0, 0.01, 1.0)] == [0.0, 0.5, 1.0]


def test_standard_errors_are_those_of_independent_blocks() -> None:
    """Against the spread of the figure itself over many comparisons."""
    random = np.random.default_rng(0)
    rises, errors = [], []
    for _ in range(200):
        comparison = Comparison(np.array([[0, 9]]))
        for _ in range(20):
            comparison.begin()
            p = random.standard_normal((int(random.integers(5, 15)), 9)).astype(np.float32)
            q = p + random.normal(0, 0.3, p.shape).astype(np.float32)
            comparison.add(len(p), np.arange(len(p), dtype=np.int32), p, q)
        figures = comparison.figures()
        assert len(comparison.blocks) == 20
        rises.append(figures["nll"])
        errors.append(figures["nll_error"])
    assert np.mean(errors) == pytest.approx(np.std(rises), rel=0.15)
