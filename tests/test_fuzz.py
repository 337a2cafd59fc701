"""Inputs that nobody meant: what is wrong with them is said by a DiagdError, whatever it is.

``DIAGD_FUZZ`` is the number of inputs of each kind. What Hypothesis found once it tries again first.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from diagd.bundle import Bundle, read_manifest
from diagd.bundle.actions import ActionCodec
from diagd.bundle.manifest import MANIFEST_NAME
from diagd.cli.calibrate import CalibrateSettings
from diagd.cli.export import ExportSettings
from diagd.cli.generate import GenerateSettings
from diagd.cli.profile import ProfileSettings
from diagd.cli.settings import parse_settings
from diagd.cli.verify import VerifySettings
from diagd.errors import DiagdError
from diagd.export.families.registry import find
from diagd.runtime.actions import read_actions
from diagd.runtime.arrays import read_array
from tests.bundle.test_bundle import bundle as bundle

many = settings(
    max_examples=int(os.environ.get("DIAGD_FUZZ", "200")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value in a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(found for key, value in inner for found in places(value, (*path, key)))]


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The tree with one value replaced."""
    if not path:
        return value
    tree = copy.deepcopy(tree)
    at = tree
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return tree


@many
@given(data=st.data())
def test_manifests(bundle: Path, data: st.DataObject) -> None:
    file = bundle / MANIFEST_NAME
    before = file.read_text()
    tree = json.loads(before)
    path = data.draw(st.sampled_from(places(tree)))
    names = st.sampled_from(["../x", "/etc/passwd", "", "a\\b", ".", "step.onnx", "weights.bin"])
    try:
        file.write_text(json.dumps(changed(tree, path, data.draw(values | names))))
        with contextlib.suppress(DiagdError):
            Bundle.open(bundle)
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 200_000, b"null", b"{}", b'{"schema_version": 1e400}']
)
def test_manifests_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(DiagdError):
        read_manifest(tmp_path)


CODECS = {name: find(name).actions for name in ("crafter-3m", "mineworld-300m", "wham-200m")}


@many
@given(
    record=values
    | st.dictionaries(
        st.sampled_from(["action", "camera", "forward", "repeat", "keyboard", "mouse", "buttons", "dx"]),
        values,
    ),
    cut=st.integers(0, 40),
    codec=st.sampled_from([codec for codec in CODECS.values() if codec is not None]),
)
def test_action_files(tmp_path: Path, record: Any, cut: int, codec: ActionCodec) -> None:
    text = json.dumps(record)
    for content in (text, text[:cut], f"[{text}", "[" * 100_000):
        (tmp_path / "a.jsonl").write_text(content)
        with contextlib.suppress(DiagdError):
            read_actions(tmp_path / "a.jsonl", codec)


@many
@given(
    pairs=st.lists(st.text(max_size=12) | st.tuples(st.text(max_size=8), st.text(max_size=8)).map("=".join)),
    name=st.integers(0, 100),
    value=st.text(max_size=12) | st.sampled_from(["²", "٣", "1e999", "nan", "-1", "9" * 5000]),
    model=st.sampled_from(
        [CalibrateSettings, ExportSettings, GenerateSettings, ProfileSettings, VerifySettings]
    ),
)
def test_settings(pairs: list[str], name: int, value: str, model: type[BaseModel]) -> None:
    fields = list(model.model_fields)
    for given_pairs in (pairs, [f"{fields[name % len(fields)]}={value}"]):
        with contextlib.suppress(DiagdError):
            parse_settings(model, given_pairs)


@many
@given(
    head=st.sampled_from([b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00", b"PK\x03\x04"]),
    shape=values,
    dtype=st.sampled_from(["<i4", "|O", "<f8", "|V4", "<U9", "i", "[('a', '<i4')]"]) | st.text(max_size=5),
    rest=st.binary(max_size=60),
)
def test_arrays(tmp_path: Path, head: bytes, shape: Any, dtype: str, rest: bytes) -> None:
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode(errors="replace")
    for body in (rest, len(text).to_bytes(2, "little") + text + rest):
        (tmp_path / "a.npy").write_bytes(head + body)
        with contextlib.suppress(DiagdError):
            read_array(tmp_path / "a.npy", "tokens")
