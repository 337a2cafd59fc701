"""Plans against published dimensions: bytes, ceilings on five devices, what fits and what to change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagd.bundle import Bundle, Form
from diagd.bundle.precision import PRECISIONS
from diagd.calibration.options import SCHEMES
from diagd.errors import UsageError
from diagd.export.exporter import TORCH_TYPES
from diagd.export.options import GraphOptions
from diagd.profiling.cost import (
    DEVICES,
    ModelSize,
    cache_bytes,
    live_tokens,
    read_model,
    step_bytes,
    step_operations,
)
from diagd.profiling.plan import Planned, ceilings_of, drafting, make_plan, memory_of, orders_of
from diagd.schedule import StreamLayout, fixed_slots, slots_needed
from tests.models import export_small
from tests.oracles.models import small_model
from tests.profiling import models

BYTES = [
    (models.COSMOS_4B, 3, 3.75e9, 64, 839e6, (8.09e9, 4.34e9, 2.58e9)),
    (models.COSMOS_12B, 3, 11.23e9, 160, 2097e6, (23.93e9, 12.70e9, 7.42e9)),
    (models.WHAM_1600M, 1, 1.57e9, 216, 1226e6, (4.30e9, 2.73e9, 2.00e9)),
    (models.MINEWORLD_300M, 1, 0.3125e9, 20, 113e6, (0.735e9, 0.42e9, 0.275e9)),
    (models.MINEWORLD_700M, 1, 0.71e9, 20, 113e6, (1.53e9, 0.82e9, 0.485e9)),
    (models.MINEWORLD_1200M, 1, 1.21e9, 20, 113e6, (2.53e9, 1.32e9, 0.75e9)),
]


@pytest.mark.parametrize(
    ("model", "clip", "parameters", "kib", "full", "reads"), BYTES, ids=lambda v: str(v)[:20]
)
def test_bytes_of_a_step(
    model: ModelSize, clip: int, parameters: float, kib: int, full: float, reads: tuple[float, ...]
) -> None:
    fp16 = PRECISIONS["fp16"]
    assert model.streamed == pytest.approx(parameters, rel=0.01)
    assert cache_bytes(model, fp16, 1) == kib * 1024
    tokens = model.layout.frame_start(model.context_frames)
    assert cache_bytes(model, fp16, tokens) == pytest.approx(full, rel=0.01)
    for name, expected in zip(("fp16", "int8", "int4-weight"), reads, strict=True):
        read = step_bytes(model, PRECISIONS[name], live_tokens(model, clip))
        assert read == pytest.approx(expected, rel=0.015), name


CEILINGS = [
    (models.COSMOS_4B, 3, "fp16", "h200", (46, 33, 47)),
    (models.COSMOS_4B, 3, "fp16", "orin-agx", (2.0, 1.4, 2.0)),
    (models.COSMOS_4B, 3, "int4-weight", "rtx5090", (54, 39, 55)),
    (models.COSMOS_12B, 3, "int8", "rtx4090", (6.2, 4.5, 6.3)),
    (models.COSMOS_12B, 3, "int8", "thor", (1.7, 1.2, 1.7)),
    (models.WHAM_1600M, 1, "fp16", "h200", (24, 17.4, 31)),
    (models.WHAM_1600M, 1, "int4-weight", "orin-nano", (1.1, 0.80, 1.4)),
    (models.MINEWORLD_300M, 1, "fp16", "a100-80", (75, 55, 99)),
    (models.MINEWORLD_300M, 1, "int8", "orin-agx", (13.1, 9.7, 17.3)),
    (models.MINEWORLD_300M, 1, "int4-weight", "h200", (471, 348, 622)),
    (models.MINEWORLD_700M, 1, "fp16", "rtx4090", (17.8, 13.2, 24)),
    (models.MINEWORLD_1200M, 1, "int4-weight", "thor", (9.8, 7.3, 13.0)),
]


@pytest.mark.parametrize(
    ("model", "clip", "precision", "device", "rates"), CEILINGS, ids=lambda v: str(v)[:20]
)
def test_ceilings_of_frames_a_second(
    model: ModelSize, clip: int, precision: str, device: str, rates: tuple[float, ...]
) -> None:
    rows = ceilings_of(model, DEVICES[device], PRECISIONS[precision], (1, 2), clip)
    found = {row.order: row for row in rows}
    for order, rate in zip(("k=1 serial", "k=2 serial", "k=2 chained"), rates, strict=True):
        assert found[order].frames_per_second == pytest.approx(rate, rel=0.03), order
        assert found[order].bound == "memory"


def test_wide_steps_are_bound_by_arithmetic() -> None:
    rows = ceilings_of(models.COSMOS_4B, DEVICES["rtx5090"], PRECISIONS["int4-weight"], (1,), 1)
    assert {row.order: row.bound for row in rows}["k=1 chained"] == "arithmetic"


def test_a_context_that_is_fed_again_costs_its_passes() -> None:
    """5,004 tokens of WHAM-1.6B are about 16 TFLOP, 60 % of an H200's arithmetic in 25 ms."""
    refed = replace(models.WHAM_1600M, refed=9 * 556)
    device, fp16 = DEVICES["h200"], PRECISIONS["fp16"]
    plain, slid = (ceilings_of(m, device, fp16, (1,), 1)[1] for m in (models.WHAM_1600M, refed))
    extra = 1 / slid.frames_per_second - 1 / plain.frames_per_second
    assert extra / 0.6 == pytest.approx(0.025, rel=0.3)


