"""The zip archive that `torch.save` and TorchScript write: a pickle and one stored member per storage."""

from __future__ import annotations

import struct
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from diagd.errors import CheckpointError
from diagd.export.checkpoints.restricted_pickle import StoredTensor, load
from diagd.export.checkpoints.tensors import (
    MappedTensor,
    TensorHandle,
    UnreadableTensor,
    is_readable,
    item_bytes,
    span_of,
)

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., name length, extra length


class TorchArchive:
    """An open PyTorch archive; a context manager. Handles it gave stay valid after it is closed.

    Raises:
        CheckpointError: the zip is cut short or damaged, or PyTorch did not write it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("rb")
        try:
            self._zip = ZipFile(self._file)
            self._root = self._find_root()
            self._check_byte_order()
        except BadZipFile as error:
            self._file.close()
            raise CheckpointError(
                f"{path} is cut short: it begins as a zip archive and ends after {path.stat().st_size} bytes "
                f"without a directory ({error}); download it again"
            ) from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TorchArchive:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def is_torchscript(self) -> bool:
        """Whether `torch.jit.save` wrote it: only that stores constants and code."""
        return self._root + "constants.pkl" in self._zip.NameToInfo

    def load(self) -> object:
        """The pickled object, its tensors as `StoredTensor` and foreign objects inert (see `load`)."""
        member = self._member("data.pkl")
        try:
            pickled = self._zip.read(member)
        except (BadZipFile, NotImplementedError, RuntimeError) as error:
            raise CheckpointError(f"{self.path} is damaged: {error}; download it again") from error
        return load(pickled, source=str(self.path))

    def tensor(self, name: str, stored: StoredTensor) -> TensorHandle:
        """Handle of a tensor that the pickle describes.

        Raises:
            CheckpointError: the description does not lie within its storage.
        """
        member = self._member(f"data/{stored.storage}")
        numbers = [stored.offset, *stored.shape, *stored.strides]
        if len(stored.shape) != len(stored.strides) or not all(
            type(number) is int and number >= 0 for number in numbers
        ):
            raise CheckpointError(
                f"{self.path} is damaged: tensor '{name}' has offset {stored.offset}, shape {stored.shape} "
                f"and strides {stored.strides}, expected non-negative integers; download it again"
            )
        if not is_readable(stored.dtype):
            return UnreadableTensor(stored.shape, stored.dtype, member.file_size)
        width = item_bytes(stored.dtype)
        span = span_of(stored.shape, stored.strides)
        end = (stored.offset + span) * width
        if span and end > member.file_size:
            raise CheckpointError(
                f"{self.path} describes tensor '{name}' up to byte {end} of a storage of {member.file_size} "
                "bytes: the file is damaged; download it again"
            )
        first = self._locate(member) + stored.offset * width
        return MappedTensor(stored.shape, stored.dtype, self.path, first, stored.strides)

    def _find_root(self) -> str:
        names = self._zip.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if f"/{name}".endswith("/data.pkl")]
        if not roots:
            held = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointError(
                f"{self.path} is a zip archive that PyTorch did not write: it holds {held or 'nothing'}, "
                "expected data.pkl; if the checkpoint is inside it, unpack it and pass the file"
            )
        return min(roots, key=len)

    def _check_byte_order(self) -> None:
        info = self._zip.NameToInfo.get(self._root + "byteorder")
        if info is not None and self._zip.read(info).strip() != b"little":
            raise CheckpointError(
                f"{self.path} was written by a big-endian machine; load and save it with PyTorch on this one"
            )

    def _member(self, name: str) -> ZipInfo:
        info = self._zip.NameToInfo.get(self._root + name)
        if info is None:
            raise CheckpointError(
                f"{self.path} lacks its part '{name}': the file is damaged; download it again"
            )
        if info.compress_type != ZIP_STORED:
            raise CheckpointError(
                f"{self.path} was compressed after PyTorch wrote it, so '{name}' cannot be mapped; use the "
                "original file, or load and save it with PyTorch"
            )
        return info

    def _locate(self, member: ZipInfo) -> int:
        """Byte of the file at which a stored member's content begins."""
        self._file.seek(member.header_offset)
        header = self._file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise CheckpointError(
                f"{self.path} is damaged at byte {member.header_offset}, where '{member.filename}' should "
                "begin; download it again"
            )
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        return member.header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)
