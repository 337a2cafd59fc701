"""Decoders by the words people call them by."""

from __future__ import annotations

import pytest

from diagd.bundle import Bundle, Manifest
from diagd.errors import ScheduleError
from diagd.runtime.decoders import JacobiDecoder, ScheduledDecoder
from diagd.runtime.options import parse_decoder
from diagd.schedule import Schedule, StreamLayout
from tests.models import export_small
from tests.oracles.models import small_model

LAYOUT = StreamLayout(3, 5, after=2)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    path = tmp_path_factory.mktemp("strategy") / "small.diagd"
    return Bundle.open(export_small(small_model(LAYOUT, context_frames=4), path)).manifest


def test_words_for_orders(manifest: Manifest) -> None:
    layout = manifest.layout
    for spelling, schedule in {
        None: manifest.schedule,
        "diagonal": manifest.schedule,
        "ntp": Schedule.next_token(layout),
        "k=1,chained": Schedule.chained(layout, 1),
    }.items():
        assert parse_decoder(spelling, manifest) == ScheduledDecoder(schedule)


def test_exact_ones(manifest: Manifest) -> None:
    assert isinstance(parse_decoder("jacobi", manifest), JacobiDecoder)
    assert isinstance(parse_decoder("jacobi,window=4", manifest), JacobiDecoder)


@pytest.mark.parametrize("spelling", ["jacobi window=x", "diagonals", ""])
def test_what_is_no_decoder(manifest: Manifest, spelling: str) -> None:
    with pytest.raises(ScheduleError, match="expected 'next token'"):
        parse_decoder(spelling, manifest)


def test_a_word_that_is_none_is_told_the_decoders(manifest: Manifest) -> None:
    with pytest.raises(ScheduleError, match="or a decoder: ntp, diagonal, jacobi, draft"):
        parse_decoder("jacobii", manifest)
