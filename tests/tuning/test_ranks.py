"""Several processes train what one does, and go on where one was interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diagd.errors import UsageError
from diagd.tuning.align import Ranks
from diagd.tuning.teacher_forcing import ForcedPasses
from tests.tuning.ranked import aligned, preferred
from tests.tuning.test_align import CHAINED, streams


@pytest.mark.slow
def test_two_processes_go_on_to_what_one_comes_to(tmp_path: Path) -> None:
    losses: dict[str, dict[int, float]] = {"aligned": {}, "preferred": {}}
    whole = aligned(tmp_path / "whole", losses["aligned"].__setitem__)
    preferred(losses["preferred"].__setitem__)

    def stop(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aligned(tmp_path, stop)
    assert (tmp_path / "kept").exists()
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *run, "-m", "tests.tuning.ranked", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "losses.json").read_text())
    for name, steps in (("aligned", (3, 4, 5, 6)), ("preferred", (1, 2, 3, 4))):
        assert found[name] == {str(step): pytest.approx(losses[name][step], rel=1e-4) for step in steps}
    weights = torch.load(tmp_path / "weights", weights_only=True)
    for name, tensor in whole.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)
    assert not (tmp_path / "kept").exists()


def test_more_processes_than_windows_are_refused() -> None:
    passes = ForcedPasses([CHAINED], 3)
    with pytest.raises(UsageError, match="raise --batch"):
        Ranks(0, 3, "cpu").batch(passes, streams(2), np.zeros(2, np.int64))
