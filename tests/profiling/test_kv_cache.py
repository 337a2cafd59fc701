"""What an int8 K/V cache saves, by formula: published dimensions of WHAM."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from diagd.bundle.precision import PRECISIONS
from diagd.cli.main import main
from diagd.profiling.cost import DEVICES, live_tokens, precisions, step_bytes
from diagd.profiling.plan import Planned, make_plan
from tests.profiling import models

WHAM = models.WHAM_1600M


def test_a_step_of_int4_weights_reads_three_tenths_less() -> None:
    """2.00 to 1.41 GB: keys and values are 58 % of it in half precision."""
    live = live_tokens(WHAM, 1)
    half = step_bytes(WHAM, PRECISIONS["int4-weight"], live)
    assert 1 - WHAM.streamed * PRECISIONS["int4-weight"].weight / half == pytest.approx(0.58, abs=0.01)
    assert half == pytest.approx(2.00e9, rel=0.015)
    assert step_bytes(WHAM, precisions("int8")["int4-weight"], live) == pytest.approx(1.41e9, rel=0.015)


def test_the_cache_is_halved_and_nothing_else() -> None:
    plans = [
        make_plan(WHAM, DEVICES["orin-nano"], Planned(precision="int4-weight", kv_cache=kind))
        for kind in (None, "int8")
    ]
    assert plans[0].memory.cache == 2 * plans[1].memory.cache
    for part in ("weights", "workspace", "tokenizer", "build_peak"):
        assert getattr(plans[0].memory, part) == getattr(plans[1].memory, part)
    rates = [{(c.precision, c.order): c.frames_per_second for c in plan.ceilings} for plan in plans]
    gains = [rates[1][key] / rates[0][key] for key in rates[0] if key[0] == "int4-weight"]
    assert all(1.3 < gain < 1.5 for gain in gains)


def test_a_cache_that_does_not_fit_is_advised_to_shrink() -> None:
    """WHAM-1.6B in half precision takes 3.1 GB of weights and 1.2 GB of cache."""
    device = DEVICES["orin-nano"]
    needed = make_plan(WHAM, device).memory
    small = replace(device, memory=device.reserved + needed.running - needed.cache / 4)
    plan = make_plan(WHAM, small)
    assert not plan.fits
    assert "store keys and values in int8: --kv-cache int8" in plan.advice
    assert make_plan(WHAM, small, Planned(kv_cache="int8")).fits


def test_the_command_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "wham-1.6b", "--device", "orin-nano", "--precision", "int4-weight", "--json"]
    cache = []
    for options in ([], ["--kv-cache", "int8"]):
        assert main([*command, *options]) == 0
        plan = json.loads(capsys.readouterr().out)
        cache.append(plan["memory"]["cache"])
    assert plan["kv_cache"] == "int8"
    assert cache[0] == 2 * cache[1]
