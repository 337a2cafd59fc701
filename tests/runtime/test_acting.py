"""Actions that the model decodes, token for token against the released networks in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch

import diagd
from diagd.bundle import Bundle, Form
from diagd.bundle.transformer import TransformerConfig, linear_rotary
from diagd.engines.backend import StepOptions
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.processor import open_fixed
from diagd.errors import UsageError
from diagd.export.checkpoints import open_checkpoint
from diagd.export.exporter import Sources, export
from diagd.export.families import Family, mineworld, wham
from diagd.export.options import GraphOptions
from diagd.runtime.decoders import Decoder, JacobiDecoder, ScheduledDecoder
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.slots import TokenPlaces
from diagd.schedule import Schedule, StreamLayout
from tests.export.released import arrays_of, random_tensors
from tests.oracles import numpy_forward

GRID, WINDOW, PROMPT, FRAMES = (2, 3), 3, 2, 4
Logits = Callable[[np.ndarray, int], np.ndarray]
"""Of the token behind a stream, whose window ends with a frame."""


@dataclass
class Case:
    bundle: Bundle
    logits: Logits
    ahead: int
    """Frames that the window of an action ends behind the last known one."""


def wham_case(folder: Path) -> Case:
    config = wham.transformer_config(
        grid=GRID, codes=24, frames=WINDOW, hidden=16, layers=2, heads=2, bias=True
    )
    family = wham.family("small-wham", wham.Variant(config, norm_weights=True, tokenizer=None))
    bundle, weights = exported(family, folder)
    length = config.layout.frame_length

    def logits(stream: np.ndarray, newest: int) -> np.ndarray:
        """The window is fed again when it slides: all rows count from its start and see no further back."""
        ids = stream[max(0, newest - WINDOW + 1) * length :]
        rows = np.arange(len(ids))
        made: np.ndarray = numpy_forward.wham(weights, ids, rows, rows[None] <= rows[:, None], 2)[-1]
        return made

    return Case(bundle, logits, 0)


def mineworld_case(folder: Path) -> Case:
    config = TransformerConfig(
        layout=StreamLayout(*GRID, after=11),
        context_frames=WINDOW,
        vocabulary=mineworld.VOCABULARY,
        output_vocabulary=mineworld.VOCABULARY,
        hidden=16,
        feed_forward=24,
        layers=2,
        heads=2,
        kv_heads=1,
        head_size=8,
        rotary=linear_rotary(8, 10_000.0),
    )
    family = mineworld.family("small-mineworld", config)
    bundle, weights = exported(family, folder)
    length, cells = config.layout.frame_length, config.layout.cells

    def logits(stream: np.ndarray, newest: int) -> np.ndarray:
        """Rows stay as they were fed: with their frame, but its last cell and action with the next."""
        rows = np.arange(len(stream))
        with_frame = np.maximum((rows + length - cells + 1) // length, PROMPT)
        with_frame = np.where(with_frame > newest, newest, with_frame)
        oldest = np.maximum(0, with_frame - WINDOW + 1) * length
        visible = (rows[None] <= rows[:, None]) & (rows[None] >= oldest[:, None])
        made: np.ndarray = numpy_forward.mineworld(weights, stream, rows, visible, 8)[-1]
        return made

    return Case(bundle, logits, 1)


def exported(family: Family, folder: Path) -> tuple[Bundle, numpy_forward.Weights]:
    tensors = random_tensors(family.expected)
    file = folder / f"{family.name}.ckpt"
    torch.save({"state_dict": tensors}, file)
    made = export(
        family,
        GraphOptions(form=(Form.PREFIX, Form.MODERN), widths=(20,)),
        Sources(open_checkpoint(str(file))),
        folder / f"{family.name}.diagd",
    )
    return Bundle.open(made.path), arrays_of(tensors)


@pytest.fixture(scope="module", params=[wham_case, mineworld_case])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    made: Case = request.param(tmp_path_factory.mktemp("acting"))
    return made


def recomputed(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Actions and frames by the network alone: the likeliest id that each slot, or cell, may be."""
    manifest, layout = case.bundle.manifest, case.bundle.manifest.layout
    assert manifest.actions is not None
    slots = [np.array(slot.ids) for slot in manifest.actions.slots]
    ranges = manifest.sampling.range_table(layout)[: layout.cells]
    frames, actions = prompt(case)
    known = [part.ravel() for pair in zip(actions, frames, strict=True) for part in pair][1:]
    stream = np.concatenate(known).astype(np.int64)
    for frame in range(PROMPT, PROMPT + FRAMES):
        for ids in slots:
            stream = np.append(stream, ids[case.logits(stream, frame - 1 + case.ahead)[ids].argmax()])
        for low, high in ranges:
            stream = np.append(stream, low + case.logits(stream, frame)[low:high].argmax())
    made = stream[PROMPT * layout.frame_length - layout.gap :].reshape(FRAMES, -1)
    return made[:, : layout.gap], made[:, layout.gap :].reshape(FRAMES, *GRID)


