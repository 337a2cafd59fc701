"""Preference tuning of small bundles, from rollouts to the gate."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import Bundle
from diagd.bundle.manifest import IdRange, SamplingRules
from diagd.cluster.workers import ClusterOptions
from diagd.errors import QualityError, UsageError
from diagd.export.checkpoints import RandomCheckpoint
from diagd.export.exporter import Sources, export
from diagd.export.options import GraphOptions
from diagd.progress import Progress
from diagd.runtime.load import open_session
from diagd.runtime.options import parse_decoder
from diagd.schedule import Schedule, StreamLayout
from diagd.tuning.align import align
from diagd.tuning.options import AlignOptions, PreferOptions, PreferTraining
from diagd.tuning.prefer import Material, NotBetterError, PreferReport, prefer, split
from diagd.tuning.rollouts import open_lanes, open_roller, parts, roll_out, with_cells
from diagd.tuning.source import read_model, write_model
from tests.export.test_families_cosmos import TEXT
from tests.models import export_small
from tests.oracles.models import small_model
from tests.tuning.test_weights import of_every_family
from tests.tuning.walks import LAYOUT, colours, greys

OPTIONS = PreferOptions(contexts=12, rollouts=3, prompt=2, frames=2, judged=24, probe_steps=60)
SAMPLING = OPTIONS.sampling
SHARES = ((0.4, Schedule.next_token(LAYOUT)), (0.6, Schedule.chained(LAYOUT, 1)))
TRAINING = PreferTraining(SHARES, steps=2, batch=2, autocast=False)
MATERIAL = Material(colours(60, 4), colours(24, 4, seed=1))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = small_model(LAYOUT, context_frames=4, rotary=False)
    return Bundle.open(export_small(model, tmp_path_factory.mktemp("prefer") / "small.diagd"))


@pytest.fixture(scope="module")
def dull(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model of half the shades of grey, which learns the others; there are no actions to read."""
    model, path = read_model(bundle), tmp_path_factory.mktemp("dull") / "dull.diagd"
    align(model, greys(32, 4, shades=3), AlignOptions(SHARES, steps=25, batch=8, rate=1e-2, autocast=False))
    return Bundle.open(write_model(bundle, model, path, bundle.manifest))


GREYS = Material(greys(60, 4), greys(24, 4, seed=1))
LONGER = replace(TRAINING, steps=60, batch=4, rate=3e-3)


def test_what_passes_the_gate_is_written(bundle: Bundle, dull: Bundle, tmp_path: Path) -> None:
    output, options = tmp_path / "made.diagd", replace(OPTIONS, contexts=16, rollouts=4)
    report = prefer(dull, GREYS, options, LONGER, "jacobi", output, Progress())
    assert set(report.verdicts) == {"preferences", "winners", "plain"}
    assert report.probe is None
    assert report.chosen is not None
    change = report.verdicts[report.chosen].changes["score"]
    assert 0 < change.low < change.high
    assert not report.verdicts[report.chosen].breaches
    made = Bundle.open(output)
    assert made.manifest.files["weights.bin"] != dull.manifest.files["weights.bin"]
    assert made.manifest.order == bundle.manifest.order
    assert "60 steps" in (made.manifest.provenance.tuned or "")
    best, mean, worst = report.scores
    assert best > mean > worst


