"""Small WHAMs in the released Lightning .ckpt, against NumPy and against full recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diagd
from diagd.bundle import Bundle
from diagd.bundle.actions import FirstPressedSlot, OnlyPressedSlot
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import CheckpointError, UsageError
from diagd.export import families
from diagd.export.exporter import Exporter, export, open_sources
from diagd.export.families import Family, wham
from diagd.export.options import GraphOptions
from diagd.export.transformer import Transformer
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.step import Frame
from diagd.schedule import Schedule
from tests.export.checkpoints.foreign import write_wham
from tests.export.released import arrays_of, logits_of, module_of, random_rows, random_tensors
from tests.oracles import numpy_forward
from tests.oracles.full_recompute import FullRecompute
from tests.oracles.sliding import SlidingOracle
from tests.runtime.test_fidelity import actions_of, frames_of

HIDDEN, HEADS, FRAMES, LAYERS = 32, 4, 4, 2
VIT = wham.WhamVitConfig(
    height=28, width=40, patch=10, hidden=16, layers=1, head_size=8, code_width=4, codes=24
)
GRID = (3, 4)
MODEL_SPEC = {"image_size_per_y_axis": 28, "image_size_per_x_axis": 40, "head_size": 8}


@pytest.fixture(scope="module", autouse=True)
def small_release() -> Iterator[None]:
    """The name ``wham-200m`` stands for a model of this size while these tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(wham.SIZES, "wham-200m", wham._Size("small.ckpt", LAYERS, HIDDEN))
        patch.setitem(wham.HEADS, HIDDEN, HEADS)
        yield


def tensors_of(bias: bool, norm_weights: bool) -> dict[str, Tensor]:
    """Weights of a model under released names, prefix stripped."""
    config = wham.transformer_config(
        grid=GRID, codes=VIT.codes, frames=FRAMES, hidden=HIDDEN, layers=LAYERS, heads=HEADS, bias=bias
    )
    rules = wham.wham_rules(config, norm_weights=norm_weights)
    return random_tensors({name: shape for rule in rules for name, shape in rule.sources})


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    """A release: the transformer, its tied head, the image tokenizer with masks and a discriminator."""
    state = {f"predictor.gpt_model.{name}": tensor for name, tensor in tensors.items()}
    embedding = state["predictor.gpt_model.transformer.wte.weight"]
    state.setdefault("predictor.gpt_model.lm_head.weight", embedding)
    images = random_tensors(VIT.expected_shapes(), seed=1)
    images["encoder.vit.0.attn.attn_mask"] = torch.ones(1, 1, 12, 12)
    images["patch_gan.main.0.weight"] = torch.ones(2, 2)
    state |= {f"context_encoders.images.{name}": tensor for name, tensor in images.items()}
    write_wham(path, state, **MODEL_SPEC)
    return path


@dataclass
class Case:
    family: Family
    path: Path
    model: Transformer
    weights: numpy_forward.Weights


