"""The forms of fixed capacity on models with text, added sinusoids, layer norms or learned positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from diagd.bundle import Bundle, Form
from diagd.engines.engine import Engine
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.export.exporter import Sources, export, random_sources
from diagd.export.families import Family, cosmos, wham
from diagd.export.options import GraphOptions
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.slots import TokenPlaces
from diagd.runtime.text import TextReader
from diagd.schedule import Schedule
from tests.engines.opening import modern, portable, prefix
from tests.export.test_families_cosmos import CODES, COLUMNS, ROWS, TEXT, small

CPU = CpuOptions(threads=1)
WINDOW = 4


def small_wham() -> Family:
    config = wham.transformer_config(
        grid=(ROWS, COLUMNS), codes=CODES, frames=WINDOW, hidden=32, layers=2, heads=4, bias=True
    )
    return wham.family("wham-small", wham.Variant(config, norm_weights=True, tokenizer=None))


@dataclass
class Case:
    family: Family
    bundle: Bundle


@pytest.fixture(scope="module", params=["video2world", "wham"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    text = request.param == "video2world"
    family = cosmos.family("cosmos-small", small(text=True, yarn=True)) if text else small_wham()
    options = GraphOptions(form=tuple(Form), widths=(1, 32))
    sources = Sources(random_sources(family, seed=0).transformer)
    output = tmp_path_factory.mktemp("forms") / "small.diagd"
    return Case(family, Bundle.open(export(family, options, sources, output).path))


def decode(case: Case, make_engine: Callable[[Bundle, int], Engine], frames: int) -> np.ndarray:
    random, layout = np.random.default_rng(0), case.family.transformer.layout
    engine = make_engine(case.bundle, TokenPlaces(layout, WINDOW).size)
    spec = case.bundle.manifest.text
    text = random.normal(size=(TEXT.length, TEXT.width)).astype(np.float32)
    session = Session(
        case.bundle.manifest, engine, WINDOW, text=TextReader(case.bundle, spec, CPU) if spec else None
    )
    session.start(random.integers(0, CODES, (1, ROWS, COLUMNS)).astype(np.int32), text=text if spec else None)
    actions = random.integers(CODES, CODES + 68, (frames, 16)).astype(np.int32) if layout.gap else None
    decoded = session.generate(
        frames,
        actions,
        schedule=Schedule.serial(layout, 1),
        sampling=SamplingSettings(temperature=0.0),
    )
    return np.stack([frame.tokens for frame in decoded])


@pytest.mark.parametrize("open_engine", [modern, portable])
def test_every_form_decodes_the_same_tokens_over_a_sliding_window(
    case: Case, open_engine: Callable[[Bundle, int], Engine]
) -> None:
    frames = WINDOW + 3
    expected = decode(case, prefix, frames)
    assert len(np.unique(expected)) > 3
    np.testing.assert_array_equal(decode(case, open_engine, frames), expected)
