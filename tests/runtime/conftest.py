"""One small bundle for the runtime's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from diagd.schedule import StreamLayout
from tests.models import export_small
from tests.oracles.models import small_model

LAYOUT = StreamLayout(4, 6, after=3)


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of grid 4 x 6 with three action tokens after each frame and a context of four frames."""
    return export_small(
        small_model(LAYOUT, context_frames=4), tmp_path_factory.mktemp("small") / "small.diagd"
    )
