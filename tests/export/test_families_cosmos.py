"""Small Cosmos models in the released model.pt, against NumPy and against full recomputation."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import diagd
from diagd.bundle.transformer import TextShape, TransformerConfig, grid_rotary
from diagd.errors import CheckpointError, UsageError
from diagd.export.exporter import Sources, export, open_sources
from diagd.export.families import Family, cosmos
from diagd.export.options import GraphOptions
from diagd.export.transformer import Transformer
from diagd.runtime.options import parse_decoder
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.stream import Stream
from diagd.schedule import Schedule, StreamLayout
from tests.export.released import arrays_of, logits_of, module_of, random_rows, random_tensors
from tests.oracles import numpy_forward
from tests.oracles.full_recompute import FullRecompute, lengthened
from tests.oracles.rows import rows_of
from tests.oracles.sliding import SlidingOracle
from tests.runtime.test_fidelity import frames_of

CODES = 40
FRAMES, ROWS, COLUMNS = 4, 3, 4
HEAD_SIZE = 16
TEXT = TextShape(length=6, width=10)


def small(text: bool, yarn: bool) -> TransformerConfig:
    """Sixteen channels split 8, 4, 4; the heads are wider together than the residual stream."""
    return TransformerConfig(
        layout=StreamLayout(ROWS, COLUMNS, prefix_tokens=(CODES,) * text),
        context_frames=FRAMES,
        vocabulary=CODES + 4 * text,
        output_vocabulary=CODES,
        hidden=28,
        feed_forward=44,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=HEAD_SIZE,
        rotary=grid_rotary(HEAD_SIZE, 500_000.0, yarn_scale=2.0 if yarn else 1.0, trained=(3, 40)),
        layer_embedding=text,
        qk_norm=True,
        text=TEXT if text else None,
    )


@dataclass
class Case:
    family: Family
    path: Path
    model: Transformer
    shape: numpy_forward.CosmosShape
    text: np.ndarray | None


@pytest.fixture(scope="module", params=["base", "yarn", "video2world"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    text, yarn = request.param == "video2world", request.param != "base"
    path = tmp_path_factory.mktemp("cosmos") / "model.pt"
    family = cosmos.family("cosmos-small", small(text, yarn), str(path))
    tensors = random_tensors(family.expected)
    prefixed: dict[str, object] = {f"model.{name}": tensor for name, tensor in tensors.items()}
    prefixed["model.layers.0.attention._extra_state"] = io.BytesIO(b"state of an engine")
    torch.save({"model": prefixed} if yarn else prefixed, path)
    words = np.random.default_rng(5).normal(size=(TEXT.length, TEXT.width)) if text else None
    shape = numpy_forward.CosmosShape(FRAMES, ROWS, COLUMNS, HEAD_SIZE, yarn, begin_token=text)
    return Case(family, path, module_of(family, path), shape, words)


def test_logits_equal_the_network_in_numpy(case: Case) -> None:
    layout = case.family.transformer.layout
    rows = random_rows(layout, FRAMES, case.family.transformer.vocabulary)
    tensors = arrays_of(random_tensors(case.family.expected))
    expected = numpy_forward.cosmos(tensors, *rows, case.shape, case.text)
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits_of(case.model, *rows, case.text), expected, atol=5e-5)


class WithText(FullRecompute):
    """Full recomputation that reads a text."""

    text: torch.Tensor | None = None

    @torch.no_grad()
    def _forward(self) -> torch.Tensor:
        ids = torch.tensor([[fed.token for fed in self.fed]])
        positions = torch.tensor([fed.position for fed in self.fed])
        logits: torch.Tensor = self.model(ids, positions, self.visible(), self.text)
        return logits[0]


def recompute(case: Case) -> FullRecompute:
    oracle = WithText(case.model)
    oracle.text = None if case.text is None else torch.from_numpy(case.text).float()
    return oracle


def session_bundle(case: Case) -> Path:
    return case.path.parent / "small.diagd"


@pytest.fixture(scope="module")
def session(case: Case) -> diagd.runtime.session.Session:
    output = session_bundle(case)
    sources = Sources(open_sources(case.family, None, str(case.path)).transformer)
    export(case.family, GraphOptions(), sources, output)
    return diagd.load(output, threads=1)


def test_the_manifest_holds_the_whole_configuration(
    case: Case, session: diagd.runtime.session.Session
) -> None:
    assert session.manifest.transformer == case.model.config == case.family.transformer


@pytest.mark.parametrize("lags", ["next token", "serial", "chained"])
def test_the_graph_decodes_what_recomputation_decodes(
    case: Case, session: diagd.runtime.session.Session, lags: str
) -> None:
    layout = case.family.transformer.layout
    schedule = {
        "next token": Schedule.next_token(layout),
        "serial": Schedule.serial(layout, 1),
        "chained": Schedule.chained(layout, 1),
    }[lags]
    stream = np.random.default_rng(1).integers(0, CODES, layout.frame_start(FRAMES))
    stream[: layout.prefix] = layout.prefix_tokens
    prompt = frames_of(stream, layout, 0, 1)
    recompute(case).run(rows_of(schedule.table(1, FRAMES - 1, 0)), stream)
    if case.text is not None:  # another one, whose rows of the same prompt are others
        session.start(prompt, text=-case.text.astype(np.float32))
        next(session.generate(1, schedule=schedule))
    session.start(prompt, text=None if case.text is None else case.text.astype(np.float32))
    decoded = session.generate(FRAMES - 1, schedule=schedule, sampling=SamplingSettings(temperature=0.0))
    np.testing.assert_array_equal(
        np.stack([frame.tokens for frame in decoded]), frames_of(stream, layout, 1, FRAMES - 1)
    )


def test_what_is_refused_and_what_is_changed_later_leave_a_world_as_it_was(
    case: Case, session: diagd.runtime.session.Session
) -> None:
    text = None if case.text is None else case.text.astype(np.float32)
    prompt = np.random.default_rng(3).integers(0, CODES, (1, ROWS, COLUMNS))
    words = [None, None] if text is None else [text, -text]

    def decoded() -> Iterator[list[list[int]]]:
        order = Schedule.serial(session.layout, 1)
        return (frame.tokens.tolist() for frame in session.generate(2, schedule=order))

    expected = []
    for other in words:
        session.start(prompt, text=other)
        expected.append(list(decoded()))
    assert (expected[0] == expected[1]) == (text is None)
    given = None if text is None else text.copy()
    session.start(prompt, text=given)
    run = decoded()
    assert next(run) == expected[0][0]
    for wrong in (prompt + 1000, prompt[0], prompt / 3):
        with pytest.raises(UsageError):
            session.start(wrong, text=words[1])
    assert list(run) == expected[0][1:]
    if given is not None:
        given *= -1
    session.start(prompt, text=given)
    assert list(decoded()) == expected[1]


ORDERS = ("next token", "k=1 serial", "k=2 serial", "k=1 chained", "jacobi")


def drawn(session: diagd.runtime.session.Session, order: str, frames: int, seed: int) -> object:
    """Tokens of so many frames, or why there are none."""
    decoder, law = parse_decoder(order, session.manifest), SamplingSettings(1.0, 0, 0.95)
    try:
        run = session.frames(decoder, count=frames, sampling=law, seed=seed)
    except UsageError as error:
        return str(error)
    return [frame.tokens.tolist() for frame in run]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("session")
def test_worlds_that_take_turns_and_other_texts_are_those_of_a_run_alone(case: Case, seed: int) -> None:
    """Two over one session, moved and told another text at random, each beside a session of its own."""
    random = np.random.default_rng(seed)
    texts: list[np.ndarray | None] = [
        None if case.text is None else random.normal(size=(n, TEXT.width)) for n in (1, 4, 6)
    ]
    live, *alone = (diagd.load(session_bundle(case), threads=1) for _ in range(3))
    streams: list[Stream] = []
    for own in alone:
        prompt, text = random.integers(0, CODES, (1, ROWS, COLUMNS)), texts[random.integers(3)]
        if streams:
            live.stream = live.stream.branch()
        for session in (live, own):
            session.start(prompt, text=text)
        streams.append(live.stream)
    for _ in range(14):
        world, frames, draw = (int(random.integers(low, high)) for low, high in ((0, 2), (1, 4), (0, 9)))
        own, order = alone[world], str(random.choice(ORDERS))
        live.stream, past, text = streams[world], list(own.stream.past), texts[random.integers(3)]
        kind = random.choice(["play", "play", "back", "move", "text"])
        if kind == "play":
            assert drawn(live, order, frames, draw) == drawn(own, order, frames, draw)
        elif kind == "back":
            frames = min(frames, *(session.stream.spare(len(past)) for session in (live, own)))
            for session in (live, own):
                session.stream.rewind(frames)
        elif kind == "move":
            live.stream = live.stream.branch()
        else:
            live.stream = live.stream.branch()
            for session in (live, own):
                session.start(np.stack([frame.tokens for frame in past[-2:]]), text=text)
        streams[world] = live.stream


def test_a_full_window_slides(case: Case, session: diagd.runtime.session.Session) -> None:
    """Base models void the oldest frame; with sinusoids, the begin token and the frames that stay move."""
    layout, frames = case.family.transformer.layout, 4
    schedule = Schedule.serial(layout, 1)
    stream = np.random.default_rng(2).integers(0, CODES, layout.frame_start(1 + frames))
    stream[: layout.prefix] = layout.prefix_tokens
    session = diagd.load(session_bundle(case), window=3, threads=1)
    session.start(
        frames_of(stream, layout, 0, 1), text=None if case.text is None else case.text.astype(np.float32)
    )
    if case.text is None:
        oracle = FullRecompute(lengthened(case.model, 1 + frames), window=3)
        oracle.run(rows_of(schedule.table(1, frames, 0)), stream)
    else:
        SlidingOracle(lambda: recompute(case), 3, 1, range(CODES)).run(schedule, 1, frames, stream)
    decoded = list(session.generate(frames, schedule=schedule, sampling=SamplingSettings(temperature=0.0)))
    np.testing.assert_array_equal(
        np.stack([frame.tokens for frame in decoded]), frames_of(stream, layout, 1, frames)
    )
    assert [frame.refill_steps for frame in decoded] == ([0] * 4 if case.text is None else [0, 0, 1, 1])


def test_texts_that_do_not_fit_are_refused_and_short_ones_filled_up_with_zeros(
    case: Case, session: diagd.runtime.session.Session
) -> None:
    prompt = np.zeros((1, ROWS, COLUMNS), np.int32)
    if case.text is None:
        with pytest.raises(UsageError, match="attends to no text"):
            session.start(prompt, text=np.zeros((1, TEXT.width), np.float32))
        return
    with pytest.raises(UsageError, match=r"needs text embeddings \[n, 10\], n up to 6: --set text=FILE"):
        session.start(prompt)
    for shape in ((7, TEXT.width), (1, 9), (TEXT.width,)):
        with pytest.raises(UsageError, match="text embeddings have shape"):
            session.start(prompt, text=np.zeros(shape, np.float32))
    with pytest.raises(UsageError, match="text embeddings hold nan"):
        session.start(prompt, text=np.full((1, TEXT.width), np.nan, np.float32))
    reader = session._text
    short = case.text[:2].astype(np.float32)
    filled = np.concatenate([short, np.zeros((TEXT.length - 2, TEXT.width), np.float32)])
    for name, rows in reader.rows(short).items():
        np.testing.assert_array_equal(rows, reader.rows(filled)[name])


def test_another_model_is_refused(case: Case, tmp_path: Path) -> None:
    other = tmp_path / "model.pt"
    torch.save({"model.tok_embeddings.weight": torch.zeros(2, 2)}, other)
    with pytest.raises(CheckpointError, match="missing"):
        module_of(case.family, other)
