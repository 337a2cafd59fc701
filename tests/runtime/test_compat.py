"""``compat = "mineworld"`` against the released decoding semantics: greedy tokens identical."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import diagd
from diagd.errors import UsageError
from diagd.export.transformer import Transformer
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import RowSeed, Schedule, StreamLayout
from tests.models import export_small
from tests.oracles.mineworld_released import Mode, Policy, decode_released
from tests.oracles.models import CODES, random_stream, small_model

LAYOUT = StreamLayout(4, 6, after=3)
FRAMES = 3
GREEDY = SamplingSettings(temperature=0.0)
SEEDS: dict[Policy, RowSeed] = {"prompt": RowSeed.PROMPT, "repeat": RowSeed.DUPLICATE}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return small_model(LAYOUT, context_frames=FRAMES + 2)


@pytest.fixture(scope="module")
def bundle(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_small(model, tmp_path_factory.mktemp("compat") / "small.diagd")


def released_schedule(mode: Mode, k: int, seed: RowSeed) -> Schedule:
    if mode == "naive":
        naive = Schedule.next_token(LAYOUT)
        return Schedule(LAYOUT, naive.k, naive.d, seed, refeed=False, keep_seeds=True)
    d = Schedule.serial(LAYOUT, k).d if mode == "image" else Schedule.chained(LAYOUT, k).d
    return Schedule(LAYOUT, k, d, seed, refeed=False, keep_seeds=True)


@pytest.mark.parametrize("prompt", [1, 2])
@pytest.mark.parametrize("policy", ["prompt", "repeat"])
@pytest.mark.parametrize(
    ("mode", "k"),
    [("naive", 1), ("image", 1), ("image", 2), ("image", 4), ("video", 1), ("video", 2), ("video", 4)],
)
def test_tokens_equal_the_released_code(
    model: Transformer, bundle: Path, mode: Mode, k: int, policy: Policy, prompt: int
) -> None:
    stream = random_stream(LAYOUT, prompt + FRAMES, prompt, seed=k)
    known = stream[: LAYOUT.first_cell(prompt) - LAYOUT.after]
    blocks = [
        stream[LAYOUT.first_cell(frame) - LAYOUT.after : LAYOUT.first_cell(frame)]
        for frame in range(1, prompt + FRAMES)
    ]
    released = decode_released(
        model,
        list(known),
        [list(block) for block in blocks[prompt - 1 :]],
        LAYOUT,
        k,
        mode,
        policy,
        FRAMES,
        range(CODES),
    )
    session = diagd.load(bundle, compat="mineworld", threads=1)
    prompts = np.stack(
        [stream[LAYOUT.first_cell(f) : LAYOUT.first_cell(f) + LAYOUT.cells] for f in range(prompt)]
    )
    leading = np.stack([np.zeros(LAYOUT.after, np.int64), *blocks]).astype(np.int32)
    for turn in (1, 2):  # the second one goes back to the prompt's rows
        session.start(prompts.reshape(-1, LAYOUT.rows, LAYOUT.columns).astype(np.int32), leading[:prompt])
        decoded = session.generate(
            FRAMES, leading[prompt:], schedule=released_schedule(mode, k, SEEDS[policy]), sampling=GREEDY
        )
        np.testing.assert_array_equal(np.stack([frame.tokens for frame in decoded]), released.tokens)
        assert session.timing.steps == turn * released.calls


def test_strict_decoding_differs(bundle: Path) -> None:
    """The released cache matters: were zero rows ignored, the test above would prove nothing."""
    schedule = released_schedule("video", 1, RowSeed.PROMPT)
    sessions = [diagd.load(bundle, compat=compat, threads=1) for compat in (None, "mineworld")]
    differing = 0
    for seed in range(8):
        stream = random_stream(LAYOUT, 4, 1, seed=seed)
        actions = np.random.default_rng(seed).integers(CODES, CODES + 6, (FRAMES, LAYOUT.after))
        decoded = []
        for session in sessions:
            session.start(stream[: LAYOUT.cells].reshape(1, LAYOUT.rows, LAYOUT.columns).astype(np.int32))
            frames = session.generate(FRAMES, actions.astype(np.int32), schedule=schedule, sampling=GREEDY)
            decoded.append(np.stack([frame.tokens for frame in frames]))
        differing += int((decoded[0] != decoded[1]).any())
    assert differing


def test_unknown_compat_is_refused(bundle: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'mineworld'"):
        diagd.load(bundle, compat="mineword")
