"""Reader of what PyTorch writes, `torch.save` and TorchScript: data only, nothing in a file is executed.

The pickle goes through the unpickler of ``torch.load(weights_only=True)``. Its storages are made on the meta
device, so that no tensor is read, and know where they lie by the directory of the archive: ``torch.load``
itself adds up the sizes that the pickle claims, which is wrong for an archive that was packed again.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import ml_dtypes  # noqa: F401  # teaches NumPy the name bfloat16
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._weights_only_unpickler import Unpickler, get_globals_in_pkl
from torch.serialization import safe_globals

from diagd.errors import CheckpointError
from diagd.export.checkpoints import Checkpoint, Shape, Stamp, TensorHandle, stamp, unchanged

_STATE_KEYS = ("state_dict", "model", "model_state_dict", "module")
"""Of Lightning (MineWorld, WHAM), Cosmos, PyTorch's tutorials, DeepSpeed."""
_ADVICE = "run torch.save(model.state_dict(), 'model.pt')"
_LATER_PROTOCOLS = (b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How pickles begin that `torch.save` writes where told to, and that no weights-only unpickler reads."""

_MODULE_LIMIT = 10_000
_METADATA_LIMIT = 100_000  # values
_METADATA_DEPTH = 32
_QUANTISED = (torch.qint8, torch.quint8, torch.qint32)
_RUNNERS = re.compile(
    r"(os|posix|nt|subprocess|commands|shutil|pty|sys|importlib|runpy|ctypes|socket)\b.*"
    r"|(builtins|__builtin__|_?io)\.(eval|exec|execfile|compile|__import__|open|FileIO|input|breakpoint)\b.*"
)
"""Names whose sole use in a pickle is to run something."""


@dataclass(frozen=True)
class MappedTensor(TensorHandle):
    """A tensor inside a file; each read maps only its own pages, which go when the array goes.

    ``offset``: byte of the first element. ``strides``: elements between neighbours along each axis, not
    negative.
    """

    file: Path
    offset: int
    strides: Shape
    stamp: Stamp | None = None

    def _rows(self, start: int, stop: int) -> NDArray[Any]:
        dtype = np.dtype(self.dtype)
        shape, strides = (stop - start, *self.shape[1:]), self.strides or (1,)
        if not (span := _span(shape, strides)):
            return np.empty(shape, dtype)
        first, size = self.offset + start * strides[0] * dtype.itemsize, span * dtype.itemsize
        with unchanged(self.file, self.stamp, f"{size} bytes at {first}"):
            stored = np.memmap(self.file, np.uint8, "r", first, (size,))
        steps = [step * dtype.itemsize for step in strides]
        return np.require(np.ndarray(shape, dtype, stored, strides=steps), None, ["C", "A"])


class Foreign(dict[object, object]):
    """An object of a class that is not known here: what it was made of, and no behaviour."""

    def __new__(cls, *args: object) -> Foreign:
        """Keep what the class would have been called with."""
        self = super().__new__(cls)
        if args:
            self["__args__"] = list(args)
        return self

    def __init__(self, *args: object) -> None:
        """Add nothing."""

    def __setstate__(self, state: object) -> None:
        self.update(state if isinstance(state, dict) else {"__state__": state})

    __hash__ = object.__hash__  # type: ignore[assignment]  # a foreign object may be a key


def read_torch(path: Path) -> Checkpoint:
    """Open a zip that PyTorch wrote: `torch.save` or TorchScript.

    Tensors are those under ``state_dict``, ``model``, ``model_state_dict`` or ``module`` where the pickle has
    such an entry, else those of the pickled dict itself, or the parameters and buffers of a TorchScript
    module. ``metadata`` holds ``hyper_parameters`` and the scalars beside ``state_dict`` (epoch, version) as
    plain data.

    Raises:
        CheckpointError: the file is damaged, compressed, hostile, or holds no dict of tensors.
    """
    try:
        archive = ZipFile(path)
    except (BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is cut short: it begins as a zip archive and ends after {path.stat().st_size} bytes "
            f"without a directory ({error}); download it again"
        ) from error
    with archive:
        reader = _Reader(path, archive)
        root = reader.load()
        module = reader.holds("constants.pkl")  # only `torch.jit.save` stores constants and code
        found = _module_tensors(root, path) if module else _state_dict(root, path)
        tensors = {name: reader.handle(name, tensor) for name, tensor in found.items()}
    if not tensors:
        raise CheckpointError(f"{path} holds no named tensors; expected the weights of a model")
    return Checkpoint(tensors, source=str(path), metadata=_metadata(root))


class _Reader(Unpickler):
    """The weights-only unpickler over one archive; a tensor's storage knows its byte of the file."""

    def __init__(self, path: Path, archive: ZipFile) -> None:
        self._path, self._archive, self._stamp = path, archive, stamp(path)
        names = archive.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if f"/{name}".endswith("/data.pkl")]
        if not roots:
            held = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointError(
                f"{path} is a zip archive that PyTorch did not write: it holds {held or 'nothing'}, expected "
                "data.pkl; if the checkpoint is inside it, unpack it and pass the file"
            )
        self._root = min(roots, key=len)
        if self.holds("byteorder") and self._content("byteorder").strip() != b"little":
            raise CheckpointError(
                f"{path} was written by a big-endian machine; load and save it with PyTorch on this one"
            )
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._bytes: dict[int | None, int] = {}
        super().__init__(io.BytesIO(self._content("data.pkl")), encoding="utf-8")

    def holds(self, name: str) -> bool:
        """Whether the archive has a part."""
        return self._root + name in self._archive.NameToInfo

    def load(self) -> object:
        """The pickled object: its tensors on the meta device, foreign objects inert."""
        try:
            names = sorted(get_globals_in_pkl(io.BytesIO(self._content("data.pkl"))))
            for name in filter(_RUNNERS.fullmatch, names):
                raise CheckpointError(
                    f"{self._path} asks to run '{name}', which no checkpoint needs: it may be malicious. "
                    "Nothing was run; do not use this file, and download it again from where it was published"
                )
            stubs: list[Any] = [(type(name, (Foreign,), {}), name) for name in names]
            with warnings.catch_warnings(), safe_globals(stubs):
                warnings.simplefilter("ignore")
                return super().load()  # type: ignore[no-untyped-call]
        except CheckpointError:
            raise
        except Exception as error:
            # Whatever a hostile or damaged pickle provokes in the unpickler is one and the same finding.
            advice = _ADVICE
            if self._content("data.pkl")[:2] in _LATER_PROTOCOLS:
                advice = "save it without pickle_protocol: PyTorch loads protocol 2 alone as data"
            raise CheckpointError(
                f"{self._path} holds a damaged pickle or one that PyTorch does not load as data alone "
                f"({type(error).__name__}: {str(error)[:200]}), so it may be malicious. Nothing was run; "
                f"download it again, or where its code is installed {advice}"
            ) from error

    def persistent_load(self, pid: Any) -> torch.storage.TypedStorage:
        """A storage on the meta device; a quantised one, which cannot be there, in memory never touched."""
        _, kind, key, _, count = pid
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        if key not in self._storages:
            device = "cpu" if dtype in _QUANTISED else "meta"
            storage = torch.UntypedStorage(count * dtype.itemsize, device=device)
            storage._checkpoint_offset, size = self._locate(f"data/{key}")
            self._bytes[storage._checkpoint_offset], self._storages[key] = size, storage
        return torch.storage.TypedStorage(wrap_storage=self._storages[key], dtype=dtype, _internal=True)

    def _check_set_item_target(self, opcode: str) -> None:
        if not isinstance(self.stack[-1], Foreign):
            super()._check_set_item_target(opcode)

    def handle(self, name: str, tensor: Tensor) -> MappedTensor:
        """Handle of a tensor; CheckpointError where it does not lie within its storage."""
        start, width = tensor.untyped_storage()._checkpoint_offset or 0, tensor.itemsize
        first = int(tensor.storage_offset()) * width
        span, size = _span(tensor.shape, tensor.stride()), self._bytes[start]
        end = first + span * width
        # of a damaged shape numel() overflows, which PyTorch for Windows does not refuse
        if min(tensor.shape, default=0) < 0 or (span and end > size):
            raise CheckpointError(
                f"{self._path} describes tensor '{name}' up to byte {end} of a storage of {size} bytes: the "
                "file is damaged; download it again"
            )
        dtype = _name(tensor.dtype)
        # A view that is still to be negated or conjugated must not be taken for its stored values.
        dtype += " (negated view)" * tensor.is_neg() + " (conjugated view)" * tensor.is_conj()
        place = self._path, start + first, tensor.stride(), self._stamp
        return MappedTensor(tuple(tensor.shape), dtype, *place)

    def _locate(self, name: str) -> tuple[int, int]:
        """Byte of the file at which a stored part begins, and its size."""
        info = self._archive.NameToInfo.get(self._root + name)
        if info is None:
            raise CheckpointError(
                f"{self._path} lacks its part '{name}': the file is damaged; download it again"
            )
        if info.compress_type != ZIP_STORED:
            raise CheckpointError(
                f"{self._path} was compressed after PyTorch wrote it, so '{name}' cannot be mapped; use the "
                "original file, or load and save it with PyTorch"
            )
        try:
            with self._archive.open(info):  # checks the header ahead of the content, and stops behind it
                return cast("IO[bytes]", self._archive.fp).tell(), info.file_size
        except (BadZipFile, NotImplementedError, RuntimeError) as error:
            raise CheckpointError(
                f"{self._path} is damaged at byte {info.header_offset}, where '{name}' should begin "
                f"({error}); download it again"
            ) from error

    def _content(self, name: str) -> bytes:
        self._locate(name)
        try:
            return self._archive.read(self._root + name)
        except (BadZipFile, EOFError) as error:
            raise CheckpointError(f"{self._path} is damaged: {error}; download it again") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _span(shape: Iterable[int], strides: Iterable[int]) -> int:
    """Elements from the first to the last one of a strided tensor, 0 when it is empty."""
    axes = list(zip(shape, strides, strict=True))
    return 0 if any(size == 0 for size, _ in axes) else 1 + sum((size - 1) * step for size, step in axes)


