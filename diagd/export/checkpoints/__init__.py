"""Checkpoints: named tensors in released file formats, read tensor by tensor and never executed.

A checkpoint of any format is told by its content: a file, a sharded set, a folder, a repository. Its tensors
have not been read yet: shape and dtype at once, values row by row when asked. They are those of a safetensors
file, or random ones for latency work; ``torch_file`` has those of PyTorch.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.files import atomic_file, instead, usual_rights
from diagd.errors import CheckpointError, UsageError, require
from diagd.export.checkpoints.location import (
    DISTRIBUTED,
    distributed,
    fetch,
    is_index,
    is_shard,
    local_file,
    shard_names,
)

if TYPE_CHECKING:
    from torch import Tensor

require("ml_dtypes", extra="export", purpose="read checkpoints")  # teaches NumPy the name bfloat16

Shape = tuple[int, ...]

WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")
READABLE = {*WEIGHT_DTYPES, "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
_LINES_PER_KIND = 12
_PER_COUNTER = 16  # 16-bit draws in one 256-bit Philox block
_CHUNK = 1 << 20
_DTYPES = {"BF16": "bfloat16", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
for _code, _kind in {"F": "float", "I": "int", "U": "uint"}.items():
    _DTYPES |= {f"{_code}{bits}": f"{_kind}{bits}" for bits in (8, 16, 32, 64)}
"""NumPy's names of the types of safetensors."""

_PICKLE_STARTS = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DISTRIBUTED = "module."
_COUNTERS = ("n_averaged",)
"""What `torch.optim.swa_utils.AveragedModel` keeps beside the model."""


def open_checkpoint(spec: str | Path) -> Checkpoint:
    """Open a checkpoint without reading a tensor.

    Names are those of the model itself: what `torch.compile`, `DistributedDataParallel`, FSDP and
    `AveragedModel` add to them is taken off.

    Args:
        spec: a file (safetensors, `torch.save`, Lightning, TorchScript; told by content), the index of a
            sharded set, a folder with one of these, or ``hf://org/name[@revision][/subpath]``.

    Raises:
        CheckpointError: nothing is there, or it is damaged, hostile, unsupported or out of reach.
        DependencyError: huggingface_hub is needed and not installed.
    """
    text = os.fspath(spec)
    if not text.strip():
        raise CheckpointError("the path of the checkpoint is empty; is a variable of the shell not set?")
    path, source = fetch(text) if text.startswith("hf:") else (Path(text).expanduser(), None)
    try:
        found = _open_file(local_file(path, text))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}; check its permissions"
        ) from error
    except CheckpointError as error:
        if source is None or not str(error).endswith("download it again"):
            raise
        raise CheckpointError(
            f"{error}: first remove {path.resolve()}, the copy that is kept of it"
        ) from error
    names = [_WRAPPERS.sub("", name) for name in found if name not in _COUNTERS]
    skipped = len(_DISTRIBUTED) if names and all(name.startswith(_DISTRIBUTED) for name in names) else 0
    opened = select(found, lambda name: None if name in _COUNTERS else _WRAPPERS.sub("", name)[skipped:])
    opened.source = source or opened.source
    return opened