@pytest.mark.slow
def test_reports_rollouts_and_bundles_are_those_of_any_number_of_workers(
    dull: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether one of them is killed or not."""

    def made(workers: int) -> tuple[PreferReport, dict[str, bytes]]:
        options = replace(OPTIONS, contexts=40, rollouts=4, who=ClusterOptions(workers))
        own = tmp_path / f"{workers}"
        place, kept = own / "made.diagd", own / "cache"
        monkeypatch.setenv("DIAGD_CACHE", str(kept))
        report = prefer(dull, GREYS, options, LONGER, "jacobi", place, Progress())
        files = [
            file for folder in (place, kept / "rollouts") for file in folder.rglob("*") if file.is_file()
        ]
        return report, {str(file.relative_to(own)): file.read_bytes() for file in files}

    alone = made(1)
    assert alone[0].chosen is not None
    assert sum("rollouts" in name for name in alone[1]) == 17
    killer = threading.Thread(target=kill_a_worker, daemon=True)
    killer.start()
    assert made(3) == alone
    assert not killer.is_alive()
    assert made(2) == alone


def kill_a_worker() -> None:
    """As soon as there is one."""
    while not (workers := multiprocessing.active_children()):
        time.sleep(0.01)
    assert workers[0].pid is not None
    os.kill(workers[0].pid, signal.SIGKILL)


def test_what_is_not_better_is_not_written(bundle: Bundle, tmp_path: Path) -> None:
    """What is judged is drawn as asked, here the most probable ids; what is compared, from the whole law."""
    training, greedy = replace(TRAINING, rate=0.0), replace(OPTIONS, sampling=replace(SAMPLING, top_p=1e-6))
    with pytest.raises(NotBetterError, match="no tuned model is better") as found:
        prefer(bundle, MATERIAL, greedy, training, None, tmp_path / "made.diagd", Progress())
    report = found.value.report
    assert report.pairs == OPTIONS.contexts
    assert report.verdicts["plain"].changes["distinct"].before == 0
    assert found.value.exit_code == 1
    assert report.chosen is None
    assert report.probe is not None
    assert report.probe.right > 0.9 > report.probe.commonest
    assert report.choice.truth > report.choice.gained.before
    for verdict in report.verdicts.values():
        assert verdict.breaches == ["followed is not up"]
        assert all(change.before == change.after for change in verdict.changes.values())
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_goes_on(bundle: Bundle, tmp_path: Path) -> None:
    class Stop(Progress):
        def count(self, title: str, total: int):  # type: ignore[no-untyped-def]
            if title == "training on plain":
                raise KeyboardInterrupt
            return super().count(title, total)

    training = replace(TRAINING, steps=3, resume=tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        prefer(bundle, MATERIAL, OPTIONS, training, None, tmp_path / "made.diagd", Stop())
    assert {path.name for path in tmp_path.iterdir()} == {"kept.preferences", "kept.winners"}
    reports = []
    for place in (training, replace(training, resume=None)):
        with pytest.raises(NotBetterError) as found:
            prefer(bundle, MATERIAL, OPTIONS, place, None, tmp_path / "made.diagd", Progress())
        reports.append(found.value.report)
    assert reports[0] == reports[1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("decoder", ["next token", "jacobi", "k=2 d=8"])
def test_rollouts_keep_prompt_and_actions_and_follow_their_seeds(bundle: Bundle, decoder: str) -> None:
    streams, strategy = colours(3, 4, seed=3), parse_decoder(decoder, bundle.manifest)
    with open_lanes(bundle) as group:
        made = roll_out(group, streams, 2, strategy, SAMPLING, [5, 6, 5])
        again = roll_out(group, streams[1:], 2, strategy, SAMPLING, [6, 5])
    np.testing.assert_array_equal(made[1:], again)
    roller = open_roller(bundle.path, "fp32", decoder, 2, SAMPLING, None)
    np.testing.assert_array_equal(made[:2], roller((streams[:2], (5, 6))))
    (cells, led), (old, actions) = parts(made, LAYOUT), parts(streams, LAYOUT)
    np.testing.assert_array_equal(led, actions)
    np.testing.assert_array_equal(cells[:, :2], old[:, :2])
    assert (cells[:, 2:] != old[:, 2:]).any()
    with open_session(bundle) as session:
        session.start(old[1, :2], actions[1, :2])
        alone = [f.tokens for f in session.frames(strategy, actions[1, 2:], sampling=SAMPLING, seed=6)]
    np.testing.assert_array_equal(np.stack(alone), cells[1, 2:])


def test_actions_that_cannot_be_read_are_said_to_be_so(bundle: Bundle, tmp_path: Path) -> None:
    """Frames of other windows under these actions."""
    frames = parts(colours(84, 4, seed=2), LAYOUT)[0]
    windows = with_cells(np.concatenate([MATERIAL.train, MATERIAL.held]), LAYOUT, frames)
    material = Material(windows[:60], windows[60:])
    with pytest.raises(QualityError, match=r"a probe reads .* of the actions of true frames"):
        prefer(bundle, material, OPTIONS, TRAINING, None, tmp_path / "made.diagd", Progress())


def test_windows_are_held_out_that_share_no_frame() -> None:
    windows = np.arange(20)[:, None]
    train, held = split(windows)
    assert (train[-1], held[0]) == (13, 16)
    with pytest.raises(UsageError, match="too few"):
        split(windows[:3])


def test_frames_beyond_the_context_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    options = replace(OPTIONS, frames=3)
    with pytest.raises(UsageError, match="the model sees 4 frames"):
        prefer(bundle, MATERIAL, options, TRAINING, None, tmp_path / "made.diagd", Progress())


def acted(layout: StreamLayout, count: int, frames: int, seed: int = 0) -> np.ndarray:
    """Windows int64 [count, N] of any layout: each frame has shades of the action that led to it."""
    random = np.random.default_rng(seed)
    actions = random.integers(0, 3, (count, frames + 1, 1))
    cells = random.integers(0, 8, (count, frames, layout.cells)) + 8 * actions[:, :-1] * (layout.gap > 0)
    before, after = (
        np.repeat(led, times, axis=2)
        for led, times in ((actions[:, :-1], layout.before), (actions[:, 1:], layout.after))
    )
    rows = np.concatenate([before, cells, after], axis=2).reshape(count, -1)
    prefix = np.tile(np.array(layout.prefix_tokens, np.int64), (count, 1))
    return np.concatenate([prefix, rows], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        ("world", "next token"),
        ("wham", "k=1 chained"),
        ("wham with biases", "jacobi"),
        ("cosmos", "k=2 d=7"),
        ("cosmos with text", "jacobi"),
    ],
)
def test_every_family_is_rolled_out_trained_and_judged(name: str, decoder: str, tmp_path: Path) -> None:
    rules = SamplingRules(ranges=(IdRange(low=0, high=24),))
    family = replace(of_every_family(name), sampling=rules, actions=None)
    source, layout = Sources(RandomCheckpoint(family.expected, seed=0)), family.transformer.layout
    bundle = Bundle.open(export(family, GraphOptions(), source, tmp_path / "small.diagd").path)
    text = np.random.default_rng(1).normal(size=(4, TEXT.width)).astype(np.float32)
    material = Material(
        acted(layout, 60, 4), acted(layout, 24, 4, seed=1), text if family.transformer.text else None
    )
    shares = ((0.4, Schedule.next_token(layout)), (0.6, Schedule.chained(layout, 1)))
    training, output = replace(TRAINING, shares=shares, rate=0.0), tmp_path / "made.diagd"
    with pytest.raises(NotBetterError) as found:
        prefer(bundle, material, OPTIONS, training, decoder, output, Progress())
    report = found.value.report
    assert (report.probe is None) == (layout.gap == 0)
    assert report.pairs > OPTIONS.contexts // 2
    aim = "followed" if layout.gap else "score"
    assert [verdict.breaches for verdict in report.verdicts.values()] == 3 * [[f"{aim} is not up"]]
