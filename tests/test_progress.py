"""Progress of long work where nobody watches."""

from __future__ import annotations

import io

import pytest

from diagd import progress
from diagd.cli.terminal import console
from diagd.progress import Progress


@pytest.mark.parametrize(
    ("every", "told"), [(0.0, "aligning: 25%\naligning: 50%\naligning: 75%\naligning: 100%\n"), (3600.0, "")]
)
def test_a_file_has_a_line_now_and_then(every: float, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", every)
    target = console()
    target.file = io.StringIO()
    assert list(Progress(target).each([5, 6, 7, 8], "aligning")) == [5, 6, 7, 8]
    assert target.file.getvalue() == told
