"""Objects of a restricted unpickling as plain data: dicts, lists, strings, numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

from diagd.export.checkpoints.restricted_pickle import DType, Opaque, StoredTensor

_DEPTH_LIMIT = 32
_NODE_LIMIT = 100_000
_CUT = "..."

T = TypeVar("T")


def plain(value: object) -> object:
    """Copy a value into dicts with string keys, lists, strings, numbers, booleans and None.

    An instance of a foreign class becomes its attributes, with its class under ``__class__`` and, where
    there are any, constructor arguments under ``__args__``, mapping items under ``__items__``, list elements
    under ``__elements__`` and a state that is no dict under ``__state__``. A class itself becomes its dotted
    name, a tensor its dtype and shape. What lies deeper than 32 levels (cycles) or beyond 100,000 values
    becomes ``"..."``.
    """
    return _Copier().copy(value, _DEPTH_LIMIT)


class _Copier:
    def __init__(self) -> None:
        self._nodes_left = _NODE_LIMIT

    def copy(self, value: object, depth: int) -> object:
        self._nodes_left -= 1
        if depth == 0 or self._nodes_left < 0:
            return _CUT
        if isinstance(value, Opaque):
            return self._attributes(value, depth - 1)
        if isinstance(value, dict):
            return self._pairs(value.items(), depth - 1)
        if isinstance(value, list | tuple | set | frozenset) and not isinstance(value, StoredTensor | DType):
            return [self.copy(item, depth - 1) for item in self._within_limit(value)]
        return _leaf(value)

    def _attributes(self, value: Opaque, depth: int) -> dict[str, object]:
        fields: dict[str, object] = {"__class__": value.global_name}
        if value.args:
            fields["__args__"] = self.copy(value.args, depth)
        if value.items:
            fields["__items__"] = self._pairs(value.items, depth)
        if value.elements:
            fields["__elements__"] = self.copy(value.elements, depth)
        if isinstance(value.state, dict):
            fields |= self._pairs(value.state.items(), depth)
        elif value.state is not None:
            fields["__state__"] = self.copy(value.state, depth)
        return fields

    def _pairs(self, pairs: Iterable[tuple[object, object]], depth: int) -> dict[str, object]:
        return {
            key if isinstance(key, str) else str(self.copy(key, 1)): self.copy(item, depth)
            for key, item in self._within_limit(pairs)
        }

    def _within_limit(self, values: Iterable[T]) -> Iterator[T]:
        return itertools.takewhile(lambda _: self._nodes_left > 0, values)


def _leaf(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, StoredTensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, DType):
        return value.name
    if isinstance(value, type) and issubclass(value, Opaque):
        return value.global_name
    return repr(value)[:200]
