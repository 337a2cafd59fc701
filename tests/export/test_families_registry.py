"""Every registered model at full size: parameters, tokenizers, plans."""

from __future__ import annotations

import math

import pytest

from diagd.bundle import Form
from diagd.errors import UsageError
from diagd.export import families
from diagd.export.exporter import Exporter, random_sources
from diagd.export.options import GraphOptions
from diagd.export.tokenizers.base import TokenizerGraphs
from diagd.export.transformer import position_tables
from diagd.schedule import Schedule

PARAMETERS = {
    "cosmos-4b": 4.014e9,
    "cosmos-12b": 11.561e9,
    "cosmos-5b-video2world": 4.585e9,
    "cosmos-13b-video2world": 13.323e9,
    "wham-200m": 0.2241e9,
    "wham-1.6b": 1.580e9,
    "mineworld-300m": 0.3210e9,
    "mineworld-700m": 0.7260e9,
    "mineworld-700m-32f": 0.7260e9,
    "mineworld-1200m": 1.2293e9,
    "mineworld-1200m-32f": 1.2293e9,
}
CONTEXT_TOKENS = {"cosmos": 12_800, "wham": 5_560}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_release(name: str) -> None:
    family = families.find(name)
    count = sum(math.prod(shape) for shape in family.expected.values())
    assert count == pytest.approx(PARAMETERS[name], rel=2e-4)


@pytest.mark.parametrize(("size", "grid"), [((384, 640), (24, 40)), ((640, 848), (40, 53))])
def test_cosmos_has_the_sizes_it_was_post_trained_at(size: tuple[int, int], grid: tuple[int, int]) -> None:
    family = families.find("cosmos-5b-video2world", size=size)
    config, released = family.transformer, families.find("cosmos-5b-video2world")
    assert (config.layout.rows, config.layout.columns) == grid
    assert family.expected == released.expected
    assert family.tokenizer is not None
    assert (family.tokenizer.height, family.tokenizer.width) == size
    assert family.tokenizer.grid == grid
    with pytest.raises(UsageError, match="multiples of 16"):
        families.find("cosmos-4b", size=(380, 640))
    with pytest.raises(UsageError, match="pictures of one size"):
        families.find("mineworld-300m", size=size)


@pytest.mark.parametrize("name", PARAMETERS)
def test_rules_fill_the_whole_transformer(name: str) -> None:
    """On the meta device: no tensor of the model without a source, none twice, and shapes that fit."""
    family = families.find(name)
    exporter = Exporter(family, GraphOptions(form=(Form.MODERN,), precision="fp16"))
    wanted = {n.removeprefix("transformer."): p.shape for n, p in exporter._placements.items()}
    tables = position_tables(family.transformer, "meta")
    sources = family.weights(random_sources(family, seed=0).transformer)
    assert len(sources) == len(family.rules)
    given = {n: source.shape for n, source in sources.items()} | {n: t.shape for n, t in tables.items()}
    assert given == wanted


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_tokenizer_makes_the_tokens_of_the_grid(name: str) -> None:
    family = families.find(name)
    layout, tokenizer = family.transformer.layout, family.tokenizer
    assert tokenizer is not None
    assert tokenizer.grid == (layout.rows, layout.columns)
    assert max(rule.high for rule in family.sampling.ranges) == tokenizer.codes
    assert Schedule.parse(family.order, layout).layout == layout


@pytest.mark.parametrize("name", [*PARAMETERS, "crafter-3m"])
def test_the_tokenizers_parameters_are_known_without_building_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = families.find(name).tokenizer
    assert tokenizer is not None
    counted = sum(math.prod(shape) for shape in tokenizer.expected_shapes().values())
    monkeypatch.delattr(TokenizerGraphs, "build")
    assert tokenizer.parameter_count() == counted


@pytest.mark.parametrize("name", [*PARAMETERS, "crafter-3m", "doom-3m"])
def test_the_rules_read_as_many_numbers_as_the_transformer_has(name: str) -> None:
    family = families.find(name)
    assert family.transformer.parameters == sum(math.prod(shape) for shape in family.expected.values())


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_context_is_that_of_the_release(name: str) -> None:
    config = families.find(name).transformer
    frames = 32 if name.endswith("-32f") else 16
    tokens = CONTEXT_TOKENS.get(name.split("-")[0], 347 * frames)
    assert config.context_length == tokens + config.layout.prefix


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_export_is_planned_within_four_and_a_half_gigabytes(name: str) -> None:
    plan = Exporter(families.find(name), GraphOptions(form=(Form.MODERN,), precision="fp16")).plan()
    assert plan.peak_bytes < (4.0e9 if name == "cosmos-4b" else 4.5e9)
    assert plan.files["weights.bin"] >= 2 * 0.999 * PARAMETERS[name]


def test_the_listing_names_every_model_with_its_licence_and_origin() -> None:
    rows = {str(row["model"]): row for row in families.listing()}
    assert PARAMETERS.keys() <= rows.keys()
    assert "withdrawn" in str(rows["mineworld-300m"]["weights"])
    assert all(row["licence"] and row["weights"] for row in rows.values())


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'cosmos-4b'"):
        families.find("cosmos-4")


@pytest.mark.parametrize("path", ["/worlds/mine", "./mine", "crafter-3m/"])
def test_a_path_for_a_name_is_sent_to_the_checkpoint(path: str) -> None:
    with pytest.raises(UsageError, match=f"unknown model '{path}'.*give it as --checkpoint"):
        families.find(path)
