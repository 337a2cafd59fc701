"""Whether a checkpoint holds exactly the tensors a model needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from diagd.errors import CheckpointError
from diagd.export.checkpoints.checkpoint import WEIGHT_DTYPES, Checkpoint, Shape

_LINES_PER_KIND = 12


def check(
    checkpoint: Checkpoint, expected: Mapping[str, Shape], dtypes: Sequence[str] = WEIGHT_DTYPES
) -> None:
    """Compare names, shapes and dtypes with what a model needs; nothing is read.

    Args:
        checkpoint: tensors under the model's names (see `select`).
        expected: shape of every tensor of the model.
        dtypes: those that can be used.

    Raises:
        CheckpointError: any tensor is missing, extra, wrongly shaped or of an unusable dtype. One error
            lists them all; tensors that differ only in their numbers (layers) share a line with a count.
    """
    missing = [name for name in expected if name not in checkpoint]
    found = {
        "missing": [(name, f"{list(expected[name])}") for name in missing],
        "extra": [(name, f"{list(checkpoint[name].shape)}") for name in checkpoint if name not in expected],
        "wrong shape": [
            (name, f"expected {list(shape)}, found {list(checkpoint[name].shape)}")
            for name, shape in expected.items()
            if name in checkpoint and checkpoint[name].shape != tuple(shape)
        ],
        "unusable dtype": [
            (name, f"expected one of {', '.join(dtypes)}, found {checkpoint[name].dtype}")
            for name in expected
            if name in checkpoint and checkpoint[name].dtype not in dtypes
        ],
    }
    problems = {kind: entries for kind, entries in found.items() if entries}
    if problems:
        raise CheckpointError(_report(checkpoint, problems, nothing_fits=len(missing) == len(expected)))


def _report(
    checkpoint: Checkpoint, problems: Mapping[str, list[tuple[str, str]]], *, nothing_fits: bool
) -> str:
    counts = ", ".join(f"{len(entries)} {kind}" for kind, entries in problems.items())
    lines = [f"{checkpoint.source} does not fit the model: {counts}"]
    for kind, entries in problems.items():
        lines += [f"  {kind}: {line}" for line in _abbreviate(entries)]
    lines.append(_remedy(problems, nothing_fits=nothing_fits))
    return "\n".join(lines)


def _remedy(problems: Iterable[str], *, nothing_fits: bool) -> str:
    if nothing_fits:
        return "No expected name is there: this is another model family or another part of the model."
    if set(problems) == {"unusable dtype"}:
        return "Use the original checkpoint, or convert these tensors to bfloat16, float16 or float32."
    return "Check that the model name and size are those of the checkpoint."


def _abbreviate(entries: Iterable[tuple[str, str]]) -> list[str]:
    """One line for all names that differ only in their numbers, at most `_LINES_PER_KIND` lines."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, detail in entries:
        groups.setdefault((re.sub(r"\d+", "*", name), detail), []).append(name)
    lines = [
        f"{names[0]} {detail}" if len(names) == 1 else f"{pattern} {detail} ({len(names)} tensors)"
        for (pattern, detail), names in groups.items()
    ]
    if len(lines) <= _LINES_PER_KIND:
        return lines
    shown = list(groups.values())[:_LINES_PER_KIND]
    rest = sum(map(len, groups.values())) - sum(map(len, shown))
    return [*lines[:_LINES_PER_KIND], f"... and {rest} more tensors"]
