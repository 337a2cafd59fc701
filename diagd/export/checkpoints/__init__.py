"""Checkpoints: named tensors in released file formats, read tensor by tensor and never executed."""

from diagd.export.checkpoints.checkpoint import WEIGHT_DTYPES, Checkpoint, TensorHandle, check, select
from diagd.export.checkpoints.opening import open_checkpoint
from diagd.export.checkpoints.random_weights import RandomCheckpoint, initial_moments

__all__ = [
    "WEIGHT_DTYPES",
    "Checkpoint",
    "RandomCheckpoint",
    "TensorHandle",
    "check",
    "initial_moments",
    "open_checkpoint",
    "select",
]