def _state_dict(root: object, path: Path) -> dict[str, Tensor]:
    """The tensors of the state dict, wherever it is."""
    if isinstance(root, Foreign) or not isinstance(root, dict):
        raise CheckpointError(
            f"{path} holds a pickled {type(root).__name__}, expected a dict of tensors; where its code is "
            f"installed, {_ADVICE}"
        )
    for key in _STATE_KEYS:
        if isinstance(root.get(key), dict):
            return _tensors(root[key])
    if found := _tensors(root):
        return found
    keys = ", ".join(str(key)[:40] for key in list(root)[:8])
    inside = [key for key, value in root.items() if isinstance(value, dict) and _tensors(value)]
    advice = f"; tensors are under '{inside[0]}': save that alone" if inside else ""
    raise CheckpointError(
        f"{path} holds no tensors at its top level nor under {' or '.join(_STATE_KEYS)}; "
        f"it has: {keys or 'nothing'}{advice}"
    )


def _module_tensors(root: object, path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript module, a tree of attributes, by their state-dict names.

    Buffers that were not persistent are included: TorchScript stores them as attributes like any other.
    """
    tensors: dict[str, Tensor] = {}
    modules = [("", root)]
    for visited, (prefix, module) in enumerate(modules):
        if visited == _MODULE_LIMIT:
            raise CheckpointError(
                f"{path} holds more than {_MODULE_LIMIT} modules: it is damaged; download it again"
            )
        if isinstance(module, Foreign):
            tensors |= {prefix + name: tensor for name, tensor in _tensors(module).items()}
            parts = [(f"{prefix}{name}.", part) for name, part in module.items() if isinstance(part, Foreign)]
            modules += parts
    return tensors


def _tensors(entries: dict[object, object]) -> dict[str, Tensor]:
    """Tensors by name whose numbers lie in the file; sparse ones, for example, have none to map."""
    return {
        name: value
        for name, value in entries.items()
        if isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.untyped_storage()._checkpoint_offset is not None
    }


def _metadata(root: object) -> dict[str, object]:
    if not isinstance(root, dict) or isinstance(root, Foreign):
        return {}
    return {
        str(key): plain(value)
        for key, value in root.items()
        if key == "hyper_parameters" or isinstance(value, bool | int | float | str)
    }


def plain(value: object, budget: Iterator[int] | None = None, depth: int = _METADATA_DEPTH) -> object:
    """Copy a value into dicts with string keys, lists, strings, numbers, booleans and None.

    A foreign object becomes its attributes and items, with its class under ``__class__`` and, where there
    are any, constructor arguments under ``__args__`` and a state that is no dict under ``__state__``. A class
    itself becomes its dotted name, a tensor its dtype and shape. What lies deeper than 32 levels (cycles) or
    beyond 100,000 values becomes ``"..."``.
    """
    budget = iter(range(_METADATA_LIMIT)) if budget is None else budget
    if next(budget, None) is None or depth == 0:
        return "..."
    if isinstance(value, dict):
        kind = {"__class__": type(value).__name__} if isinstance(value, Foreign) else {}
        return kind | {
            key if isinstance(key, str) else str(plain(key, budget, 1)): plain(item, budget, depth - 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, budget, depth - 1) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return f"{_name(value.dtype)} {list(value.shape)}"
    return value.__name__ if isinstance(value, type) else repr(value)[:200]