@pytest.fixture(scope="module", params=["version 1, biases", "version 2, biases", "version 1", "version 2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp("wham"))


def make_case(variant: str, directory: Path) -> Case:
    tensors = tensors_of(bias="biases" in variant, norm_weights="version 1" in variant)
    path = write(directory / "wham.ckpt", tensors)
    family = families.find("wham-200m", str(path))
    return Case(family, path, module_of(family, path), arrays_of(tensors))


def test_logits_equal_the_network_in_numpy(case: Case) -> None:
    config = case.family.transformer
    rows = random_rows(config.layout, FRAMES, config.vocabulary)
    expected = numpy_forward.wham(case.weights, *rows, HEADS)
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits_of(case.model, *rows), expected, atol=5e-5)


def test_dimensions_are_read_off_the_checkpoint(case: Case) -> None:
    config, tokenizer = case.family.transformer, case.family.tokenizer
    assert (config.layout.rows, config.layout.columns, config.layout.after) == (*GRID, 16)
    assert (config.context_frames, config.vocabulary, config.layers) == (FRAMES, VIT.codes + 68, LAYERS)
    assert tokenizer is not None
    assert (tokenizer.height, tokenizer.width, tokenizer.grid) == (28, 40, GRID)
    assert tokenizer.expected_shapes() == VIT.expected_shapes()
    actions = case.family.actions
    assert actions is not None
    first = actions.slots[0]
    assert isinstance(first, FirstPressedSlot | OnlyPressedSlot)
    assert first.none == VIT.codes


@dataclass
class Exported:
    model: Transformer
    bundle: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    directory = tmp_path_factory.mktemp("export")
    case = make_case("version 2, biases", directory)
    sources = open_sources(case.family, None, None)
    return Exported(case.model, export(case.family, GraphOptions(), sources, directory / "w.diagd").path)


def run_both(exported: Exported, k: int, window: int | None, roll: int | None, frames: int) -> list[Frame]:
    layout = exported.model.config.layout
    random = np.random.default_rng(k)
    stream = random.integers(0, VIT.codes, layout.frame_start(1 + frames))
    for frame in range(1 + frames):
        start = layout.first_cell(frame) + layout.cells
        stream[start : start + 16] = random.integers(VIT.codes, VIT.codes + 68, 16)
    given = stream.copy()
    schedule = Schedule.serial(layout, k) if k < layout.columns else Schedule.next_token(layout)
    session = diagd.load(exported.bundle, window=window, threads=1, roll=roll)
    session.engine.max_width = 32
    oracle = SlidingOracle(
        lambda: FullRecompute(exported.model), session.window, roll or 1, range(VIT.codes), first=1
    )
    oracle.run(schedule, 1, frames, stream)
    session.start(frames_of(given, layout, 0, 1), actions_of(given, layout, 0, 1))
    actions = actions_of(given, layout, 1, frames)
    decoded = list(
        session.generate(frames, actions, schedule=schedule, sampling=SamplingSettings(temperature=0.0))
    )
    np.testing.assert_array_equal(
        np.stack([frame.tokens for frame in decoded]), frames_of(stream, layout, 1, frames)
    )
    assert session.timing.refill_steps == sum(frame.refill_steps for frame in decoded)
    assert sum(frame.refill_steps > 0 for frame in decoded) == oracle.slides
    return decoded


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_graph_decodes_what_recomputation_decodes(exported: Exported, k: int) -> None:
    assert not any(frame.refill_steps for frame in run_both(exported, k, None, None, frames=3))


@pytest.mark.parametrize(("window", "roll"), [(None, None), (3, 1), (4, 2), (4, 3)])
def test_a_sliding_window_is_fed_again_at_its_new_positions(
    exported: Exported, window: int | None, roll: int | None
) -> None:
    frames = 8
    decoded = run_both(exported, 1, window, roll, frames)
    passes = [frame.refill_steps for frame in decoded]
    kept = (window or FRAMES) - (roll or 1)
    rows = (kept - 1) * exported.model.config.layout.frame_length + 11  # all of the newest frame but its end
    assert set(passes) == {0, -(-rows // 32)}
    assert all(frame.seconds >= frame.refill_seconds for frame in decoded)


def test_a_second_call_continues_the_first(exported: Exported) -> None:
    layout = exported.model.config.layout
    random = np.random.default_rng(8)
    prompt = random.integers(0, VIT.codes, (1, *GRID)).astype(np.int32)
    actions = random.integers(VIT.codes, VIT.codes + 68, (7, 16)).astype(np.int32)
    settings: dict[str, Any] = {"schedule": Schedule.serial(layout, 1), "sampling": SamplingSettings(0.0)}

    def tokens(session: Session, calls: list[slice]) -> np.ndarray:
        session.start(prompt)
        parts = [list(session.generate(c.stop - c.start, actions[c], **settings)) for c in calls]
        return np.stack([frame.tokens for part in parts for frame in part])

    session = diagd.load(exported.bundle, window=3, threads=1)
    whole = tokens(session, [slice(0, 7)])
    np.testing.assert_array_equal(whole, tokens(session, [slice(0, 2), slice(2, 3), slice(3, 7)]))


def test_overlapping_frames_cannot_slide(exported: Exported) -> None:
    layout = exported.model.config.layout
    session = diagd.load(exported.bundle, threads=1)
    session.start(np.zeros((1, *GRID), np.int32))
    chained, actions = Schedule.chained(layout, 1), np.full((4, 16), VIT.codes, np.int32)
    assert len(list(session.generate(3, actions[:3], schedule=chained))) == 3
    with pytest.raises(UsageError, match="does only between frames"):
        session.generate(1, actions[:1], schedule=chained)


@pytest.mark.parametrize("roll", [0, 4])
def test_a_roll_of_the_whole_window_is_refused(exported: Exported, roll: int) -> None:
    with pytest.raises(UsageError, match=rf"roll={roll} .* outside 1\.\.3"):
        diagd.load(exported.bundle, threads=1, roll=roll)


def test_pixels_pass_through_the_tokenizer_of_the_same_file(exported: Exported) -> None:
    codec = PixelCodec(Bundle.open(exported.bundle), CpuOptions(threads=1))
    pixels = np.random.default_rng(2).integers(0, 256, (2, 28, 40, 3)).astype(np.uint8)
    tokens = codec.encode(pixels)
    assert tokens.shape == (2, *GRID)
    images = list(codec.decode(list(tokens)))
    assert [image.shape for image in images] == [(28, 40, 3)] * 2


def test_the_sampling_rules_are_those_of_the_release(exported: Exported) -> None:
    rules = Bundle.open(exported.bundle).manifest.sampling
    table = rules.range_table(exported.model.config.layout)
    assert table[0].tolist() == [1, VIT.codes]
    assert table[1:12].tolist() == [[0, VIT.codes]] * 11
    assert (rules.keep_crossing, rules.minimum_temperature) == (False, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.wpe.weight": torch.zeros(29, HIDDEN)}, "expected a multiple of 28 positions"),
        ({"transformer.wte.weight": torch.zeros(93, HIDDEN)}, "92 ids"),
        ({"transformer.wte.weight": torch.zeros(92, 20)}, "20 wide, for which the number of attention heads"),
        ({"lm_head.weight": torch.ones(92, HIDDEN)}, "other than its embedding"),
    ],
)
def test_contradicting_checkpoints_are_refused(
    tmp_path: Path, change: dict[str, Tensor], message: str
) -> None:
    path = write(tmp_path / "bad.ckpt", tensors_of(bias=True, norm_weights=True) | change)
    with pytest.raises(CheckpointError, match=message):
        families.find("wham-200m", str(path))


def test_a_head_that_equals_the_embedding_is_tied(tmp_path: Path) -> None:
    tensors = tensors_of(bias=True, norm_weights=True)
    path = write(
        tmp_path / "copied.ckpt", tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
    )
    assert families.find("wham-200m", str(path)).transformer.tied_head


def test_a_file_of_another_model_is_not_taken_for_a_tokenizer(tmp_path: Path) -> None:
    torch.save({"state_dict": {"transformer.head": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"'transformer\.wte\.weight'.* is it a file of this model"):
        families.find("wham-200m", str(tmp_path / "other.ckpt"))


def test_a_tokenizer_may_lie_in_another_file(tmp_path: Path) -> None:
    tensors = tensors_of(bias=True, norm_weights=True)
    whole, alone = write(tmp_path / "whole.ckpt", tensors), tmp_path / "alone.pt"
    torch.save({wham.PREFIX + name: tensor for name, tensor in tensors.items()}, alone)
    family = families.find("wham-200m", str(alone), tokenizer=str(whole))
    assert family.tokenizer == families.find("wham-200m", str(whole)).tokenizer == VIT
    Exporter(family, GraphOptions()).check(open_sources(family, None, str(whole)))


def test_a_tokenizer_that_lies_nowhere_is_missed(tmp_path: Path) -> None:
    tensors = tensors_of(bias=True, norm_weights=True)
    tensors["transformer.wpe.weight"] = torch.zeros(2 * 556, HIDDEN)  # frames as released
    torch.save({wham.PREFIX + name: tensor for name, tensor in tensors.items()}, tmp_path / "alone.pt")
    family = families.find("wham-200m", str(tmp_path / "alone.pt"))
    with pytest.raises(CheckpointError, match=r"alone\.pt holds no tokenizer of wham-200m; give --set"):
        Exporter(family, GraphOptions()).check(open_sources(family, None, None))


def test_the_other_size_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "small.ckpt", tensors_of(bias=True, norm_weights=True))
    with pytest.raises(CheckpointError, match="choose another --model"):
        families.find("wham-1.6b", str(path))
