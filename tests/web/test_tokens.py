"""What the page decodes, against Python's tokens: the same schedules, slots, noise and draws."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diagd
from diagd.bundle import Bundle
from diagd.engines.engine import SamplingState
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.engines.sampler import noise_rows, sample
from diagd.export.exporter import export, random_sources
from diagd.export.families import find
from diagd.export.families.cosmos import CosmosDvConfig
from diagd.export.options import GraphOptions
from diagd.play.controls import Inputs, default_controls
from diagd.runtime.decoders.jacobi import LookupDraft, WindowPolicy
from diagd.runtime.options import parse_decoder
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.stream import Stream
from diagd.schedule import Schedule, StreamLayout
from diagd.schedule.layout import RowSeed
from diagd.web.folder import write_page
from tests.models import small_family
from tests.oracles.models import small_model
from tests.play.browser import Tab
from tests.runtime.decoders.test_lookup import spread
from tests.web.conftest import Serve

FRAMES = 48
DECODE = """(async () => {{
  const {{ World }} = await import("./world.js");
  const world = await (globalThis.world ??= World.open(location.href));
  const {{ spec, session }} = world, prompt = spec.prompts[0], ids = {ids}, frames = [];
  session.start(prompt, prompt.map(() => spec.rest));
  const [given, newer] = [ids, {newer}].map((led) => (frame) => led[frame - prompt.length] ?? null);
  await session.follow(given, {settings}, async (frame) => newer(frame));
  const strategy = world.strategy("{decoder}");
  while (frames.length < ids.length) {{
    await strategy(session);
    frames.push([...session.frames[session.known - 1].tokens]);
  }}
  const {{ base, live, positions }} = session.ring;
  return {{ frames, base, slots: live, positions: [...positions.subarray(0, live)] }};
}})()"""
GIVEN_UP = """(async () => {{
  const {{ World }} = await import("./world.js");
  const world = await (globalThis.world ??= World.open(location.href));
  const {{ spec, session }} = world, prompt = spec.prompts[0], seen = [];
  session.start(prompt, prompt.map(() => spec.rest));
  for (const [decoder, frames, back] of {moves}) {{
    await session.follow(() => spec.rest, {settings});
    const strategy = world.strategy(decoder), end = session.known + frames;
    while (session.known < end) await strategy(session);
    const {{ positions, base }} = session.ring, slots = [...positions.entries()];
    const held = slots.filter(([slot, position]) => position < session.fed - base);
    seen.push([[...session.frames[session.known - 1].tokens], held, [...session.engine.logits(0)]]);
    session.rewind(session.known - back);
  }}
  return seen;
}})()"""
FAILED = """(async () => {{
  const {{ World }} = await import("./world.js");
  const world = await (globalThis.world ??= World.open(location.href));
  const {{ spec, session }} = world, {{ engine }} = session, prompt = spec.prompts[0];
  const strategy = world.strategy("k=1 serial");
  session.start(prompt, prompt.map(() => spec.rest));
  const follow = () => session.follow(() => spec.rest, {settings}), {{ step }} = engine;
  await follow();
  while (session.known < {frames}) await strategy(session);
  session.go(session.frames.slice(), session.prompt);
  const seen = [];
  for (let left of [0, 1, 9]) {{
    engine.step = (pass) => (left-- ? step.call(engine, pass) : Promise.reject(new Error("no memory")));
    await follow().catch(() => {{}});
    engine.step = step;
    seen.push(session.known);
  }}
  await follow();
  while (session.known < {frames} + 4) await strategy(session);
  return [seen, session.frames.slice(prompt.length, session.known).map((frame) => [...frame.tokens])];
}})()"""
PICTURES = """(async () => {{
  const {{ Game }} = await import("./game.js"), game = new Game(await globalThis.world), shown = [];
  game.window = [];
  for (const tokens of {frames}) {{
    shown.push(...(await game.show(tokens)).map(({{ data }}) => [...data.filter((_, n) => n % 4 < 3)]));
  }}
  return shown;
}})()"""
INPUTS = """(async () => {{
  const {{ Inputs }} = await import("./inputs.js"), inputs = new Inputs({controls}, {codec});
  inputs.expire = () => {{}}; // however long this takes
  return {moves}.map(([keys, dy, dx, axes, then], t) => {{
    inputs.update({{ keys, dx, dy, axes, t }});
    if (t % 4 === 3) inputs.pause();
    const {{ ids, echo }} = inputs.take();
    inputs.update({{ keys: then, dx: 0, dy: 0, axes, t: t + 0.5 }});
    return [ids, inputs.newer()?.ids ?? null, echo];
  }});
}})()"""
DRAW = """(async () => {{
  const {{ draw, words, exponential }} = await import("./sampler.js"), lowest = -Infinity;
  const all = Array.from({{ length: 40 }}, (_, id) => id);
  const noise = (seed, at) => all.map((id) => exponential(words(seed, at, id >> 2)[id & 3]));
  const floats = (row) => Float32Array.from(row.map((logit) => logit ?? lowest));
  let refused;
  try {{
    draw(Float32Array.of(0, NaN, 1), [0, 3], 0, {{ temperature: 1, topK: 0, topP: 0.5, seed: 0 }});
  }} catch (error) {{
    refused = error.message;
  }}
  return {{
    refused,
    noise: {places}.map(([seed, at]) => noise(seed, at)),
    ids: {cases}.map(([row, range, at, rules]) => draw(floats(row), range, at, rules)),
  }};
}})()"""
PASSES = """(async () => {{
  const {{ Layout, Schedule }} = await import("./schedule.js");
  const order = (layout, name, base) => Schedule.parse(name, new Layout(layout), base);
  return {cases}.map(([layout, name, base, ...given]) => order(layout, name, base).passes(...given));
}})()"""
WINDOWS = """(async () => {{
  const {{ WindowPolicy }} = await import("./jacobi.js");
  return {cases}.map((passes) => {{
    const policy = new WindowPolicy();
    return passes.map(([most, unfed, guesses, ends, ...seen]) => {{
      const chosen = policy.choose(most, unfed, guesses);
      policy.add(guesses.slice(0, chosen), ...seen);
      if (ends) policy.end();
      return chosen;
    }});
  }});
}})()"""


LOOKUPS = """(async () => {{
  const {{ LookupDraft }} = await import("./jacobi.js"), lookup = new LookupDraft({{ rows: 3, columns: 4 }});
  return {frames}.map(([before, led, came]) => {{
    const found = lookup.find(before, led);
    lookup.learn(found, came);
    return [found.tokens, found.kinds];
  }});
}})()"""


def visit(tab: Tab, url: str) -> None:
    """Be at a page's address, where nothing runs by itself."""
    tab.open(f"{url}style.css")
    tab.until("document.body.textContent.includes('--ground')")


