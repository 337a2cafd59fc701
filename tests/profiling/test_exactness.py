"""The share of a decoder's cells that is next-token prediction's, and draws that depend on a pass's width."""

from __future__ import annotations

from typing import Any

import pytest

from diagd.bundle import Bundle, Form
from diagd.engines.backend import find
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.prefix import PrefixEngine
from diagd.export.options import GraphOptions
from diagd.profiling.measure import random_workload
from diagd.profiling.plan import orders_of
from diagd.profiling.verify import Exactness, exactness
from diagd.runtime.load import open_session, step_options
from diagd.runtime.session import Session
from tests.models import export_small
from tests.oracles.models import small_model
from tests.profiling.conftest import LAYOUT

CPU, FRAMES = CpuOptions(threads=1), 4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = small_model(LAYOUT, context_frames=4)
    options = GraphOptions((Form.PREFIX, Form.MODERN), "fp32", (1, 8, 64))
    return Bundle.open(export_small(model, tmp_path_factory.mktemp("exact") / "small.diagd", options))


def found(session: Session) -> Exactness:
    orders = orders_of(session.manifest.layout, (1,))
    return exactness(session, "it", orders, random_workload(session, 1, FRAMES), FRAMES)


@pytest.mark.parametrize("form", [Form.PREFIX, Form.MODERN])
def test_exact_decoders_are_exact_and_diagonal_ones_are_not(bundle: Bundle, form: Form) -> None:
    with open_session(bundle, window=3, cpu=CPU, form=form) as session:
        exact = found(session)
    assert exact.flips == 0
    assert exact.shares["jacobi"] == exact.shares["next token"] == 1
    assert exact.shares["k=1 serial"] < 1


class WidthMatters(PrefixEngine):
    """Its logits are others where a pass has more than one row."""

    def draw(self) -> None:
        rows = self.logits()
        if len(rows) > 1:
            rows[:] = rows[:, ::-1].copy()
        super().draw()


def test_draws_that_depend_on_the_width_of_a_pass_are_counted(bundle: Bundle, monkeypatch: Any) -> None:
    monkeypatch.setattr("diagd.engines.processor.PrefixEngine", WidthMatters)
    with Session(
        bundle.manifest, find("cpu").open_steps(bundle, step_options(bundle.manifest, 3, cpu=CPU)), 3
    ) as session:
        exact = found(session)
    assert exact.flips > 0.5
    assert exact.shares["next token"] < 1
