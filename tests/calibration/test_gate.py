"""The figures of the gate, against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from diagd.calibration.gate import Budget, Comparison, failures, is_settled, parse_budget
from diagd.errors import UsageError


def test_figures_are_the_textbook_s() -> None:
    random = np.random.default_rng(0)
    p, q = random.standard_normal((2, 50, 9)).astype(np.float32)
    comparison = Comparison()
    comparison.add(p[:20], q[:20], 20)
    comparison.add(p[20:], q[20:], 30)
    figures = comparison.figures()
    p_log, q_log = log_softmax(p.astype(float), 1), log_softmax(q.astype(float), 1)
    entropy, crossed = -(np.exp(p_log) * p_log).sum(1), -(np.exp(p_log) * q_log).sum(1)
    assert figures["agreement"] == (p.argmax(1) == q.argmax(1)).mean()
    assert figures["nll"] == pytest.approx(crossed.mean() / entropy.mean() - 1)
    assert figures["divergence"] == pytest.approx((crossed - entropy).mean())
    assert figures["psnr"] is None
    assert comparison.by_width[30].rows == 30


def test_equal_logits_pass_any_budget() -> None:
    comparison = Comparison()
    logits = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    comparison.add(logits, logits, 4)
    assert failures(comparison.figures(), Budget(agreement=1, nll=1e-12, psnr=99)) == []


def test_every_breach_is_named() -> None:
    errors = {"agreement_error": 0.0, "nll_error": 0.0}
    figures = {"agreement": 0.5, "nll": 0.2, "psnr": 10.0, **errors}
    assert [text.split()[0] for text in failures(figures, Budget())] == ["agreement", "NLL", "PSNR"]
    broken = {"agreement": float("nan"), "nll": float("nan"), "psnr": None, **errors}
    assert len(failures(broken, Budget())) == 2


def test_budgets_are_read_by_name() -> None:
    assert parse_budget("nll=0.5,psnr=1", Budget()) == Budget(0.97, 0.5, 1.0)
    assert parse_budget("", Budget()) == Budget()
    assert parse_budget("none", Budget()) is None
    with pytest.raises(UsageError, match="did you mean 'psnr'"):
        parse_budget("pnsr=3", Budget())
    for wrong in ("nll=much", "nll", "nll=nan"):
        with pytest.raises(UsageError, match="NAME=NUMBER"):
            parse_budget(wrong, Budget())


def test_standard_errors_are_those_of_independent_blocks() -> None:
    """Against the spread of the figure itself over many comparisons."""
    random = np.random.default_rng(0)
    rises, errors = [], []
    for _ in range(200):
        comparison = Comparison()
        for _ in range(20):
            comparison.begin()
            p = random.standard_normal((int(random.integers(5, 15)), 9)).astype(np.float32)
            comparison.add(p, p + random.normal(0, 0.3, p.shape).astype(np.float32), len(p))
        figures = comparison.figures()
        assert len(comparison.blocks) == 20
        rises.append(figures["nll"])
        errors.append(figures["nll_error"])
    assert np.mean(errors) == pytest.approx(np.std(rises), rel=0.15)


def test_a_verdict_needs_a_standard_error_of_room_and_stands_with_two() -> None:
    figures = {"agreement": 0.99, "agreement_error": 0.001, "nll": 0.009, "nll_error": 0.0005, "psnr": None}
    assert failures(figures, Budget()) == []
    assert is_settled(figures, Budget())
    unsure = {**figures, "nll_error": 0.0008}
    assert failures(unsure, Budget()) == []
    assert not is_settled(unsure, Budget())
    assert len(failures({**figures, "nll_error": 0.002}, Budget())) == 1
    assert len(failures({**figures, "agreement_error": 0.03}, Budget())) == 1
    assert is_settled({**figures, "nll": 0.05}, Budget())