@pytest.fixture(scope="module")
def scripts(tab: Tab, page: Path, serve: Serve) -> Iterator[Tab]:
    with serve(page) as url:
        visit(tab, url)
        yield tab


@pytest.fixture(scope="module")
def session(world: Path) -> Iterator[Session]:
    with diagd.load(world) as session:
        yield session


def compare(
    tab: Tab, page: Path, session: Session, decoder: str, temperature: float, *, renewed: bool = False
) -> dict[str, Any]:
    """Decode in the page and here; what the page says of its slots.

    ``renewed``: two frames in three get another action while they are decoded.
    """
    manifest, told = session.manifest, json.loads((page / "world.json").read_text())
    prompt = np.array(told["prompts"][0], np.int32).reshape(-1, manifest.layout.rows, manifest.layout.columns)
    rest, random = told["rest"], np.random.default_rng(3)
    first = rest[0] if rest else 0
    ids = random.integers(first, first + 5, (FRAMES, len(rest or ()))).astype(np.int32)
    session.start(prompt, np.tile(rest, (len(prompt), 1)) if rest else None)
    settings = {"temperature": temperature, "top_k": 0, "top_p": 0.9, "seed": 11}
    sampling, actions = SamplingSettings(temperature, 0, 0.9), ids if rest else None
    newer = [np.roll(ids, 1)[n] if renewed and n % 3 else None for n in range(FRAMES)]
    run: dict[str, Any] = {
        "sampling": sampling,
        "seed": 11,
        "newer": lambda frame: newer[frame - len(prompt)],
    }
    made = session.frames(parse_decoder(decoder, manifest), actions, count=FRAMES, **run)
    expected = [frame.tokens.reshape(-1).tolist() for frame in made]
    others = json.dumps([None if led is None else led.tolist() for led in newer])
    given = {"ids": ids.tolist(), "settings": json.dumps(settings), "newer": others, "decoder": decoder}
    found: dict[str, Any] = tab.evaluate(DECODE.format(**given))
    assert found["frames"] == expected
    assert len({tuple(frame) for frame in expected}) > FRAMES // 2  # of a world that moves
    assert found["slots"] <= told["capacity"]
    assert found["positions"] == session._slots.slot_position[: session._slots.live].tolist()
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "decoder", ["k=1 serial", "k=1 chained", "k=2 d=9 seeds=above", "next token", "jacobi", "jacobi window=5"]
)
def test_tokens_are_pythons(
    scripts: Tab, page: Path, session: Session, decoder: str, temperature: float
) -> None:
    found = compare(scripts, page, session, decoder, temperature)
    assert found["base"] > 0  # keys were turned back


