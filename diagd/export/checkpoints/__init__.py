"""Checkpoints: named tensors in released file formats, read tensor by tensor and never executed.

`open_checkpoint` gives a `Checkpoint` (a mapping of names to `TensorHandle`) for a file, a folder or a
Hugging Face repository; `select` renames, `check` compares with a model, `RandomCheckpoint` replaces a file.
"""

from diagd.export.checkpoints.checkpoint import WEIGHT_DTYPES, Checkpoint, TensorHandle, select
from diagd.export.checkpoints.fit import check
from diagd.export.checkpoints.opening import open_checkpoint
from diagd.export.checkpoints.random_weights import Moments, RandomCheckpoint, initial_moments

__all__ = [
    "WEIGHT_DTYPES",
    "Checkpoint",
    "Moments",
    "RandomCheckpoint",
    "TensorHandle",
    "check",
    "initial_moments",
    "open_checkpoint",
    "select",
]