def _open_file(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(512)
    if problem := instead(path):
        raise CheckpointError(f"{path} {problem}")
    if start.startswith(_PICKLE_STARTS) or start[257:262] == b"ustar":
        raise CheckpointError(
            f"{path} is in the format PyTorch wrote before 1.6, which cannot be mapped; convert it with: "
            f"python -c \"import torch; torch.save(torch.load('{path.as_posix()}', map_location='cpu', "
            f"weights_only=True), '{path.with_suffix('').as_posix()}-zip{path.suffix}')\""
        )
    if path.suffix == DISTRIBUTED:
        raise CheckpointError(f"{path} is a part of {path.parent}, which {distributed(str(path.parent))}")
    if is_index(path.name):
        return _open_shards(path)
    if start.startswith(b"PK"):
        require("torch", extra="export", purpose="read checkpoints of PyTorch")
        from diagd.export.checkpoints.torch_file import read_torch

        return read_torch(path)
    if path.suffix.lower() == ".safetensors" or start[8:9] == b"{":
        return read_safetensors(path)
    raise CheckpointError(
        f"{path} is not a checkpoint: it begins with {start[:8]!r}, expected a safetensors file or a zip "
        "that PyTorch wrote (.pt, .ckpt, .bin, .jit)"
    )


def _open_shards(index: Path) -> Checkpoint:
    """A sharded set as one checkpoint; all missing shards are named."""
    files = shard_names(index)
    needed = dict.fromkeys(files.values())
    absent = [shard for shard in needed if not (index.parent / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{index.parent} lacks {len(absent)} of {len(needed)} shards: {', '.join(absent)}; "
            "download them into the same folder"
        )
    shards = {shard: _open_file(index.parent / shard) for shard in needed}
    tensors: dict[str, TensorHandle] = {}
    for name, shard in files.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{index.parent / shard} lacks tensor '{name}', which {index.name} places there; "
                "index and shards are of different versions: download both again"
            )
        tensors[name] = shards[shard][name]
    metadata = {key: value for shard in shards.values() for key, value in shard.metadata.items()}
    return Checkpoint(tensors, source=str(index), metadata=metadata)


Stamp = tuple[int, int]


def stamp(file: Path) -> Stamp:
    """What tells that a file is still the one that was opened: its size, and when it was written."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def unchanged(file: Path, before: Stamp | None, what: str) -> Iterator[None]:
    """Read ``what`` of a file; CheckpointError where it cannot be, or is of another file than was opened."""
    problem: Exception | None = None
    try:
        yield
        if before is None or stamp(file) == before:
            return
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise MemoryError(str(error)) from error
        problem = error
    raise CheckpointError(
        f"{file} changed since it was opened, so {what} cannot be read"
        + (f" ({problem})" if problem else "")
        + "; if something still writes it, as training or a download does, wait for it or pass a copy"
    ) from problem


@dataclass(frozen=True)
class TensorHandle(ABC):
    """A tensor of a checkpoint; ``dtype`` is a name such as ``float32``, ``float16`` or ``bfloat16``."""

    shape: Shape
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self) -> NDArray[Any]:
        """The whole tensor, C-contiguous and possibly read-only; bfloat16 as `ml_dtypes.bfloat16`.

        Raises:
            CheckpointError: the dtype has no array form, or the file changed since it was opened.
        """
        return self._readable(0, self.shape[0] if self.shape else 1).reshape(self.shape)

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start <= row < stop`` of axis 0, as `read` would give them; no others are read.

        Raises:
            IndexError: the rows are not within the tensor.
            CheckpointError: as in `read`.
        """
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}:{stop} of a tensor of shape {self.shape}")
        return self._readable(start, stop)

    def _readable(self, start: int, stop: int) -> NDArray[Any]:
        if self.dtype not in READABLE:
            raise CheckpointError(
                f"a tensor of dtype {self.dtype} cannot be read; use a checkpoint in bfloat16, float16 or "
                "float32"
            )
        return self._rows(start, stop)

    @abstractmethod
    def _rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows of a readable tensor; a scalar is one row."""


class Checkpoint(dict[str, TensorHandle]):
    """Tensor handles by name.

    Attributes:
        source: path or ``hf://`` address.
        metadata: what the file says besides tensors, as plain data.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorHandle],
        *,
        source: str,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.source, self.metadata = source, dict(metadata or {})

    def __repr__(self) -> str:
        return f"<Checkpoint of {len(self)} tensors from {self.source}>"


def select(checkpoint: Checkpoint, rename: Callable[[str], str | None]) -> Checkpoint:
    """A view under other names, None for tensors to leave out; CheckpointError: two get the same name."""
    origin: dict[str, str] = {}
    for name in checkpoint:
        if (new := rename(name)) is None:
            continue
        if new in origin:
            raise CheckpointError(
                f"{checkpoint.source} holds '{origin[new]}' and '{name}', which both mean '{new}'; "
                "use a checkpoint of a single model"
            )
        origin[new] = name
    tensors = {new: checkpoint[name] for new, name in origin.items()}
    return Checkpoint(tensors, source=checkpoint.source, metadata=checkpoint.metadata)