def test_an_action_that_comes_between_passes_counts(scripts: Tab, page: Path, session: Session) -> None:
    compare(scripts, page, session, "jacobi window=3", 1.0, renewed=True)


@pytest.mark.parametrize("decoder", ["k=1 chained", "k=2 d=9"])
def test_a_flight_that_is_given_up_leaves_the_slots_that_python_leaves(
    scripts: Tab, page: Path, session: Session, decoder: str
) -> None:
    """A frame is complete while later ones are under way, whose slots are taken already."""
    compare_moves(scripts, page, session, [(decoder, frames, 3) for frames in (9, 6, 20)])


def test_a_flight_is_built_again_as_it_was_where_its_middle_was_before(
    scripts: Tab, page: Path, session: Session
) -> None:
    reach, window = session.manifest.cache.layers * (session.window - 1), session.window
    serial = [
        ("k=1 serial", reach + 5 - window, 2),
        ("k=1 serial", 1, reach + 3 - window),
        ("k=1 serial", 3, 0),
    ]
    compare_moves(scripts, page, session, [("k=1 chained", window - 1, 0), *serial])


def test_frames_stay_where_a_pass_fails_that_builds_their_rows_again(
    scripts: Tab, page: Path, session: Session
) -> None:
    told, manifest = json.loads((page / "world.json").read_text()), session.manifest
    prompt = np.array(told["prompts"][0], np.int32).reshape(-1, manifest.layout.rows, manifest.layout.columns)
    rest, known = np.array(told["rest"], np.int32), len(prompt) + 20
    session.start(prompt, np.tile(rest, (len(prompt), 1)))
    made = session.frames(parse_decoder("k=1 serial", manifest), lambda _: rest, count=24, seed=11)
    expected = [frame.tokens.reshape(-1).tolist() for frame in made]
    rules = manifest.sampling
    settings = {"temperature": rules.temperature, "top_k": rules.top_k, "top_p": rules.top_p, "seed": 11}
    found = scripts.evaluate(FAILED.format(frames=known, settings=json.dumps(settings)))
    assert found == [[known] * 3, expected]


def compare_moves(tab: Tab, page: Path, session: Session, moves: list[tuple[str, int, int]]) -> None:
    """Frames by an order, then as many back, here and in the page."""
    told, manifest = json.loads((page / "world.json").read_text()), session.manifest
    prompt = np.array(told["prompts"][0], np.int32).reshape(-1, manifest.layout.rows, manifest.layout.columns)
    rest, expected, logits = np.array(told["rest"], np.int32), [], []
    session.start(prompt, np.tile(rest, (len(prompt), 1)))
    for decoder, frames, back in moves:
        made = session.frames(parse_decoder(decoder, manifest), lambda _: rest, seed=11)
        tokens = [next(made).tokens for _ in range(frames)][-1]
        slots, stream = session._slots, session.stream
        held = np.flatnonzero(slots.slot_position < stream.fed - slots.base)
        rows = np.stack([held, slots.slot_position[held]], 1).tolist()
        expected.append([tokens.reshape(-1).tolist(), rows])
        logits.append(session.engine.logits()[0].copy())
        session.stream.rewind(back)
    rules = manifest.sampling
    settings = {"temperature": rules.temperature, "top_k": rules.top_k, "top_p": rules.top_p, "seed": 11}
    given = {"moves": json.dumps(moves), "settings": json.dumps(settings)}
    found = tab.evaluate(GIVEN_UP.format(**given))
    assert [seen[:2] for seen in found] == expected
    np.testing.assert_allclose([seen[2] for seen in found], logits, atol=2e-3)


