"""What a page and Python decode side by side."""

from __future__ import annotations

import numpy as np

from benchmarks.web import random_actions
from diagd.export.families import find


def test_every_slot_is_given_tokens_of_its_own() -> None:
    for name, slots in (("crafter-3m", 1), ("mineworld-300m", 11)):
        codec = find(name).actions
        assert codec is not None
        ids = random_actions(codec.slots, 500)
        assert ids.shape == (500, slots) and ids.dtype == np.int32
        for slot, drawn in zip(codec.slots, ids.T, strict=True):
            assert {*drawn} <= {*slot.ids} and (len({*drawn}) > 1 or len(slot.ids) == 1)
