"""Exports: little memory, nothing partial, the same graph for every source of weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.inliner import inline_local_functions

from diagd.bundle import Bundle
from diagd.errors import CheckpointError, UsageError
from diagd.export.checkpoints import RandomCheckpoint
from diagd.export.exporter import Exporter, Sources, export, open_sources
from diagd.export.families.mineworld import build
from diagd.export.options import GraphOptions
from diagd.progress import Progress
from diagd.schedule import StreamLayout
from tests.models import small_family
from tests.oracles.models import small_model

LAYOUT = StreamLayout(3, 4, after=2)

MEASURE = """
import resource, sys
from pathlib import Path
from diagd.export.checkpoints import RandomCheckpoint
from diagd.export.exporter import Sources, export
from diagd.export.options import GraphOptions
from diagd.export.families import identity_rules
from tests.models import small_family
from tests.oracles.models import small_model
from tests.export.test_exporter import LAYOUT
from dataclasses import replace

family = small_family(small_model(LAYOUT, layers=1))
for path, inner in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    config = replace(family.transformer, hidden=2048, feed_forward=inner)
    made = replace(family, transformer=config, rules=identity_rules(config))
    sources = Sources(RandomCheckpoint(made.expected, seed=0))
    result = export(made, GraphOptions(), sources, Path(path))
    print(result.size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """One process exports a small model, then a large one: its peak so far after each."""
    models = [str(tmp_path / "small.diagd"), "64", str(tmp_path / "large.diagd"), "20480"]
    unknown = {**os.environ, "DIAGD_CACHE": str(tmp_path / "cache")}  # the graphs are traced
    command = [sys.executable, "-c", MEASURE, *models]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=unknown)
    small, small_peak, large, large_peak = map(int, done.stdout.split()[-4:])
    shutil.rmtree(tmp_path / "large.diagd")
    assert large - small > 470 << 20
    assert large_peak - small_peak < 320 << 20  # two matrices of 160 MB are transposed, the third is read


def test_a_bundle_has_pictures_to_start_from_and_keeps_those_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "given" / "of the user").mkdir(parents=True)
    (tmp_path / "given" / "00.png").write_bytes(b"given")
    family = replace(small_family(small_model(LAYOUT, layers=1)), prompts=tmp_path / "given")
    sources = Sources(RandomCheckpoint(family.expected, seed=0))
    bundle = export(family, GraphOptions(), sources, tmp_path / "a.diagd").path
    picture = bundle / "prompts" / "00.png"
    assert picture.read_bytes() == b"given"
    picture.write_bytes(b"mine")
    Bundle.open(bundle)
    export(family, GraphOptions(), sources, bundle)
    assert picture.read_bytes() == b"mine"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    family = small_family(small_model(LAYOUT))
    sources = Sources(RandomCheckpoint(family.expected, seed=0))
    bundle = export(family, GraphOptions(), sources, tmp_path_factory.mktemp("graph") / "a.diagd").path
    onnx.checker.check_model(str(bundle / "step.onnx"))
    step = onnx.load(bundle / "step.onnx", load_external_data=False)
    return inline_local_functions(step)  # as a runtime reads it that knows nothing of ours


def test_every_operator_is_standard_and_lean(graph: onnx.ModelProto) -> None:
    assert {entry.domain: entry.version for entry in graph.opset_import} == {"": 23, "diagd": 1}
    assert {node.domain for node in graph.graph.node} == {""}
    operators = [node.op_type for node in graph.graph.node]
    assert operators.count("ScatterND") == 4
    assert operators.count("RotaryEmbedding") == 2
    assert not {"SequenceAt", "SplitToSequence", "Gemm", "If", "Loop"} & set(operators)


def test_a_cache_input_has_one_reader(graph: onnx.ModelProto) -> None:
    """Two readers of a buffer that is written in place would race; its shape is no reading of it."""
    for name in (entry.name for entry in graph.graph.input if entry.name.startswith("past_")):
        readers = [n.op_type for n in graph.graph.node if name in n.input and n.op_type != "Shape"]
        assert readers == ["ScatterND"]


def test_failures_leave_nothing_and_interruptions_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = small_family(small_model(LAYOUT))
    exporter = Exporter(family, GraphOptions())
    sources = Sources(RandomCheckpoint(family.expected, seed=0))

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("diagd.export.exporter.trace_step", fail)
    for error, left in (
        (KeyboardInterrupt(), {".a.diagd.weights.partial"}),
        (RuntimeError(), set()),
    ):
        with pytest.raises(type(error)):
            exporter.run(sources, tmp_path / "a.diagd", Progress())
        assert {entry.name for entry in tmp_path.iterdir()} == left


def test_a_full_disk_is_seen_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = small_family(small_model(LAYOUT))
    sources = Sources(RandomCheckpoint(family.expected, seed=0))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match=r"0\.00 GB are free"):
        Exporter(family, GraphOptions()).run(sources, tmp_path / "a.diagd", Progress())
    assert list(tmp_path.iterdir()) == []


def test_wrong_tensors_are_refused_together(tmp_path: Path) -> None:
    family = small_family(small_model(LAYOUT))
    shapes = dict(family.expected)
    shapes["norm.weight"] = (7,)
    del shapes["head"]
    sources = Sources(RandomCheckpoint(shapes, seed=0))
    with pytest.raises(CheckpointError) as caught:
        Exporter(family, GraphOptions()).run(sources, tmp_path / "a.diagd", Progress())
    assert "norm.weight" in str(caught.value)
    assert "head" in str(caught.value)


def test_seeds_decide_random_bytes(tmp_path: Path) -> None:
    family = small_family(small_model(LAYOUT))
    digests = []
    for seed in (1, 1, 2):
        sources = Sources(RandomCheckpoint(family.expected, seed=seed), random_seed=seed)
        bundle = Bundle.open(export(family, GraphOptions(), sources, tmp_path / "a.diagd").path)
        digests.append(bundle.manifest.files["weights.bin"].sha256)
        assert bundle.manifest.provenance.random_seed == seed
    assert digests[0] == digests[1] != digests[2]


def test_a_transformer_without_its_tokenizer_says_so() -> None:
    family = build("mineworld-300m")
    transformer = RandomCheckpoint(family.expected, seed=1)
    with pytest.raises(
        CheckpointError, match="holds no tokenizer of mineworld-300m; give --set tokenizer=FILE"
    ):
        Exporter(family, GraphOptions()).check(Sources(transformer, RandomCheckpoint({}, seed=1)))


def test_models_without_weights_say_so() -> None:
    with pytest.raises(UsageError, match="--random-weights"):
        open_sources(build("mineworld-300m"), None, None)


def test_the_plan_needs_no_weights() -> None:
    plan = Exporter(build("mineworld-1200m"), GraphOptions()).plan()
    assert plan.files["weights.bin"] == pytest.approx(4 * 1.2293e9, rel=0.01)
    assert plan.peak_bytes < 2e9
    assert np.isclose(plan.total_bytes, sum(plan.files.values()))