def test_noise_and_draws_are_pythons_to_the_bit(scripts: Tab) -> None:
    random = np.random.default_rng(0)
    places = [[seed, at] for seed in (0, 5, 2**52 + 12345) for at in (0, 77, 2**31 + 5, 2**33 + 9)]
    cases, expected = [], []
    for _ in range(300):
        ids = int(random.choice([40, 600]))
        row = (random.normal(size=ids) * random.choice([0.3, 2, 6])).astype(np.float32)
        if random.random() < 0.3:
            row = np.round(row)
        row[random.random(ids) < 0.1] = -np.inf
        low, high = int(random.integers(0, 5)), ids - int(random.integers(0, 9))
        row[low] = 0
        rules: dict[str, Any] = {
            "temperature": float(random.choice([0, 0.3, 1, 1.7])),
            "topK": int(random.choice([0, 0, 1, 5, 30])),
            "topP": float(random.choice([1, 0.95, 0.5, 0.01])),
            "seed": int(random.integers(0, 2**53)),
            "keepCrossing": bool(random.random() < 0.5),
        }
        at = int(random.integers(0, 2**34))
        state = SamplingState(rules["temperature"], rules["topK"], rules["topP"], rules["seed"])
        bounds = {"low": np.array([low], np.int32), "high": np.array([high], np.int32)}
        drawn = sample(row[None], np.array([at]), state, **bounds, keep_crossing=rules["keepCrossing"])
        expected.append(int(drawn[0]))
        finite = [None if np.isinf(logit) else float(logit) for logit in row]
        cases.append([finite, [low, high], at, rules])
    found = scripts.evaluate(DRAW.format(places=json.dumps(places), cases=json.dumps(cases)))
    assert found["ids"] == expected
    assert "the largest logit is NaN" in found["refused"]
    assert found["noise"] == [noise_rows(seed, np.array([at]), 40)[0].tolist() for seed, at in places]


def test_tables_are_pythons(scripts: Tab) -> None:
    random, cases, expected = np.random.default_rng(1), [], []
    for _ in range(120):
        rows, columns, prefix, before, after = (int(random.integers(*span)) for span in
                                                ((1, 6), (1, 7), (0, 3), (0, 3), (0, 2)))  # fmt: skip
        layout, k = StreamLayout(rows, columns, prefix, before, after), int(random.integers(1, columns + 1))
        lag = int(random.integers(k * rows, columns + (rows - 1) * k + 1))
        refeed, seed = (
            bool(random.random() < 0.5),
            RowSeed(str(random.choice([one.value for one in RowSeed]))),
        )
        order = Schedule(layout, k, lag, seed, refeed, not refeed and bool(random.random() < 0.5))
        frames, first, width = (
            int(random.integers(1, 6)),
            int(random.integers(1, 4)),
            int(random.choice([3, 5, 256])),
        )
        fed, steps = int(random.integers(0, layout.first_cell(first))), order.total_steps(frames)
        table = order.table(first, frames, fed, width)
        expected.append([
            [list(map(int, row)) for row in zip(step.sources, step.positions, step.sinks, strict=True)]
            for step in map(table.step, range(table.steps))
        ])  # fmt: skip
        base = {
            "k": 1,
            "d": columns + rows - 1,
            "seeds": "previous_frame",
            "refeed": True,
            "keepSeeds": False,
        }
        shape: dict[str, Any] = {
            "rows": rows,
            "columns": columns,
            "prefix": prefix,
            "before": before,
            "after": after,
        }
        cases.append([shape, order.name, base, first, frames, 0, steps, width, fed])
    assert scripts.evaluate(PASSES.format(cases=json.dumps(cases))) == expected


def test_windows_are_pythons(scripts: Tab) -> None:
    """Guesses are right as often as not or nearly always, rows of a pass cost little or much."""
    random, cases, expected = np.random.default_rng(2), [], []
    for cells, right, row in ((108, 0.97, 0.01), (108, 0.9, 0.1), (40, 0.6, 1.0), (9, 0.8, 0.03)):
        policy, passes, chosen, left = WindowPolicy(cells), [], [], cells
        for _ in range(900):
            if left == cells:
                kinds = random.integers(0, 2, cells)
            unfed, guesses = 3 if left == cells else 0, kinds[-left:]
            rows = policy.choose(np.arange(unfed + 1, unfed + left + 1, dtype=np.int32), guesses)
            certain = right ** (guesses[: rows - 1] + 1)
            wrong = np.flatnonzero(random.random(rows - 1) > certain)
            kept, fed = int(wrong[0]) + 1 if wrong.size else rows, unfed + rows
            seconds = (1 + row * fed) * random.exponential(0.3) + 1
            policy.add(guesses[:rows], kept, fed, seconds)
            passes.append([left, unfed, guesses.tolist(), left == kept, kept, fed, seconds])
            chosen.append(rows)
            if left == kept:
                policy.end()
            left = left - kept or cells
        assert len(set(chosen)) > 5  # it is asked something
        cases.append(passes)
        expected.append(chosen)
    assert scripts.evaluate(WINDOWS.format(cases=json.dumps(cases))) == expected


