"""Compiled engines are found where they fit, and a misfit names its reason and its remedy."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import (
    CacheShape,
    FileRecord,
    GraphWeights,
    IdRange,
    Manifest,
    Provenance,
    RotaryContext,
    SamplingRules,
    StepGraph,
)
from diagd.bundle.transformer import TransformerConfig
from diagd.engines.tensorrt.opening import ANY, RECORD_NAME, EngineStore, Fingerprint
from diagd.errors import EngineError
from diagd.export.onnx_file import read_onnx
from diagd.schedule import StreamLayout

BUILT = Fingerprint(
    graph="a" * 64,
    runtime="tensorrt 11.4.0",
    device="NVIDIA H200",
    targets=("sm90",),
    driver="13.0",
    form=Form.MODERN,
    precision="fp16",
    widths=(1, 16),
    tokens=500,
)


WEIGHTS = GraphWeights(files=("weights.bin",), streamed=123456 + 8 + 8, looked_up=0)
STEP = StepGraph(file="step.onnx", form=Form.MODERN, precision="fp16", weights=WEIGHTS)


def graph_with_weights() -> onnx.ModelProto:
    """A graph of two external tensors in one file and one tensor of its own."""
    tensors = []
    for name, offset, length in (("matrix", 0, 123456), ("bias", 126976, 8)):
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[length // 4])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "weights.bin"), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    tensors.append(helper.make_tensor("length", onnx.TensorProto.FLOAT, [2], [1.0, 2.0]))
    return helper.make_model(helper.make_graph([], "step", [], [], tensors))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    names = ("step.onnx", "weights.bin", "tokenizer.bin")
    files = {name: FileRecord(bytes=1, sha256=name[0] * 64) for name in names}
    onnx.save(graph_with_weights(), tmp_path / "step.onnx")
    manifest = Manifest(
        name="small",
        family="small",
        transformer=TransformerConfig(
            layout=StreamLayout(rows=2, columns=3),
            context_frames=4,
            vocabulary=8,
            output_vocabulary=8,
            hidden=8,
            feed_forward=12,
            layers=1,
            heads=1,
            kv_heads=1,
            head_size=8,
            rotary=None,
        ),
        sampling=SamplingRules(ranges=(IdRange(low=0, high=8),)),
        context=RotaryContext(frames=4, positions=60, frame_angles=(0.0,)),
        order="k=1 serial",
        cache=CacheShape(layers=1, kv_heads=1, head_size=8, dtype="float16"),
        frames_per_second=8.0,
        graphs=(STEP,),
        files=files,
        provenance=Provenance(source="none", diagd_version="0"),
        licence="none",
    )
    return Bundle(tmp_path, manifest)


def test_an_engine_is_found_again(bundle: Bundle) -> None:
    store = EngineStore(bundle)
    stored = store.write(BUILT, b"plan")
    assert stored.plan.read_bytes() == b"plan"
    assert store.find(BUILT) == stored
    assert [path.name for path in store.root.iterdir()] == [BUILT.key]


@pytest.mark.parametrize(
    ("part", "value", "text"),
    [
        ("graph", "b" * 64, "graph: built for aaaaaaaaaaaa, here bbbbbbbbbbbb"),
        ("runtime", "tensorrt 10.3.0", "runtime: built for tensorrt 11.4.0, here tensorrt 10.3.0"),
        ("device", "NVIDIA L4", "device: built for NVIDIA H200, here NVIDIA L4"),
        ("targets", ("sm89",), "targets: built for sm90, here sm89"),
        ("driver", "12.6", "driver: built for 13.0, here 12.6"),
        ("form", Form.PORTABLE, "form: built for modern, here portable"),
        ("precision", "fp32", "precision: built for fp16, here fp32"),
        ("widths", (1,), "widths: built for 1,16, here 1"),
        ("tokens", 9, "tokens: built for 500, here 9"),
        ("flags", ("optimization_level=5",), "flags: built for none, here optimization_level=5"),
    ],
)
def test_what_differs_is_named_with_the_line_that_mends_it(
    bundle: Bundle, part: str, value: object, text: str
) -> None:
    store = EngineStore(bundle)
    store.write(BUILT, b"plan")
    here = BUILT.model_copy(update={part: value})
    assert here.key != BUILT.key
    with pytest.raises(EngineError) as failure:
        store.find(here)
    line = f"diagd-build {bundle.path} --precision {here.precision} --form {here.form.value}"
    line += f" --runtime tensorrt --widths {','.join(map(str, here.widths))}"
    line += " --set optimization_level=5" if part == "flags" else ""
    assert str(failure.value).endswith(f"differs in {text}. Run: {line}")


def test_an_engine_of_another_form_that_would_do_is_found(bundle: Bundle) -> None:
    store = EngineStore(bundle)
    portable = BUILT.model_copy(update={"form": Form.PORTABLE, "graph": "c" * 64})
    stored = store.write(portable, b"plan")
    assert store.find(BUILT, portable) == stored
    with pytest.raises(EngineError, match="form: built for portable, here modern"):
        store.find(BUILT)


def test_a_cross_built_engine_fits_its_targets_on_any_device(bundle: Bundle) -> None:
    family = BUILT.model_copy(update={"device": ANY, "driver": ANY, "targets": ("sm86", "sm89")})
    store = EngineStore(bundle)
    store.write(family, b"plan")
    assert store.find(BUILT.model_copy(update={"targets": ("sm89",)})).record.fingerprint == family
    with pytest.raises(EngineError, match="targets: built for sm86,sm89, here sm90"):
        store.find(BUILT)


def test_a_machine_that_names_no_widths_takes_those_built(bundle: Bundle) -> None:
    store = EngineStore(bundle)
    stored = store.write(BUILT.model_copy(update={"flags": ("optimization_level=5",)}), b"plan")
    assert store.find(BUILT.model_copy(update={"widths": ()})) == stored


def test_the_nearest_of_several_is_named(bundle: Bundle) -> None:
    store = EngineStore(bundle)
    store.write(BUILT.model_copy(update={"driver": "1.0", "tokens": 3}), b"far")
    store.write(BUILT.model_copy(update={"driver": "12.0"}), b"near")
    with pytest.raises(EngineError, match=r"differs in driver: built for 12\.0, here 13\.0"):
        store.find(BUILT)


def test_none_at_all_is_said(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="has no compiled engine; run: diagd-build"):
        EngineStore(bundle).find(BUILT)


def test_a_damaged_plan_and_a_foreign_record_are_not_used(bundle: Bundle) -> None:
    store = EngineStore(bundle)
    stored = store.write(BUILT, b"plan")
    stored.plan.write_bytes(b"plaN")
    with pytest.raises(EngineError, match=r"is damaged: 4 bytes.*run diagd-build again"):
        store.find(BUILT)
    (stored.directory / RECORD_NAME).write_text('{"schema": 2}')
    assert list(store) == []


@pytest.mark.parametrize("name", ["step.onnx", "weights.bin", "tokenizer.bin"])
def test_the_digest_covers_the_graph_and_its_own_weights(bundle: Bundle, name: str) -> None:
    digest = bundle.graph_digest(STEP)
    files = bundle.manifest.files | {name: FileRecord(bytes=1, sha256="f" * 64)}
    other = Bundle(bundle.path, bundle.manifest.model_copy(update={"files": files}))
    assert (other.graph_digest(STEP) == digest) == (name == "tokenizer.bin")


def test_the_recorded_weights_are_those_of_the_file(bundle: Bundle) -> None:
    assert read_onnx(bundle.file("step.onnx")).weights == WEIGHTS
    assert WEIGHTS.bytes == 123456 + 8 + 8  # the third tensor lies in the graph itself
