"""``diagd eval``: the quality of a world model under several schedules."""

from __future__ import annotations
