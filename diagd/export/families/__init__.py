"""Models by name; a family's module is imported when one of its models is asked for."""

from __future__ import annotations

import importlib
from inspect import signature

from diagd.errors import UsageError, unknown
from diagd.export.families.family import Family

MODULES = {
    "cosmos-4b": "cosmos",
    "cosmos-12b": "cosmos",
    "cosmos-5b-video2world": "cosmos",
    "cosmos-13b-video2world": "cosmos",
    "wham-200m": "wham",
    "wham-1.6b": "wham",
    "mineworld-300m": "mineworld",
    "mineworld-700m": "mineworld",
    "mineworld-700m-32f": "mineworld",
    "mineworld-1200m": "mineworld",
    "mineworld-1200m-32f": "mineworld",
    "crafter-3m": "world",
    "doom-3m": "world",
    "world": "world",
}
"""Module of this package that holds each model, as ``build(name, checkpoint)``."""


def find(name: str, checkpoint: str | None = None, size: tuple[int, int] | None = None) -> Family:
    """The model called ``name``.

    Args:
        name: as users type it.
        checkpoint: where its weights are, for families whose dimensions are read from there.
        size: height and width of its pictures, for families that were post-trained at several.

    Raises:
        UsageError: there is none; the nearest name and all names are listed. Or the checkpoint is empty.
    """
    if name not in MODULES:
        raise unknown("model", name, MODULES)
    if checkpoint is not None and not checkpoint.strip():
        raise UsageError(f"the checkpoint of {name} is an empty path; is a variable of the shell not set?")
    module = importlib.import_module(f"diagd.export.families.{MODULES[name]}")
    if size is not None and "size" not in signature(module.build).parameters:
        raise UsageError(f"size {size[0]}x{size[1]}: {name} has pictures of one size; leave it out")
    sized = {} if size is None else {"size": size}
    family: Family = module.build(name, checkpoint, **sized)
    return family


def listing() -> list[dict[str, object]]:
    """One row for each model that needs no folder: size, grid, context, licence, origin."""
    rows = []
    for name in MODULES:
        try:
            model = find(name)
        except UsageError:  # its folder is not here
            continue
        layout, config = model.transformer.layout, model.transformer
        rows.append(
            {
                "model": name,
                "parameters": config.parameters,
                "grid": f"{layout.rows} x {layout.columns}",
                "context": f"{config.context_frames} frames",
                "licence": model.licence,
                "weights": model.origin,
            }
        )
    return rows
