"""Figures against their bounds."""

from __future__ import annotations

import numpy as np
import pytest

from diagd.calibration.evaluate import failures, is_settled
from diagd.calibration.options import Budget, parse_budget
from diagd.errors import UsageError
from diagd.runtime.comparison import Comparison


def test_every_breach_is_named() -> None:
    errors = {"agreement_error": 0.0, "nll_error": 0.0}
    figures = {"agreement": 0.5, "nll": 0.2, "psnr": 10.0, **errors}
    assert [text.split()[0] for text in failures(figures, Budget())] == ["agreement", "NLL", "PSNR"]
    broken = {"agreement": float("nan"), "nll": float("nan"), "psnr": None, **errors}
    assert len(failures(broken, Budget())) == 2


def test_budgets_are_read_by_name() -> None:
    assert parse_budget("nll=0.5,psnr=1") == Budget(0.97, 0.5, 1.0)
    assert parse_budget("") == Budget()
    assert parse_budget("none") is None
    with pytest.raises(UsageError, match="did you mean 'psnr'"):
        parse_budget("pnsr=3")
    for wrong in ("nll=much", "nll", "nll=nan"):
        with pytest.raises(UsageError, match="NAME=NUMBER"):
            parse_budget(wrong)
    with pytest.raises(UsageError, match=r"agreement=97: expected a share such as .*, not per cent"):
        parse_budget("agreement=97")


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


def test_equal_logits_pass_any_budget() -> None:
    comparison = Comparison(np.array([[0, 5]]))
    logits = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    comparison.add(4, np.arange(4, dtype=np.int32), logits, logits)
    figures = {**comparison.figures(), "psnr": None}
    assert failures(figures, Budget(agreement=1, nll=1e-12, psnr=99)) == []
