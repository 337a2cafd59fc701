"""Results of measurements take no other file's place."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import play, soak
from benchmarks.quality import study


@pytest.mark.parametrize(
    ("module", "words", "name"),
    [
        (play, ["nothing.diagd", "--output"], "thesis.json"),
        (soak, ["nothing.diagd", "--log"], "thesis.jsonl"),
        (study, ["--model=.", "--data=.", "--geometry=.", "--world=x=.", "--output"], "quality.md"),
    ],
)
def test_a_file_of_the_user_stays(
    module: ModuleType,
    words: list[str],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine = tmp_path / name
    mine.write_text("[1, 2]")
    given = tmp_path if module is study else mine
    monkeypatch.setattr("sys.argv", ["benchmark", *words, str(given)])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "not replaced" in capsys.readouterr().err
    assert mine.read_text() == "[1, 2]"
