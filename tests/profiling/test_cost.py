"""Bytes and operations of quantised step graphs, against the files and buffers themselves."""

from __future__ import annotations

import onnx
import pytest

from diagd.bundle import Bundle, Form
from diagd.engines.executor import Executor
from diagd.engines.prefix import PrefixEngine
from diagd.export.onnx_file import read_onnx
from diagd.profiling.cost import read_model, step_operations
from tests.calibration.bundles import FORMS, SCHEMES, every_scheme, quantise
from tests.engines.host_device import buffers
from tests.engines.opening import modern, portable, prefix

CASES = [(precision, form) for precision in ("fp32", *SCHEMES) for form in FORMS]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = every_scheme(tmp_path_factory.mktemp("quantised") / "small.diagd")
    quantise(path, "int8-weight", budget=None, kv_cache="int8")
    return Bundle.open(path)


@pytest.mark.parametrize(("precision", "form"), [*CASES, ("int8-weight-kv8", Form.PORTABLE)])
def test_bytes_and_operations_of_a_step(bundle: Bundle, precision: str, form: Form) -> None:
    entry = bundle.at_precision(precision).manifest.graph(form)
    tensors = onnx.load(bundle.file(entry.file), load_external_data=False).graph.initializer
    places = [{place.key: place.value for place in tensor.external_data} for tensor in tensors]
    stored = sum(int(place.get("length", 0)) for place in places)
    stored += sum(len(tensor.raw_data) for tensor in tensors if not tensor.external_data)
    constants = read_onnx(bundle.file(entry.file)).initializers
    assert entry.weights.bytes == sum(tensor.bytes for tensor in constants)
    assert set(entry.weights.files) == {place["location"] for place in places if place}
    assert all(name in bundle.manifest.files for name in entry.weights.files)
    assert sum(tensor.bytes for tensor in constants) == pytest.approx(stored, abs=64)
    model = read_model(bundle.at_precision(precision), form)
    assert model.streamed_bytes == sum(tensor.bytes for tensor in constants if not tensor.looked_up)
    assert model.step_bytes(0) == model.streamed_bytes
    whole = read_model(bundle.at_precision("fp32"), form)
    assert model.size.looked_up == whole.size.looked_up
    assert model.size.streamed == pytest.approx(whole.size.streamed, rel=0.06)
    assert step_operations(model.size, 4, 9) == pytest.approx(step_operations(whole.size, 4, 9), rel=0.06)


@pytest.mark.parametrize(("precision", "form"), [("fp32", Form.PREFIX), ("fp8", Form.MODERN)])
def test_bytes_of_the_cache(bundle: Bundle, precision: str, form: Form) -> None:
    check_cache(bundle, precision, form)


def test_bytes_of_an_int8_cache(bundle: Bundle) -> None:
    assert check_cache(bundle, "int8-weight-kv8", Form.PORTABLE) * 4 == check_cache(
        bundle, "fp32", Form.PORTABLE
    )


def check_cache(bundle: Bundle, precision: str, form: Form) -> int:
    """Bytes of one element, where a step over a full cache reads as many as the buffers have."""
    chosen = bundle.at_precision(precision)
    model = read_model(chosen, form)
    opener = {Form.PREFIX: prefix, Form.MODERN: modern, Form.PORTABLE: portable}[form]
    engine = opener(chosen, 80)
    assert isinstance(engine, PrefixEngine | Executor)
    arrays = engine.buffers if isinstance(engine, PrefixEngine) else buffers(engine)
    held = sum(buffer.nbytes for buffer in arrays.values())
    assert model.step_bytes(engine.capacity) - model.step_bytes(0) == held
    return model.cache_bytes
