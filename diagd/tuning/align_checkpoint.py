"""Alignment of any family's checkpoint: read, fine-tune, write back under the released names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diagd.bundle.files import atomic_file
from diagd.bundle.targets import file_target
from diagd.bundle.transformer import TransformerConfig
from diagd.errors import UsageError
from diagd.export.checkpoints import Checkpoint, check
from diagd.export.families.family import Family
from diagd.export.transformer import Transformer
from diagd.progress import is_first
from diagd.runtime.arrays import read_array
from diagd.schedule import StreamLayout
from diagd.tuning.align import Report, Validation, align
from diagd.tuning.options import AlignOptions

OUTPUT_SUFFIX = ".safetensors"


def align_checkpoint(
    family: Family,
    source: Checkpoint,
    streams: NDArray[np.int64],
    options: AlignOptions,
    output: Path,
    report: Report | None = None,
    *,
    text: NDArray[np.float32] | None = None,
    valid: Validation | None = None,
) -> Path:
    """Fine-tune a checkpoint to decoding schedules.

    Args:
        family: the model.
        source: its tensors, under the family's names.
        streams: int64 [N, tokens], windows of known videos.
        options: schedules and training settings.
        output: .safetensors file that ``diagd export --checkpoint`` reads; float16.
        report: told about every step.
        text: see ``align``.
        valid: see ``align``.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
        UsageError: the windows do not fit the model, or the output is no .safetensors.
    """
    from safetensors.numpy import save_file

    if output.suffix.lower() != OUTPUT_SUFFIX or output.exists():
        file_target(output, (OUTPUT_SUFFIX,))
    check(source, family.expected)
    made_up = {rule.target for rule in family.rules if not rule.sources}  # a checkpoint cannot hold these
    model = load_transformer(family, source)
    align(model, streams, options, report, text=text, frozen=made_up, valid=valid)
    if not is_first():
        return output
    state = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    released: dict[str, NDArray[np.generic]] = {}
    for rule in family.rules:
        released |= rule.release(state[rule.target].astype(np.float16))
    prefix = family.prefixes[0]
    with atomic_file(output) as partial:
        save_file({prefix + name: np.ascontiguousarray(tensor) for name, tensor in released.items()}, partial)
    return output


def load_transformer(family: Family, source: Checkpoint) -> Transformer:
    """The family's transformer in float32, with the weights of a checked checkpoint."""
    state = {
        name: torch.from_numpy(np.concatenate([np.atleast_1d(chunk) for chunk in weight.chunks()]))
        for name, weight in family.weights(source).items()
    }
    model = Transformer(family.transformer)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


def read_windows(path: Path, config: TransformerConfig, frames: int) -> NDArray[np.int64]:
    """Windows of a .npy token stream, int64 [N, tokens of ``frames`` frames], half a window apart.

    Args:
        path: int [T] or [T, frame_length]: the stream of one video, known tokens included.
        config: whose layout the stream has; it starts at a frame, without the prefix.
        frames: of each window.

    Raises:
        UsageError: the file is no such stream, or is shorter than a window.
    """
    layout = config.layout
    stream = read_array(path, "tokens").reshape(-1).astype(np.int64)
    length = frames * layout.frame_length
    if len(stream) < length or stream.min() < 0 or stream.max() >= config.vocabulary:
        raise UsageError(
            f"{path} holds {len(stream)} tokens in {stream.min(initial=0)}..{stream.max(initial=0)}; "
            f"expected {length} or more ({frames} frames of {layout.frame_length}) "
            f"in 0..{config.vocabulary - 1}"
        )
    return cut(stream, layout, frames)


def cut(stream: NDArray[np.int64], layout: StreamLayout, frames: int) -> NDArray[np.int64]:
    """Windows int64 [N, tokens of ``frames`` frames] of the stream [T] of one video, half a window apart."""
    length = frames * layout.frame_length
    step = max(1, frames // 2) * layout.frame_length
    starts = range(0, len(stream) - length + 1, step)
    windows = np.stack([stream[start : start + length] for start in starts])
    prefix = np.tile(np.asarray(layout.prefix_tokens, np.int64), (len(windows), 1))
    return np.concatenate([prefix, windows], axis=1)
