"""Verification finds what is wrong, and nothing where all is well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diagd.bundle import Bundle, Form
from diagd.engines.backend import find
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import BundleError
from diagd.export.options import GraphOptions
from diagd.export.transformer import Transformer
from diagd.profiling.measure import random_workload
from diagd.profiling.plan import orders_of, split_orders
from diagd.profiling.profile import ProfileOptions, profile
from diagd.profiling.verify import Verdict, open_reference, verify
from diagd.runtime.load import check_window, open_session, step_options
from diagd.runtime.session import Session
from diagd.runtime.step import Result
from diagd.schedule import NO_SINK, Step
from tests.models import export_small
from tests.oracles.models import small_model
from tests.profiling.conftest import LAYOUT

CPU = CpuOptions(threads=1)
FORMS = (Form.PREFIX, Form.MODERN, Form.PORTABLE)


@pytest.fixture(scope="module")
def all_forms(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = small_model(LAYOUT, context_frames=4)
    folder = tmp_path_factory.mktemp("forms")
    return Bundle.open(export_small(model, folder / "small.diagd", GraphOptions(FORMS, "fp32", (1, 8, 64))))


def verdicts(
    bundle: Bundle, form: Form, reference: Bundle | None = None, session: Session | None = None
) -> list[Verdict]:
    session = session or open_session(bundle, window=3, cpu=CPU, form=form)
    orders, workload = orders_of(bundle.manifest.layout, (1, 2)), random_workload(session, 1, 5)
    with session, open_reference(reference or bundle, session) as plain:
        return [verify(session, plain, form.value, "fp32", order, workload, 5) for order in orders]


class Spoilt(Session):
    """Does harm to its engine between two steps."""

    def __init__(self, bundle: Bundle, form: Form) -> None:
        window = check_window(bundle.manifest, 3)
        options = step_options(bundle.manifest, window, cpu=CPU, form=form)
        super().__init__(bundle.manifest, find("cpu").open_steps(bundle, options), window)

    def steps(self, *args: Any, **options: Any) -> Iterator[tuple[Step, Result]]:
        for count, (step, result) in enumerate(super().steps(*args, **options), start=1):
            self.spoil(count, step, result)
            yield step, result

    def spoil(self, count: int, step: Step, result: Result) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_reference(all_forms: Bundle, form: Form) -> None:
    """Five frames in a window of three: frames are evicted and writes wrap."""
    found = verdicts(all_forms, form)
    assert len(found) == 5
    for verdict in found:
        assert verdict.passed, verdict
        assert verdict.cells == 5 * LAYOUT.cells
        assert verdict.identical or verdict.agreement == 1.0
        assert verdict.error < 1e-4


def test_a_context_that_is_fed_again_is_verified_and_profiled(tmp_path: Path) -> None:
    """Absolute positions: serial frames slide the window, overlapping ones cannot and are told apart."""
    rotary = small_model(LAYOUT, context_frames=4)
    config = replace(rotary.config, rotary=None, position_embedding=True)
    model = Transformer(config).initialise(torch.Generator().manual_seed(0)).eval()
    bundle = Bundle.open(export_small(model, tmp_path / "absolute.diagd"))
    orders = orders_of(bundle.manifest.layout, (1,))
    session = open_session(bundle, window=3, cpu=CPU)
    possible, blocked = split_orders(orders, session, random_workload(session, 1, 5), 5)
    assert possible == orders[:2]
    assert [one.order for one in blocked] == [orders[2].name]
    assert split_orders(orders, session, random_workload(session, 1, 2), 2) == (orders, [])
    with session, open_reference(bundle, session) as plain:
        verdict = verify(session, plain, "prefix", "fp32", orders[1], random_workload(session, 1, 5), 5)
    assert verdict.passed
    assert session.timing.refill_steps == 3
    report = profile(bundle, ProfileOptions(ks=(1,), window=3, cpu=CPU)).report
    assert [run.order for run in report.runs] == ["next token", "k=1 serial"]
    assert [skipped.order for skipped in report.skipped] == ["k=1 chained"]
    for run in report.runs:
        stages = {stage.name: stage.seconds for stage in run.stages}
        assert stages["context refill"].count >= 1


def test_a_spoilt_cache_row_is_found_where_it_is_spoilt(all_forms: Bundle) -> None:
    """From step 30 on one slot of a value buffer is wrong."""

    class SpoiltRow(Spoilt):
        def spoil(self, count: int, step: Step, result: Result) -> None:
            if count == 29:
                self.engine.buffers["value_0"][3] += 40  # type: ignore[attr-defined]

    session = SpoiltRow(all_forms, Form.PREFIX)
    first = verdicts(all_forms, Form.PREFIX, session=session)[0]
    assert not first.passed
    assert first.error > 1e-3
    assert first.worst > 1e-2
    difference = first.first_difference
    assert difference is not None
    assert difference.frame * LAYOUT.cells + difference.row * LAYOUT.columns + difference.column >= 29
    assert difference.token != difference.expected
    assert difference.margin > 0
    assert first.agreement < 1.0


def test_a_wrong_token_of_a_sampler_in_the_graph_is_found(all_forms: Bundle) -> None:
    """The logits are right and the id that is written is not."""

    class SpoiltToken(Spoilt):
        def spoil(self, count: int, step: Step, result: Result) -> None:
            places = self.stream.places.of(step.sinks[step.sinks != NO_SINK]).astype(np.int32)
            self.engine.write_tokens(places, (self.engine.read_tokens(places) + 1) % 24)

    found = verdicts(all_forms, Form.MODERN, session=SpoiltToken(all_forms, Form.MODERN))
    for verdict in found:
        assert not verdict.passed
        assert verdict.error < 1e-4
        assert verdict.agreement < 0.1


def test_other_weights_fail(all_forms: Bundle, tmp_path: Path) -> None:
    other = Bundle.open(export_small(small_model(LAYOUT, context_frames=4, seed=5), tmp_path / "other.diagd"))
    assert not any(verdict.passed for verdict in verdicts(all_forms, Form.PREFIX, reference=other))


def test_a_reference_needs_the_prefix_form(all_forms: Bundle) -> None:
    graphs = tuple(graph for graph in all_forms.manifest.graphs if graph.form is Form.MODERN)
    without = replace(all_forms, manifest=all_forms.manifest.model_copy(update={"graphs": graphs}))
    with pytest.raises(BundleError, match="--reference"):
        open_reference(without, open_session(all_forms, cpu=CPU, form=Form.MODERN))