def check(checkpoint: Checkpoint, expected: Mapping[str, Shape], also: Sequence[str] = ()) -> None:
    """Compare names, shapes and dtypes with what a model needs; nothing is read.

    The checkpoint's names are the model's (see `select`). ``also``: dtypes beside those of weights.

    Raises:
        CheckpointError: any tensor is missing, extra, wrongly shaped or of an unusable dtype. One error
            lists them all; tensors that differ only in their numbers (layers) share a line with a count.
    """
    held = {name: (checkpoint[name], shape) for name, shape in expected.items() if name in checkpoint}
    dtypes = (*WEIGHT_DTYPES, *also)
    found = {
        "missing": [(name, f"{list(shape)}") for name, shape in expected.items() if name not in held],
        "extra": [(name, f"{list(tensor.shape)}") for name, tensor in checkpoint.items() if name not in held],
        "wrong shape": [
            (name, f"expected {list(shape)}, found {list(tensor.shape)}")
            for name, (tensor, shape) in held.items()
            if tensor.shape != tuple(shape)
        ],
        "unusable dtype": [
            (name, f"expected one of {', '.join(dtypes)}, found {tensor.dtype}")
            for name, (tensor, _) in held.items()
            if tensor.dtype not in dtypes
        ],
    }
    problems = {kind: entries for kind, entries in found.items() if entries}
    if problems:
        counts = ", ".join(f"{len(entries)} {kind}" for kind, entries in problems.items())
        lines = [f"{checkpoint.source} does not fit the model: {counts}"]
        for kind, entries in problems.items():
            lines += [f"  {kind}: {line}" for line in _abbreviate(entries)]
        remedy = "Check that the model name and size are those of the checkpoint."
        if is_shard(checkpoint.source):
            remedy = "The file is one part of a set: give their folder, or the index, NAME.index.json."
        elif prefix := _prefix(checkpoint, expected):
            remedy = (
                f"Its names begin with '{prefix}', as those of a module around the model: save them without."
            )
        elif not held:
            remedy = "No expected name is there: this is another model family or another part of the model."
        elif problems.keys() == {"unusable dtype"}:
            remedy = "Use the original checkpoint, or convert these tensors to bfloat16, float16 or float32."
        raise CheckpointError("\n".join([*lines, remedy]))


def _prefix(checkpoint: Checkpoint, expected: Mapping[str, Shape]) -> str:
    """What stands ahead of every expected name in a checkpoint; nothing where names are others."""
    first = next(iter(expected), "")
    ahead = [name.removesuffix(first) for name in checkpoint if name.endswith("." + first)]
    return next((prefix for prefix in ahead if all(prefix + name in checkpoint for name in expected)), "")


