"""An unpickler that builds tensor descriptions and plain containers, and can run nothing.

A pickle names functions and classes to call. Only the functions with which PyTorch rebuilds tensors resolve
to code, and that code (below) only fills in tuples. Every other name resolves to an inert class that records
how it was called. Names whose sole use would be to run something are refused outright.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from diagd.errors import CheckpointError

_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "UntypedStorage": "untyped",
}
_DTYPE_PREFIXES = ("float", "bfloat", "int", "uint", "bool", "complex", "qint", "quint")
_RUNNERS = {
    *("os", "posix", "nt", "subprocess", "commands", "shutil", "pty"),
    *("sys", "importlib", "runpy", "ctypes", "socket"),
}
_BUILTIN_RUNNERS = {
    *("eval", "exec", "execfile", "compile", "__import__"),
    *("open", "FileIO", "input", "breakpoint"),
}


class DType(NamedTuple):
    """A PyTorch dtype, or the dtype of a typed storage."""

    name: str


class Storage(NamedTuple):
    """A storage that tensors share.

    Attributes:
        key: name of its member under ``data/``.
        dtype: dtype of its elements, ``untyped`` where each tensor says so itself.
    """

    key: str
    dtype: str


class StoredTensor(NamedTuple):
    """A tensor as the pickle describes it; nothing is checked yet.

    Attributes:
        storage: key of its storage.
        dtype: name such as ``float32``.
        offset: first element within the storage.
        shape: size of each axis.
        strides: elements between neighbours along each axis.
    """

    storage: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Opaque:
    """An instance of a class that is not known here: what it was made of, and no behaviour.

    Attributes:
        global_name: dotted name of the class or function.
        args: positional arguments it was called with.
        state: what would have become its attributes, usually a dict.
        items: key-value pairs set, in order.
        elements: values appended, in order.
    """

    global_name: ClassVar[str] = ""
    args: tuple[object, ...]
    state: object
    items: list[tuple[object, object]]
    elements: list[object]

    def __new__(cls, *args: object, **keywords: object) -> Opaque:
        """Record the arguments."""
        self = super().__new__(cls)
        self.args = (*args, keywords) if keywords else args
        self.state = None
        self.items = []
        self.elements = []
        return self

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.items.append((key, value))

    def append(self, value: object) -> None:
        """Record an element, as a list subclass would be given it."""
        self.elements.append(value)

    add = append

    def extend(self, values: list[object]) -> None:
        """Record elements, as a list subclass would be given them."""
        self.elements.extend(values)


class _Dict(dict[Any, Any]):
    """An ordered dict whose attributes (`_metadata` of a state dict) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Call(NamedTuple):
    """A callable without attributes, so that no pickle can alter the function behind it."""

    function: Callable[..., object]

    def __call__(self, *args: object) -> object:
        return self.function(*args)


def load(pickled: bytes, *, source: str) -> object:
    """Unpickle a PyTorch archive's ``data.pkl`` as data.

    Returns:
        Plain containers and scalars, `StoredTensor` for tensors and `Opaque` for everything foreign
        (classes themselves are subclasses of `Opaque`).

    Raises:
        CheckpointError: the pickle is damaged, or names something that only runs code.
    """
    try:
        return _Unpickler(io.BytesIO(pickled), source).load()
    except CheckpointError:
        raise
    except Exception as error:
        # Whatever a hostile or damaged pickle provokes in the unpickler is one and the same finding.
        raise CheckpointError(
            f"{source} holds a damaged pickle ({type(error).__name__}: {error}); download it again"
        ) from error


class _Unpickler(pickle._Unpickler):
    # The one written in Python: the one in C sizes its memo by an index that the file chooses.
    def __init__(self, file: io.BytesIO, source: str) -> None:
        super().__init__(file)
        self._source = source
        self._opaque: dict[str, type[Opaque]] = {}

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}"
        if full in _ALLOWED:
            return _ALLOWED[full]
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return DType(_STORAGE_DTYPES[name])
        if module == "torch" and name.startswith(_DTYPE_PREFIXES):
            return DType(name)
        if _runs_code(module, name):
            raise CheckpointError(
                f"{self._source} asks to run '{full}', which no checkpoint needs: it may be malicious. "
                "Nothing was run; do not use this file, and download it again from where it was published"
            )
        if full not in self._opaque:
            self._opaque[full] = type("Opaque", (Opaque,), {"global_name": full})
        return self._opaque[full]

    def persistent_load(self, pid: object) -> Storage:
        match pid:
            case ("storage", DType(name=dtype), str(key), _, _):
                return Storage(key, dtype)
        raise pickle.UnpicklingError(f"unknown kind of storage {str(pid)[:80]}")


def _runs_code(module: str, name: str) -> bool:
    if module in ("builtins", "__builtin__", "io", "_io"):
        return name.partition(".")[0] in _BUILTIN_RUNNERS
    return module.partition(".")[0] in _RUNNERS


def _rebuild_tensor(
    storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
) -> StoredTensor:
    return StoredTensor(storage.key, storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_tensor_v2(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    _requires_grad: bool,
    _hooks: object,
    deferred: object = None,
) -> StoredTensor:
    tensor = _rebuild_tensor(storage, offset, shape, strides)
    # A view that is still to be negated or conjugated must not be taken for its stored values.
    return tensor._replace(dtype=f"{tensor.dtype} with deferred {deferred}") if deferred else tensor


def _rebuild_tensor_v3(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    _requires_grad: bool,
    _hooks: object,
    dtype: DType,
    deferred: object = None,
) -> StoredTensor:
    typed = Storage(storage.key, dtype.name)
    return _rebuild_tensor_v2(typed, offset, shape, strides, _requires_grad, _hooks, deferred)


def _rebuild_parameter(tensor: object, *_: object) -> object:
    return tensor


def _rebuild_from_type(function: object, _kind: object, args: tuple[object, ...], _state: object) -> object:
    return function(*args) if isinstance(function, _Call) else None


_ALLOWED = {
    "collections.OrderedDict": _Call(_Dict),
    "torch.Size": _Call(tuple),
    "torch._utils._rebuild_tensor": _Call(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Call(_rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v3": _Call(_rebuild_tensor_v3),
    "torch._utils._rebuild_qtensor": _Call(_rebuild_tensor),
    "torch._utils._rebuild_parameter": _Call(_rebuild_parameter),
    "torch._utils._rebuild_parameter_with_state": _Call(_rebuild_parameter),
    "torch._tensor._rebuild_from_type_v2": _Call(_rebuild_from_type),
    "torch.jit._pickle.restore_type_tag": _Call(_rebuild_parameter),
}
