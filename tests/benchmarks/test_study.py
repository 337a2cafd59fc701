"""The whole study, as small as it can be, on a world like the shipped one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.quality.study import PARTS, Study, StudyOptions, diagonal_schedules, save_plot
from diagd.cluster import ClusterOptions
from diagd.errors import UsageError
from diagd.export.families.world import SHIPPED, load_description, load_tokenizer
from diagd.export.transformer import Transformer
from diagd.schedule import StreamLayout
from tests.benchmarks.test_quality_page import REPORT
from worlds.collect import collect
from worlds.folder import World, save_world
from worlds.options import CollectOptions, EvalOptions

pytestmark = pytest.mark.slow
NAMES = ["k=1 serial", "k=1 chained", "k=2 serial", "k=2 chained", "k=4 serial", "k=4 chained"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames and tokens of Crafter, and three layers that nobody trained."""
    folder, shipped = tmp_path_factory.mktemp("model"), SHIPPED / "crafter-3m"
    description, (_, tokenizer) = replace(load_description(shipped), size="0.3m"), load_tokenizer(shipped)
    network = Transformer(description.transformer_config()).initialise(torch.Generator().manual_seed(0))
    save_world(folder, World(description, network, tokenizer), {})
    return folder


@pytest.fixture(scope="module")
def options(model: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyOptions:
    folder = tmp_path_factory.mktemp("study")
    one = ClusterOptions(workers=1)
    list(collect(CollectOptions(folder / "data", episodes=2, steps=12, seed=3_000_000, who=one)))
    return StudyOptions(
        model=model,
        data=folder / "data",
        geometry=folder / "data",
        output=folder / "docs",
        sizes={"again": model},
        training={"on a mixture": model},
        evaluation=EvalOptions(windows=2, window_frames=3, rollouts=2, prompt=1, frames=1),
        size_rollouts=2,
        compat_windows=2,
        speed_rounds=1,
        speed_frames=1,
        long_frames=10,
        long_rollouts=2,
    )


def test_every_part_is_measured_and_kept(options: StudyOptions) -> None:
    options = replace(options, parts=tuple(part for part in PARTS if part != "decoders"))
    page = Study(options).run()
    first = json.loads((options.output / "quality.json").read_text())
    assert [row["name"] for row in first["compat"]["again"]] == NAMES
    assert first["compat"]["3m"] == first["compat"]["again"]
    assert first["shipped"]["schedules"] == first["sizes"]["again"]["schedules"]
    assert first["shipped"]["gaps"] == first["sizes"]["again"]["gaps"]
    (trained,) = first["training"][options.model.name]
    assert list(trained["gaps"]) == [*NAMES, "k=1 chained no-refeed"]
    assert [score["name"] for score in trained["schedules"]] == ["next token", "k=1 chained"]
    assert set(first["frames_per_second"]) == {"3m", "again"}
    assert set(first["frames_per_second"]["3m"]) == {"next token", *NAMES}
    for name in ("quality-contact.png", "quality-speed.png"):
        assert (options.output / name).read_bytes().startswith(b"\x89PNG")
    worlds = {"another": (options.model, options.data)}
    again = replace(options, parts=("training", "compat"), sizes={}, worlds=worlds)
    Study(replace(again, training={"renamed": options.model})).run()
    second = json.loads((options.output / "quality.json").read_text())
    assert [row["name"] for row in second["training"][options.model.name]] == ["renamed"]
    assert second["shipped"] == first["shipped"]
    assert second["compat"] == {**first["compat"], "another": first["compat"]["3m"]}
    assert "| renamed |" in page.read_text()
    other = replace(options, parts=("training",), evaluation=EvalOptions(windows=4))
    with pytest.raises(UsageError, match="measured with other options"):
        Study(other).run()


def test_decoders_of_several_worlds_are_compared(options: StudyOptions) -> None:
    few = replace(
        options,
        parts=("decoders", "worlds"),
        output=options.output.with_name("decoders"),
        decoder_rollouts=2,
        world_rollouts=2,
        world_windows=2,
        decoders=("next token", "k=1 chained", "jacobi"),
        precisions=(),  # what calibrates them is tested where it is
        worlds={"another": (options.model, options.data)},
        evaluation=replace(options.evaluation, frames=3),
    )
    page = Study(few).run().read_text()
    kept = json.loads((few.output / "quality.json").read_text())
    (other,) = kept["worlds"].values()
    assert [row["name"] for row in other["gaps"]] == NAMES
    assert all(0 <= score["recovered"]["mean"] <= 1 for score in other["schedules"])
    assert len(other["drift"]["recovered"]) == len(other["drift"]["dynamics"]) == 10
    assert "## another: drift of long rollouts" in page
    found = kept["decoders"]
    assert list(found) == [options.model.name, "another"]
    for world, figures in found.items():
        assert f"## Decoders of {world}" in page
        assert f"(quality-decoders-{world}.png)" in page
        assert (few.output / f"quality-decoders-{world}.png").read_bytes().startswith(b"\x89PNG")
        ntp, chained, jacobi = figures["points"]
        assert (ntp["passes"], chained["passes"]) == (108, 9)
        assert jacobi["judgement"]["ntp_match"]["mean"] == ntp["judgement"]["ntp_match"]["mean"] == 1
        assert list(figures["passes"]) == ["0", "0.7", "1", "1.5"]
        assert all(1 <= passes["mean"] <= 108 for passes in figures["passes"].values())
        assert {name: seen["ntp_match"]["mean"] for name, seen in figures["precisions"].items()} == {
            "fp32": 1
        }
    assert "| precision | NLL under NTP | as NTP | match, last frame |" in page


def test_a_report_of_preferences_is_read(options: StudyOptions) -> None:
    report = options.output.with_name("prefer.json")
    report.write_text(json.dumps(asdict(REPORT)))
    alone = replace(options, parts=("preferences",), output=options.output.with_name("preferences"))
    page = Study(replace(alone, preferences={"another": report})).run().read_text()
    assert "## Preferences between rollouts: another" in page
    kept = json.loads((alone.output / "quality.json").read_text())
    assert kept["preferences"]["another"] == json.loads(report.read_text())
    report.write_text("{}")
    with pytest.raises(UsageError, match="no report of diagd prefer"):
        Study(replace(alone, preferences={"another": report})).run()


def test_study_covers_serial_and_chained_frames() -> None:
    lags = [(s.k, s.d) for s in diagonal_schedules(StreamLayout(9, 12, before=1))]
    assert lags == [(1, 20), (1, 9), (2, 28), (2, 18), (4, 44), (4, 36)]


def test_plot_is_written(tmp_path: Path) -> None:
    from matplotlib import image

    save_plot(
        tmp_path / "plot.png", {"3m": [("a", 1.0, 0.5, 0.1), ("b", 10.0, 0.6, 0.1)]}, "frames/s", "nats"
    )
    picture = image.imread(tmp_path / "plot.png")
    assert picture.shape[0] > 300
    assert picture[..., :3].min() < 0.5