def prompt(case: Case) -> tuple[np.ndarray, np.ndarray]:
    random, codec = np.random.default_rng(5), case.bundle.manifest.actions
    assert codec is not None
    actions = [[int(random.choice(slot.ids)) for slot in codec.slots] for _ in range(PROMPT)]
    return random.integers(1, 24, (PROMPT, *GRID)).astype(np.int32), np.array(actions, np.int32)


def started(case: Case) -> Session:
    session = diagd.load(case.bundle.path, threads=1)
    session.start(*prompt(case))
    return session


def made(
    session: Session, decoder: Decoder | None, temperature: float, actions: object = None
) -> tuple[np.ndarray, np.ndarray]:
    frames = list(
        session.frames(
            decoder,
            repeat(None) if actions is None else actions,  # type: ignore[arg-type]
            count=FRAMES,
            sampling=SamplingSettings(temperature),
            seed=7,
        )
    )
    return np.stack([frame.action for frame in frames]), np.stack([frame.tokens for frame in frames])


def test_actions_and_frames_are_the_network_s(case: Case) -> None:
    """Through two slides of the window, one token a pass."""
    decoder = ScheduledDecoder(Schedule.next_token(case.bundle.manifest.layout))
    session = started(case)
    for found, expected in zip(made(session, decoder, 0.0), recomputed(case), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert len(np.unique(recomputed(case)[0], axis=0)) > 1
    gap, cells = session.layout.gap, session.layout.cells
    assert session.timing.steps == FRAMES * (gap + cells) + 1  # and one for the prompt


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_jacobi_decodes_the_same_actions_and_frames_in_fewer_passes(case: Case, temperature: float) -> None:
    one, other = started(case), started(case)
    expected = made(one, ScheduledDecoder(Schedule.next_token(one.layout)), temperature)
    for found, wanted in zip(made(other, JacobiDecoder(), temperature), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert other.timing.steps < one.timing.steps


def test_an_engine_of_fixed_shape_gives_the_same_actions(case: Case) -> None:
    """Its device draws cells only; the rows of an action are asked for."""
    manifest = case.bundle.manifest
    tokens = TokenPlaces(manifest.layout, WINDOW).size
    options = StepOptions(0, tokens, CpuOptions(1, prepack=False))
    with Session(manifest, open_fixed(case.bundle, Form.MODERN, options), WINDOW) as session:
        for decoder in (ScheduledDecoder(Schedule.next_token(manifest.layout)), JacobiDecoder(), None):
            session.start(*prompt(case))
            expected = made(started(case), decoder, 1.0)
            for found, wanted in zip(made(session, decoder, 1.0), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)


def test_a_decoded_action_counts_as_the_same_one_given(case: Case) -> None:
    """Diagonal decoding too: the first action is next-token prediction's, and streams go on alike."""
    session = started(case)
    actions, frames = made(session, None, 1.0)
    first = made(started(case), JacobiDecoder(), 1.0)[0][0]
    np.testing.assert_array_equal(actions[0], first)
    np.testing.assert_array_equal(made(started(case), None, 1.0, actions)[1], frames)
    behind = session.act(sampling=SamplingSettings(1.0), seed=7)
    session.stream.rewind(1)
    np.testing.assert_array_equal(session.act(sampling=SamplingSettings(1.0), seed=7), actions[-1])
    again = next(session.frames(None, [None], sampling=SamplingSettings(1.0), seed=7))
    np.testing.assert_array_equal(again.tokens, frames[-1])
    np.testing.assert_array_equal(session.act(sampling=SamplingSettings(1.0), seed=7), behind)


def test_the_model_goes_on_behind_given_actions_and_can_be_overruled(case: Case) -> None:
    """Of an iterable of any mixture; what is given is what the next action follows from."""
    actions, frames = made(started(case), None, 1.0)
    mixed = [actions[0], None, actions[2], None]
    for found, expected in zip(made(started(case), None, 1.0, mixed), (actions, frames), strict=True):
        np.testing.assert_array_equal(found, expected)
    other = prompt(case)[1][0]
    assert (other != actions[1]).any()
    found = made(started(case), None, 1.0, lambda frame: other if frame == PROMPT + 1 else None)[0]
    np.testing.assert_array_equal(found[:2], [actions[0], other])


def test_a_callable_ends_a_run_as_an_iterator_does(case: Case) -> None:
    lines = iter([None, prompt(case)[1][0]])
    assert len(list(started(case).frames(None, lambda _: next(lines)))) == 2


def test_what_begins_before_the_model_can_act_is_refused(case: Case) -> None:
    session = started(case)
    session.start(*(part[:1] for part in prompt(case)))
    chained = ScheduledDecoder(Schedule.chained(session.layout, 1))
    with pytest.raises(UsageError, match="before the frame that the model would act at is complete"):
        list(session.frames(chained, repeat(None), count=2))
    assert len(list(session.frames(None, repeat(None), count=1))) == 1


def test_models_whose_head_has_no_actions_say_so(small_bundle: Path) -> None:
    session = diagd.load(small_bundle, threads=1)
    session.start(np.zeros((1, session.layout.rows, session.layout.columns), np.int32))
    with pytest.raises(UsageError, match="visual tokens only"):
        list(session.frames(None, repeat(None), count=1))
