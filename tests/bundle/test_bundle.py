"""Bundles that are missing, truncated, altered or too new are refused before anything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from diagd.bundle import Bundle, Manifest, atomic_bundle, seal
from diagd.bundle.files import atomic_file, sha256
from diagd.bundle.manifest import (
    CacheShape,
    Form,
    GraphWeights,
    IdRange,
    Provenance,
    RotaryContext,
    SamplingRules,
    StepGraph,
)
from diagd.bundle.transformer import NormKind, TextShape, TransformerConfig, linear_rotary
from diagd.errors import BundleError, UsageError
from diagd.schedule import StreamLayout

WEIGHTS = GraphWeights(files=("weights.bin",), streamed=4000, looked_up=1000)


def manifest() -> Manifest:
    return Manifest(
        name="small",
        family="small",
        transformer=TransformerConfig(
            StreamLayout(rows=2, columns=3, before=1),
            *(4, 10, 8, 8, 12, 1, 2, 1, 4),
            rotary=linear_rotary(4, 1e4),
            norm=NormKind.LAYER,
            text=TextShape(3, 5),
        ),
        sampling=SamplingRules(ranges=(IdRange(low=0, high=8), IdRange(cell=0, low=1, high=8))),
        context=RotaryContext(frames=4, positions=70, frame_angles=(0.5, 0.25)),
        order="k=1 serial",
        cache=CacheShape(layers=1, kv_heads=1, head_size=4, dtype="float32"),
        frames_per_second=10,
        graphs=(StepGraph(file="step.onnx", form=Form.PREFIX, precision="fp32", weights=WEIGHTS),),
        provenance=Provenance(source="the tests", diagd_version="0"),
        licence="none",
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "small.diagd"
    with atomic_bundle(path) as directory:
        (directory / "step.onnx").write_bytes(b"graph" * 100)
        (directory / "weights.bin").write_bytes(os.urandom(5000))
        seal(directory, manifest())
    return path


def edit(bundle: Path, **fields: object) -> None:
    file = bundle / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_what_was_sealed_is_what_is_opened(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.manifest.model_copy(update={"files": {}}) == manifest()
    assert set(opened.manifest.files) == {"step.onnx", "weights.bin"}
    assert opened.manifest.layout == StreamLayout(2, 3, before=1)


def test_the_layout_is_stored_as_plain_fields(bundle: Path) -> None:
    tokens = {"rows": 2, "columns": 3, "before": 1, "after": 0, "prefix": 2, "prefix_tokens": [7, 9]}
    content = json.loads((bundle / "manifest.json").read_text())
    edit(bundle, transformer=content["transformer"] | {"layout": tokens})
    layout = Bundle.open(bundle).manifest.layout
    assert layout == StreamLayout(2, 3, before=1, prefix_tokens=(7, 9))
    stored = json.loads(Bundle.open(bundle).manifest.model_dump_json())["transformer"]
    assert stored["layout"] == tokens
    assert (stored["norm"], stored["text"]) == ("layer", {"length": 3, "width": 5})
    assert [axis["axis"] for axis in stored["rotary"]["axes"]] == ["position"]


def test_missing_bundles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="path of the bundle is empty"):
        Bundle.open("")
    with pytest.raises(BundleError, match="no bundle at"):
        Bundle.open(tmp_path / "none.diagd")
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        Bundle.open(tmp_path)


def test_missing_files_are_refused(bundle: Path) -> None:
    (bundle / "weights.bin").unlink()
    with pytest.raises(BundleError, match=r"'weights\.bin' is missing"):
        Bundle.open(bundle)


def test_what_nothing_names_may_be_missing_but_not_altered(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    note = bundle / "calibration" / "report.json"
    note.parent.mkdir()
    note.write_text("{}")
    seal(bundle, manifest())
    note.write_text("[]")
    with pytest.raises(BundleError, match=r"'calibration/report\.json' was altered"):
        Bundle.open(bundle)
    note.unlink()
    assert set(Bundle.open(bundle).manifest.files) == {"step.onnx", "weights.bin"}
    assert "goes on without 'calibration/report.json'" in caplog.text


def test_truncated_files_are_refused(bundle: Path) -> None:
    os.truncate(bundle / "weights.bin", 4999)
    with pytest.raises(BundleError, match="4999 bytes, its manifest says 5000"):
        Bundle.open(bundle)


@pytest.mark.parametrize("opened_before", [False, True])
def test_altered_files_are_refused(bundle: Path, opened_before: bool) -> None:
    if opened_before:
        Bundle.open(bundle)
    file = bundle / "weights.bin"
    content = bytearray(file.read_bytes())
    content[2500] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match="altered"):
        Bundle.open(bundle)


def test_digests_are_taken_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Bundle.open(bundle)
    hashed: list[str] = []

    def count(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    monkeypatch.setattr("diagd.bundle.cache.files.sha256", count)
    Bundle.open(bundle)
    assert hashed == []


def test_newer_bundles_are_refused(bundle: Path) -> None:
    edit(bundle, schema_version=99)
    with pytest.raises(BundleError, match=r"schema version 99.*pip install -U diagd"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("provenance", "line"),
    [
        ({"source": "my weights.pt"}, "--model small --checkpoint 'my weights.pt'"),
        ({"source": "random", "random_seed": 3}, "--random-weights --model small --seed 3"),
    ],
)
def test_older_bundles_are_refused_with_the_line_that_makes_them_again(
    bundle: Path, provenance: dict[str, object], line: str
) -> None:
    edit(bundle, schema_version=1, provenance=provenance)
    with pytest.raises(BundleError) as failure:
        Bundle.open(bundle)
    assert str(failure.value) == (
        f"{bundle} has schema version 1, this diagd reads version 4; export it again: "
        f"diagd-export {line} --form prefix --precision fp32 --output {bundle}"
    )


def test_an_older_manifest_may_say_nothing(bundle: Path) -> None:
    (bundle / "manifest.json").write_text('{"schema_version": 1}')
    with pytest.raises(BundleError, match=r"diagd-export --model NAME --checkpoint FILE --output .*small"):
        Bundle.open(bundle)


def test_damaged_manifests_are_refused(bundle: Path) -> None:
    transformer = json.loads((bundle / "manifest.json").read_text())["transformer"]
    edit(bundle, transformer=transformer | {"vocabulary": "many"})
    with pytest.raises(BundleError, match=r"field 'transformer\.vocabulary'"):
        Bundle.open(bundle)
    edit(bundle, transformer=transformer | {"layout": {"rows": 0, "columns": 3}})
    with pytest.raises(BundleError, match="at least 1 x 1 cells, got 0 x 3; export the bundle again"):
        Bundle.open(bundle)
    for name in ("", "../../home/evil", "C:\\evil", "\x1b[2J", "x" * 201):
        edit(bundle, transformer=transformer, name=name)
        with pytest.raises(BundleError, match="field 'name'"):
            Bundle.open(bundle)
    edit(bundle, transformer=transformer, name="tiny", surprise=1)
    with pytest.raises(BundleError, match="field 'surprise'"):
        Bundle.open(bundle)
    (bundle / "manifest.json").write_text('{"schema_version": 1,')
    with pytest.raises(BundleError, match="is damaged"):
        Bundle.open(bundle)


def test_ranges_by_cell_override_the_default() -> None:
    table = manifest().sampling.range_table(StreamLayout(2, 3, before=1))
    assert table.tolist() == [[0, 8], [1, 8], [0, 8], [0, 8], [0, 8], [0, 8], [0, 8]]
    assert manifest().cell_ranges.tolist() == [[[1, 8], [0, 8], [0, 8]], [[0, 8], [0, 8], [0, 8]]]


def test_failed_writes_leave_what_was_there(bundle: Path) -> None:
    before = sorted(bundle.iterdir())
    with pytest.raises(RuntimeError), atomic_bundle(bundle) as directory:
        (directory / "half").write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_file(bundle / "weights.bin") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert sorted(bundle.iterdir()) == before
    assert list(bundle.parent.iterdir()) == [bundle]
    Bundle.open(bundle)


def test_a_new_bundle_takes_the_place_of_the_old(bundle: Path) -> None:
    graph = manifest().graphs[0]
    weightless = graph.model_copy(update={"weights": graph.weights.model_copy(update={"files": ()})})
    with atomic_bundle(bundle) as directory:
        (directory / "step.onnx").write_bytes(b"other")
        seal(directory, manifest().model_copy(update={"graphs": (weightless,)}))
    assert set(Bundle.open(bundle).manifest.files) == {"step.onnx"}


def test_what_was_fetched_in_place_of_a_file_is_named(bundle: Path) -> None:
    (bundle / "weights.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BundleError, match="git lfs pull"):
        Bundle.open(bundle)
    (bundle / "manifest.json").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(BundleError, match="web page"):
        Bundle.open(bundle)


def test_an_editor_may_mark_a_manifest_as_unicode(bundle: Path) -> None:
    file = bundle / "manifest.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert Bundle.open(bundle).manifest.name == "small"
