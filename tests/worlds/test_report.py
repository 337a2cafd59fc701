from __future__ import annotations

from pathlib import Path

import numpy as np

from worlds.report import save_contact_sheet


def test_sheet_shows_every_frame(tmp_path: Path) -> None:
    from matplotlib import image

    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    rows = {name: np.broadcast_to(colours[:, None, None], (3, 12, 16, 3)) for name in ("ntp", "k=1")}
    save_contact_sheet(tmp_path / "sheet.png", rows)
    picture = image.imread(tmp_path / "sheet.png")[..., :3]
    areas = [(np.abs(picture - colour / 255).max(-1) < 0.02).sum() for colour in colours]
    assert min(areas) > 1000
    assert max(areas) < 1.1 * min(areas)