def test_next_token_prediction_on_an_h200() -> None:
    rates = {
        row.precision: row.frames_per_second
        for row in make_plan(models.MINEWORLD_300M, DEVICES["h200"]).ceilings
        if row.order == "next token"
    }
    assert rates["fp16"] == pytest.approx(19.4, rel=0.01)


@pytest.mark.parametrize(
    ("model", "precision", "device", "fits"),
    [
        (models.COSMOS_4B, "fp16", "orin-nano", False),
        (models.COSMOS_4B, "int4-weight", "orin-nano", True),
        (models.COSMOS_12B, "fp16", "rtx4090", False),
        (models.COSMOS_12B, "fp16", "rtx5090", True),
        (models.COSMOS_12B, "fp16", "orin-agx", True),
        (models.COSMOS_12B, "int8", "rtx4090", True),
        (models.WHAM_1600M, "fp16", "orin-nano", True),
    ],
)
def test_what_fits_where(model: ModelSize, precision: str, device: str, fits: bool) -> None:
    plan = make_plan(model, DEVICES[device], Planned(precision=precision))
    assert plan.fits is fits
    assert fits or plan.advice


def test_engines_of_large_models_are_not_built_on_small_devices() -> None:
    plan = make_plan(models.COSMOS_4B, DEVICES["orin-nano"], Planned(precision="int4-weight"))
    assert plan.fits
    assert not plan.builds
    assert 22e9 < make_plan(models.COSMOS_4B, DEVICES["h200"]).memory.build_peak < 34e9
    assert any("build the engine on" in line for line in plan.advice)


def test_advice_is_right() -> None:
    """What it says to change makes it fit."""
    plan = make_plan(models.COSMOS_4B, DEVICES["orin-nano"])
    assert plan.advice[0] == "store the weights in int8: --precision int8"
    assert make_plan(models.COSMOS_4B, DEVICES["orin-nano"], Planned(precision="int8")).fits
    tight = replace(DEVICES["orin-nano"], memory=plan.memory.running + 1.5e9 - 50e6)
    advice = make_plan(models.COSMOS_4B, tight).advice
    window = int(next(line for line in advice if "window=" in line).rpartition("=")[2])
    assert make_plan(models.COSMOS_4B, tight, Planned(window=window)).fits
    assert not make_plan(models.COSMOS_4B, tight, Planned(window=window + 1)).fits
    nowhere = replace(tight, memory=2e9)
    assert "smaller model" in make_plan(models.COSMOS_4B, nowhere).advice[0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_that_is_advised_can_be_made(precision: str) -> None:
    plan = make_plan(models.COSMOS_4B, DEVICES["orin-nano"], Planned(precision=precision))
    advised = {line.rpartition(" ")[2] for line in plan.advice if "--precision" in line}
    assert advised <= SCHEMES.keys() | TORCH_TYPES.keys() == PRECISIONS.keys()
    assert precision in {row.precision for row in plan.ceilings}
    assert len({row.precision for row in plan.ceilings}) == len({p.weight for p in PRECISIONS.values()})


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    gap=st.integers(0, 3),
    k=st.integers(1, 6),
    clip=st.integers(1, 4),
)
def test_passes_are_those_of_the_schedule(rows: int, columns: int, gap: int, k: int, clip: int) -> None:
    layout = StreamLayout(rows, columns, after=gap)
    model = replace(models.MINEWORLD_300M, layout=layout)
    k = min(k, columns)
    orders = {order.name: order for order in orders_of(layout, (k,))}
    for row in ceilings_of(model, DEVICES["h200"], PRECISIONS["fp16"], (k,), clip):
        order = orders[row.order]
        table = order.table(1, clip, 0)
        assert table.steps == order.total_steps(clip)
        assert row.passes * clip == pytest.approx(table.steps if clip > 1 else order.d)


