"""What is read of a stream's snapshot: a head and arrays, all of it checked before anything is believed."""

from __future__ import annotations

import io
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from diagd.bundle.actions import Record
from diagd.errors import UsageError
from diagd.runtime.sampling import SAMPLER
from diagd.schedule import StreamLayout

POSITIONS: Final = 1 << 62
"""Those of a stream are below: with what is added to them they are int64."""


class Head(Record):
    """Of a stream, what is no array; ``layout`` is that of `shape`, ``orders`` are those of kept frames."""

    format: Literal["diagd stream 2"] = "diagd stream 2"
    layout: list[int]
    known: Annotated[int, Field(ge=0)]
    prompt: Annotated[int, Field(ge=0)]
    sampler: str = SAMPLER
    seed: Annotated[int, Field(ge=0, lt=1 << 64)]
    settings: tuple[float, int, float]
    orders: list[str | None]


def shape(layout: StreamLayout) -> list[int]:
    """A layout as a snapshot tells it."""
    return [layout.rows, layout.columns, layout.prefix, layout.before, layout.after]


def read(snapshot: bytes, own: StreamLayout) -> tuple[Head, dict[str, NDArray[Any]]]:
    """Head and arrays of a snapshot; UsageError where it is none, or of another layout than ``own``."""
    try:
        with np.load(io.BytesIO(snapshot), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        head = Head.model_validate_json(bytes(arrays["head"]), strict=True)
        if head.sampler != SAMPLER:
            raise ValueError(f"its sampler is {head.sampler!r}, this one's is {SAMPLER!r}")
        if head.layout != shape(own):
            raise ValueError(f"it is of a stream of {head.layout}, this model's is {own}")
        kept = len(arrays["tokens"])
        if not min(1, head.known) <= kept <= head.known < POSITIONS // own.frame_length:
            raise ValueError(f"it has {kept} of {head.known} frames")
        _check(arrays, own, kept, len(head.orders))
    except Exception as error:  # NumPy, pydantic and zipfile raise many types for other bytes
        raise UsageError(
            f"this is no snapshot of a stream ({error}); take one with stream.snapshot()"
        ) from error
    return head, arrays


def _check(arrays: dict[str, NDArray[Any]], own: StreamLayout, kept: int, orders: int) -> None:
    """Give arrays their shapes; ValueError where they have others, or numbers that mean nothing."""
    grid: tuple[int, ...] = (own.rows, own.columns)
    frame = {"tokens": grid, "actions": (own.gap,), "counts": (), "order": (), "origin": ()}
    shapes = {"first": (own.frame_start(1),)} | {name: (kept, *shape) for name, shape in frame.items()}
    for name, expected in shapes.items():
        arrays[name] = arrays[name].reshape(expected)
        if arrays[name].dtype.kind != "i":
            raise ValueError(f"its {name} are {arrays[name].dtype}, expected whole numbers")
    for name, most in (("counts", own.gap), ("order", orders - 1)):
        if kept and not 0 <= arrays[name].min() <= arrays[name].max() <= most:
            raise ValueError(f"its {name} are {arrays[name].tolist()}, expected 0..{most}")
    arrays["text"] = arrays["text"].astype(np.float32)
