"""Position tables and options of the transformer that no single family shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from diagd.bundle.transformer import (
    Axis,
    NormKind,
    TextShape,
    TransformerConfig,
    coordinates,
    geometric_frequencies,
    grid_rotary,
    grid_sinusoids,
    linear_rotary,
    parameter_shapes,
    yarn,
)
from diagd.export import families
from diagd.export.transformer import FullAttention, Transformer, position_tables
from diagd.schedule import StreamLayout
from tests.oracles import numpy_forward


def test_grid_rotary_has_44_time_channels_and_42_for_each_axis() -> None:
    layout = StreamLayout(40, 64)
    rotary = grid_rotary(128, 500_000.0)
    assert [(a.axis, len(a.frequencies)) for a in rotary.axes] == [
        (Axis.FRAME, 22),
        (Axis.ROW, 21),
        (Axis.COLUMN, 21),
    ]
    angles = rotary.angles(layout, layout.frame_start(5))
    position = 3 * 2560 + 17 * 64 + 9
    expected = [
        *(3 * 500_000.0 ** (-2 * i / 44) for i in range(22)),
        *(17 * 500_000.0 ** (-2 * i / 42) for i in range(21)),
        *(9 * 500_000.0 ** (-2 * i / 42) for i in range(21)),
    ]
    np.testing.assert_allclose(angles[position], expected, rtol=1e-12)


@pytest.mark.parametrize("tables", ["angles", "sinusoids"])
def test_a_begin_token_stands_at_zero_and_shifts_the_rest_by_one_row(tables: str) -> None:
    def rows(layout: StreamLayout, positions: int) -> np.ndarray:
        if tables == "angles":
            return grid_rotary(16, 500_000.0).angles(layout, positions)
        return grid_sinusoids(layout, positions, 28)

    plain, shifted = rows(StreamLayout(3, 4), 36), rows(StreamLayout(3, 4, prefix=1), 37)
    np.testing.assert_array_equal(shifted[0], 0)
    np.testing.assert_array_equal(shifted[1:], plain)


def test_yarn_keeps_fast_frequencies_and_halves_slow_ones() -> None:
    space, time = geometric_frequencies(42, 500_000.0), geometric_frequencies(44, 500_000.0)
    ratio = np.divide(yarn(space, 40, 2.0), space)
    np.testing.assert_allclose(ratio[:3], [1.0, 0.9013, 0.6374], atol=5e-5)
    np.testing.assert_allclose(ratio[3:], 0.5)
    np.testing.assert_allclose(np.divide(yarn(time, 3, 2.0), time), 0.5)
    np.testing.assert_allclose(yarn(space, 40, 1.0), space, rtol=1e-15)


def test_the_angles_of_the_12b_equal_the_description() -> None:
    config = families.find("cosmos-12b").transformer
    assert config.rotary is not None
    positions = np.arange(config.context_length)
    shape = numpy_forward.CosmosShape(5, 40, 64, 128, yarn=True, begin_token=False)
    expected = numpy_forward.rope_3d(*numpy_forward.grid_coordinates(positions, shape), shape)
    np.testing.assert_allclose(config.rotary.angles(config.layout, len(positions)), expected, rtol=1e-12)


def test_the_sinusoids_of_the_5b_equal_the_description() -> None:
    """Widths 1368, 1364, 1364; bfloat16; the first row is 0."""
    layout = families.find("cosmos-5b-video2world").transformer.layout
    table = torch.from_numpy(grid_sinusoids(layout, 2 * 2560 + 1, 4096)).bfloat16().float().numpy()
    shape = numpy_forward.CosmosShape(5, 40, 64, 128, yarn=False, begin_token=True)
    picked = np.array([1, 2, 65, 640, 2561, 5000])
    coordinates_of = numpy_forward.grid_coordinates(picked, shape)
    expected = numpy_forward.sinusoids(*coordinates_of, 4096)
    np.testing.assert_array_equal(table[0], 0)
    assert np.mean(table[picked] == expected) > 0.9999  # float32 before the rounding may cross a tie
    np.testing.assert_allclose(table[picked], expected, atol=2**-8)


def test_known_tokens_stand_at_the_first_cell_of_their_frame() -> None:
    at = coordinates(StreamLayout(2, 3, before=1, after=2), 18)
    assert at[Axis.FRAME].tolist() == [0] * 9 + [1] * 9
    assert at[Axis.ROW][:9].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0]
    assert at[Axis.COLUMN][:9].tolist() == [0, 0, 1, 2, 0, 1, 2, 0, 0]


def config_of(**options: object) -> TransformerConfig:
    sizes: dict[str, object] = {
        "layout": StreamLayout(2, 3),
        "context_frames": 2,
        "vocabulary": 11,
        "output_vocabulary": 11,
        "hidden": 12,
        "feed_forward": 20,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_size": 6,
        "rotary": linear_rotary(6, 1e4),
    }
    return TransformerConfig(**(sizes | options))  # type: ignore[arg-type]


def test_a_layer_norm_without_bias_only_scales() -> None:
    norm, x = torch.nn.LayerNorm(12, 1e-5, bias=False), torch.randn(3, 12, dtype=torch.float64)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    expected = numpy_forward.layer_norm(x.numpy(), norm.weight.detach().double().numpy(), 0.0)
    np.testing.assert_allclose(norm.double()(x).detach().numpy(), expected, atol=1e-9)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


def test_a_tied_head_is_the_embedding() -> None:
    model = Transformer(config_of(tied_head=True)).initialise(torch.Generator().manual_seed(0))
    assert not any(name.startswith("head") for name in model.state_dict())
    states = torch.randn(4, 12)
    torch.testing.assert_close(model.logits(states, FullAttention(None)), states @ model.embedding.T)


OPTIONS: list[dict[str, object]] = [
    {},
    {"bias": True, "gated": False, "tied_head": True, "position_embedding": True, "rotary": None},
    {"norm": NormKind.LAYER, "bias": True, "gated": True, "slot_embedding": True},
    {"norm": NormKind.LAYER, "qk_norm": True, "layer_embedding": True},
    {"qk_norm": True, "text": TextShape(4, 5), "norm": NormKind.LAYER, "bias": True, "gated": False},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_shapes_of_the_parameters_are_known_without_the_module(options: dict[str, object]) -> None:
    config = config_of(**options)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert list(parameter_shapes(config).items()) == shapes
    assert config.parameters == sum(parameter.numel() for parameter in model.parameters())
    rows = [parameter for name, parameter in model.named_parameters() if name.endswith("embedding")]
    once = [parameter for name, parameter in model.named_parameters() if name.endswith("key_value")]
    tied = config.vocabulary * config.hidden if config.tied_head else 0
    assert config.looked_up_parameters == sum(p.numel() for p in (*rows, *once)) - tied


@pytest.mark.parametrize("options", OPTIONS)
def test_a_configuration_survives_its_json(options: dict[str, object]) -> None:
    """Every field, to the last bit of the frequencies: the module can be rebuilt from a manifest."""
    config, adapter = config_of(**options), TypeAdapter(TransformerConfig)
    assert adapter.validate_json(adapter.dump_json(config)) == config


@pytest.mark.parametrize(
    "options",
    [{}, {"position_embedding": True, "rotary": None}, {"layer_embedding": True}, {"bias": True}],
)
def test_buffers_on_the_meta_device_have_the_shapes_of_real_ones(options: dict[str, object]) -> None:
    config = config_of(norm=NormKind.LAYER, **options)
    real, meta = position_tables(config), position_tables(config, "meta")
    assert {n: (t.shape, t.dtype) for n, t in real.items()} == {
        n: (t.shape, t.dtype) for n, t in meta.items()
    }
    assert {t.device.type for t in meta.values()} <= {"meta"}
    assert {t.device.type for t in real.values()} <= {"cpu"}


def test_only_differences_of_positions_matter_unless_they_are_absolute() -> None:
    ids, generator = torch.tensor([[3, 1, 4, 1, 5]]), torch.Generator().manual_seed(0)
    for options, matters in (({}, False), ({"layer_embedding": True}, True)):
        config = config_of(context_frames=3, **options)
        model = Transformer(config).initialise(generator)
        with torch.no_grad():
            near, far = (model(ids, torch.arange(5) + shift) for shift in (0, 6))
        assert config.absolute is matters
        assert torch.allclose(near, far, atol=1e-4) is not matters