def test_operations_count_every_product() -> None:
    """A two-layer model counted product by product."""
    width, live, hidden, inner, vocabulary = 3, 50, 8, 12, 20
    size = models.llama(
        "tiny",
        StreamLayout(2, 2),
        4,
        layers=2,
        hidden=hidden,
        inner=inner,
        query=8,
        kv_heads=1,
        head_size=4,
        vocabulary=vocabulary,
    )
    products = [(width, hidden, 8), (width, hidden, 4), (width, hidden, 4), (width, 8, hidden)]
    products += [(width, hidden, inner)] * 2 + [(width, inner, hidden)]
    products += 2 * [(width, 4, live), (width, live, 4)]  # two query heads: scores, then values
    layer = sum(2 * m * n * p for m, n, p in products)
    assert step_operations(size, width, live) == 2 * layer + 2 * width * hidden * vocabulary


def test_cache_memory_follows_the_window() -> None:
    fp16 = PRECISIONS["fp16"]
    four, eight = (memory_of(models.MINEWORLD_300M, fp16, window).cache for window in (4, 8))
    frame = models.MINEWORLD.frame_length + models.MINEWORLD.rows + 1
    slots = [fixed_slots(models.MINEWORLD, window, 64) for window in (4, 8)]
    assert (four, eight) == tuple(count * 20 * 1024 for count in slots)
    assert slots_needed(models.MINEWORLD, 8, 64) - slots_needed(models.MINEWORLD, 4, 64) == 4 * frame


@pytest.mark.parametrize("sessions", [1, 2])
def test_cache_memory_is_that_of_the_graphs_buffers(tmp_path: Path, sessions: int) -> None:
    options = GraphOptions((Form.MODERN,), streams=sessions)
    made = Bundle.open(export_small(small_model(StreamLayout(4, 6)), tmp_path / "made.diagd", options))
    size, (graph, *_) = read_model(made).size, made.manifest.graphs
    elements = size.cache_elements * graph.streams * (graph.capacity or 0)
    assert memory_of(size, PRECISIONS["fp32"], size.context_frames, sessions).cache == 4 * elements


def test_sessions_share_the_weights_of_a_pass_and_nothing_else() -> None:
    """Next-token prediction of four is bound by memory: weights once, and four caches."""
    device, fp16 = DEVICES["h200"], PRECISIONS["fp16"]
    alone, shared = (make_plan(models.MINEWORLD_300M, device, Planned(sessions=n)) for n in (1, 4))
    for plan in (alone, shared):
        slots = fixed_slots(models.MINEWORLD, 16, 64, plan.sessions)
        assert plan.memory.cache == plan.sessions * slots * 20 * 1024
    assert shared.memory.weights == alone.memory.weights
    first, second = (ceilings_of(models.MINEWORLD_300M, device, fp16, (1,), 1, n)[0] for n in (1, 4))
    cache = (second.bytes - first.bytes) / 3
    weights = first.bytes - cache
    assert first.frames_per_second / second.frames_per_second == pytest.approx(
        (weights + 4 * cache) / first.bytes, rel=1e-9
    )
    assert not any("share a pass" in line for line in alone.advice)
    assert "4 sessions share a pass" in shared.advice[-1]


def test_drafting_pays_only_where_the_draft_and_its_pass_are_less_than_the_target() -> None:
    """By hand, where memory bounds all: 336 cells, and a pass costs what it reads."""
    device, fp16 = DEVICES["h200"], PRECISIONS["fp16"]
    target, drafter = models.MINEWORLD_1200M, models.MINEWORLD_300M
    found = drafting(target, drafter, device, fp16, guess=0.93)
    quickest = max(row.frames_per_second for row in ceilings_of(drafter, device, fp16, (1,), 1))
    assert found.draft == pytest.approx(1 / quickest)
    assert found.passes == pytest.approx(336 * 0.07, rel=0.02)
    read = step_bytes(target, fp16, live_tokens(target)) / device.bandwidth
    assert found.target == pytest.approx(found.passes * read, rel=0.05)
    assert found.least_kept == pytest.approx((found.draft + found.verify) / found.target)
    assert 0 < found.least_kept < 1
    assert f"more than {found.least_kept:.0%} of its frames are kept" in found.verdict

    sure = drafting(target, drafter, device, fp16, guess=0.999)
    assert sure.least_kept > 1 and sure.verdict.startswith("drafting cannot pay: a draft of")
    itself = drafting(target, target, device, fp16, guess=0.93)
    assert itself.draft > found.draft and itself.target == found.target
    with pytest.raises(UsageError, match="draft with a model of the same layout and tokens"):
        drafting(target, models.COSMOS_4B, device, fp16, guess=0.93)
