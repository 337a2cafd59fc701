"""The fault runs see damage and litter."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.faults import Place, check, litter


def test_damage_and_litter_are_seen(tmp_path: Path) -> None:
    bundle = tmp_path / "out.diagd"
    bundle.mkdir()
    assert "has no manifest" in str(check("export", tmp_path))
    bundle.rmdir()
    assert check("generate", tmp_path) is None
    assert check("calibrate", tmp_path) == "a file of the user is gone"
    (tmp_path / "out.mp4").write_bytes(b"half of it")
    assert check("generate", tmp_path) == "the video is cut"
    (tmp_path / "out.mp4").unlink()
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "world.json").write_text('{"files": {"step.bin.packed": 9}}')
    (tmp_path / "page" / "step.bin.packed").write_bytes(b"half")
    assert check("web", tmp_path) == "['step.bin.packed'] of the page are cut"
    shutil.rmtree(tmp_path / "page")
    (tmp_path / "out.npy").write_bytes(b"\x93NUMPY")
    assert check("encode", tmp_path)
    assert litter(tmp_path) == []
    (tmp_path / ".out.mp4.0123abcd.1.0a1b2c.partial.mp4").touch()
    assert len(litter(tmp_path)) == 1
    assert Place(tmp_path).command("build", tmp_path)[:2] == ["build", str(bundle)]