def _abbreviate(entries: Iterable[tuple[str, str]]) -> list[str]:
    """One line for all names that differ only in their numbers, at most `_LINES_PER_KIND` lines."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, detail in entries:
        groups.setdefault((re.sub(r"\d+", "*", name), detail), []).append(name)
    lines = [
        f"{names[0]} {detail}" if len(names) == 1 else f"{pattern} {detail} ({len(names)} tensors)"
        for (pattern, detail), names in groups.items()
    ]
    rest = sum(map(len, list(groups.values())[_LINES_PER_KIND:]))
    return [*lines[:_LINES_PER_KIND], *([f"... and {rest} more tensors"] if rest else [])]


def initial_moments(name: str, shape: Shape) -> tuple[float, float]:
    """Mean and standard deviation that keep activations finite and of order one.

    Matrices and convolutions have ``1 / sqrt(fan_in)`` around 0, biases are 0, other vectors and scalars 1.
    """
    if len(shape) >= 2:
        return 0.0, 1.0 / math.sqrt(max(1, math.prod(shape[1:])))
    return 0.0 if name.endswith("bias") else 1.0, 0.0


class RandomCheckpoint(Checkpoint):
    """A checkpoint whose float32 tensors are a function of (seed, name, element index) alone.

    Order of reading, chunk sizes and the NumPy version make no difference: elements are uniform 16-bit
    draws of the counter-based generator Philox4x64-10 (Salmon et al., 2011), scaled to `initial_moments`.
    """

    def __init__(self, expected: Mapping[str, Shape], *, seed: int) -> None:
        tensors = {}
        for name, shape in expected.items():
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
            moments = initial_moments(name, tuple(shape))
            tensors[name] = RandomTensor(tuple(shape), "float32", int.from_bytes(digest, "little"), *moments)
        super().__init__(tensors, source=f"random weights, seed {seed}")


@dataclass(frozen=True)
class RandomTensor(TensorHandle):
    """A tensor generated on reading from a 128-bit Philox key; memory is that of the rows read."""

    key: int
    mean: float
    deviation: float

    def _rows(self, start: int, stop: int) -> NDArray[Any]:
        row = math.prod(self.shape[1:])
        values = np.full((stop - start) * row, self.mean, np.float32)
        if self.deviation:
            for first in range(start * row, stop * row, _CHUNK):
                last = min(first + _CHUNK, stop * row)
                values[first - start * row : last - start * row] += self._deviations(first, last)
        return values.reshape(stop - start, *self.shape[1:])

    def _deviations(self, start: int, stop: int) -> NDArray[np.float32]:
        counter, skipped = divmod(start, _PER_COUNTER)
        words = math.ceil((stop - start + skipped) / 4)
        raw = np.random.Philox(key=self.key, counter=counter).random_raw(words)
        draws = raw.astype("<u8", copy=False).view("<i2")[skipped : skipped + stop - start]
        # (integer + 1/2) / 2^15 is uniform on (-1, 1), symmetric, with standard deviation 1 / sqrt(3).
        scale = np.float32(self.deviation * math.sqrt(3.0) / 2**15)
        return (draws.astype(np.float32) + np.float32(0.5)) * scale


@dataclass(frozen=True)
class SafeTensor(TensorHandle):
    """A tensor of a file, which is mapped for the time of a read, so that its pages go again."""

    file: Path
    name: str
    stamp: Stamp | None = None

    def _rows(self, start: int, stop: int) -> NDArray[Any]:
        if not self.size:
            return np.empty((stop - start, *self.shape[1:]), self.dtype)
        from safetensors import SafetensorError, safe_open

        with unchanged(self.file, self.stamp, f"'{self.name}'"):
            try:
                with safe_open(self.file, framework="np") as tensors:
                    whole = stop - start == (self.shape or (1,))[0]
                    rows = (
                        tensors.get_tensor(self.name) if whole else tensors.get_slice(self.name)[start:stop]
                    )
            except SafetensorError as error:
                raise ValueError(str(error)) from error
        return np.asarray(rows)


def read_safetensors(path: Path) -> Checkpoint:
    """Open one safetensors file by its header; ``metadata`` is its ``__metadata__``, strings by name.

    Raises:
        CheckpointError: the file is cut short, or its header is malformed or lies.
    """
    safetensors = require("safetensors", extra="export", purpose="read safetensors checkpoints")
    seen = stamp(path)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            parts = {name: file.get_slice(name) for name in sorted(file.keys())}
            metadata = file.metadata()
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} is cut short or is not a safetensors file: its {path.stat().st_size} bytes do not fit "
            f"its header ({error}); download it again"
        ) from error
    tensors = {
        name: SafeTensor(
            tuple(part.get_shape()), _DTYPES.get(code := part.get_dtype(), code), path, name, seen
        )
        for name, part in parts.items()
    }
    return Checkpoint(tensors, source=str(path), metadata=metadata)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, and strings that are told of them; UsageError: the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_file(path) as partial, usual_rights(partial):
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        except SafetensorError as error:
            raise UsageError(
                f"{path} cannot be written: {error}; free some space or choose another place"
            ) from error
