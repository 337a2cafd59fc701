"""Python literals are read, and nothing in them is run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagd.runtime.actions import MAX_LITERAL, parse_literal


def test_a_released_line() -> None:
    line = "{'ESC': 0, 'forward': 1, 'hotbar.1': 0, 'camera': array([-1, 10]), 'attack': True}\n"
    expected = {"ESC": 0, "forward": 1, "hotbar.1": 0, "camera": [-1, 10], "attack": True}
    assert parse_literal(line) == expected
    assert parse_literal("{'camera': array([0., -2.5], dtype=float32)}") == {"camera": [0.0, -2.5]}
    assert parse_literal("{'camera': (1, 2)}") == {"camera": [1, 2]}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "{'a': open('/etc/passwd')}",
        "{'a': array(range(9))}",
        "{'a': array([0], [1])}",
        "{'a': np.array([0])}",
        "{'a': x}",
        "{**{}}",
        "{'a': 1 + 1}",
        "{'a': -'b'}",
        "[x for x in (1,)]",
        "lambda: 0",
        "f'{1}'",
        "b'bytes'",
        "None",
        "1j",
        "{'a': 1",
        "",
        "'\\0'\0",
        "[" * 3000,
        "-" * 3000 + "1",
        "'" + "a" * MAX_LITERAL + "'",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_literal(text)


numbers = st.integers(-1000, 1000) | st.floats(allow_nan=False, allow_infinity=False)
trees = st.recursive(
    numbers | st.booleans() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(trees)
def test_literals_are_read_as_python_reads_them(tree: object) -> None:
    assert parse_literal(repr(tree)) == tree