def test_guesses_are_pythons(scripts: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    spread(monkeypatch)  # as none share a place there
    random, layout, draft = np.random.default_rng(4), StreamLayout(3, 4, before=2), LookupDraft()
    stream = Stream(layout, 3, np.arange(30, dtype=np.int32), 8)
    stream.start(random.integers(0, 2, (1, 3, 4)), np.zeros((1, 2), np.int32))
    stream.follow(random.integers(0, 2, (150, 2)).astype(np.int32))
    given, expected = [], []
    while stream.begin():
        before, led = stream.frame(stream.known - 1).reshape(-1), stream.led(stream.known)
        assert led is not None
        found = draft.find(stream)
        came = np.where(random.random(12) < 0.9, before, random.integers(0, 2, 12)).astype(np.int32)
        draft.learn(found, came)
        given.append([before.tolist(), led.tolist(), came.tolist()])
        expected.append([found.tokens.tolist(), found.kinds.tolist()])
        stream.write(layout.first_cell(stream.known), came)
        stream.complete(None)
    assert scripts.evaluate(LOOKUPS.format(frames=json.dumps(given))) == expected


@pytest.mark.parametrize("model", ["crafter-3m", "mineworld-300m", "wham-200m"])
def test_actions_are_pythons(scripts: Tab, model: str) -> None:
    """Keys, sticks and mouse of each kind of model, with what the bins of one frame leave to the next.

    And whether a key counts for the frame that began last, what a pause leaves, and which key is timed.
    """
    codec, random = find(model).actions, np.random.default_rng(5)
    controls, moves, expected = default_controls(codec), [], []
    inputs, codes = Inputs(controls, codec, lambda: 0.0), sorted(default_controls(codec).keys)
    for number in range(40):
        keys = random.permutation(codes)[: random.integers(0, 5)].tolist()
        turn = random.normal(0, 30, 2).round(1).tolist() if controls.mouse and keys else [0.0, 0.0]
        axes, then = random.uniform(-1, 1, 4).round(2).tolist(), keys[1:] if keys else codes[:1]
        moves.append([keys, *turn, axes, then])
        inputs.update(keys, (turn[0], turn[1]), axes, number)
        if number % 4 == 3:
            inputs.pause()
        taken = inputs.take()
        assert taken.ids is not None
        inputs.update(then, (0.0, 0.0), axes, number + 0.5)
        newer = inputs.newer()
        expected.append([taken.ids.tolist(), newer and newer.ids.tolist(), taken.echo])  # type: ignore[union-attr]
    assert codec is not None
    given = {"controls": controls.model_dump_json(), "codec": codec.model_dump_json()}
    assert scripts.evaluate(INPUTS.format(moves=json.dumps(moves), **given)) == expected
    assert len({tuple(ids) for ids, *_ in expected}) > 5
    assert 5 < sum(newer is None for _, newer, _ in expected) < 39


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learned positions, a prefix, no actions, and a tokenizer that compresses time."""
    sizes = CosmosDvConfig(
        height=16, width=32, stem_channels=4, channels=(4, 8), res_blocks=1, latent_channels=4
    )
    model = small_model(StreamLayout(2, 4, prefix=1), layers=1, context_frames=4, rotary=False)
    family = replace(small_family(model), tokenizer=sizes)
    path = tmp_path_factory.mktemp("learned") / "learned.diagd"
    return export(family, GraphOptions(), random_sources(family, 0), path).path


@pytest.mark.slow
def test_a_context_that_is_fed_again_gives_pythons_tokens_and_pictures(
    tab: Tab, learned: Path, runtime: dict[str, bytes], serve: Serve, tmp_path: Path
) -> None:
    page = write_page(Bundle.open(learned), tmp_path / "page", lambda: runtime).path
    with diagd.load(learned) as session, serve(page) as url:
        visit(tab, url)
        for decoder in ("k=1 serial", "jacobi"):
            found = compare(tab, page, session, decoder, 1.0)
            assert found["base"] > 0  # slid
        codec = PixelCodec(Bundle.open(learned), CpuOptions())
        tokens = [np.array(frame, np.int32).reshape(2, 4) for frame in found["frames"][:4]]
        expected = np.concatenate(list(codec.stream(tokens))).astype(int)
        shown = np.array(tab.evaluate(PICTURES.format(frames=found["frames"][:4]))).reshape(expected.shape)
        assert np.abs(shown - expected).max() <= 1  # kernels round differently
