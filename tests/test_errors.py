"""What arguments are refused for, and what messages tell to run."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
from typing_extensions import TypeAliasType

from diagd.errors import UsageError, command_line, expect, pip_line

Element = TypeVar("Element", bound=np.generic)
Values = TypeAliasType("Values", np.ndarray[tuple[int, ...], np.dtype[Element]], type_params=(Element,))
"""An array as NumPy names its own from 2.5 on, behind an alias."""


def take(ids: Values[np.int32], more: Values[np.int32] | None = None) -> None:
    """What is looked at is the annotations."""


def test_types_behind_an_alias_are_those_that_they_stand_for() -> None:
    ids = np.zeros(2, np.int32)
    expect(take, {"ids": ids, "more": None})
    expect(take, {"ids": ids, "more": ids})
    with pytest.raises(UsageError, match=r"ids is \[0\]; expected a ndarray"):
        expect(take, {"ids": [0]})
    with pytest.raises(UsageError, match="more is 'x'; expected a ndarray or None"):
        expect(take, {"ids": ids, "more": "x"})


def test_commands_are_those_of_the_systems_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert pip_line("play") == "pip install 'diagd[play]'"
    assert command_line("diagd", "it's", "numpy>=2") == """diagd 'it'"'"'s' 'numpy>=2'"""
    monkeypatch.setattr("sys.platform", "win32")
    assert pip_line("play") == "pip install diagd[play]"
    assert command_line("diagd", r"C:\a b\c.diagd", "numpy>=2") == r'diagd "C:\a b\c.diagd" "numpy>=2"'
