"""Python literals of recorded actions, read without running anything."""

from __future__ import annotations

import ast
import warnings

MAX_LENGTH = 10_000
"""Longest line; an action is far shorter."""


def parse_literal(text: str) -> object:
    """The value of a literal made of dicts, lists, numbers, strings and ``array([...])``, which is its list.

    Released MineWorld clips hold their actions so: ``{'forward': 1, 'camera': array([0, 1])}``.

    Raises:
        ValueError: it is anything else.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"it has {len(text)} characters, an action has at most {MAX_LENGTH}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"it is no Python literal ({error})") from error


def _value(node: ast.expr | None) -> object:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_value(part) for part in parts]
        case ast.Dict(keys=keys, values=values):
            names = [str(_value(key)) for key in keys]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"'{twice[0]}' is given twice")
            return dict(zip(names, map(_value, values), strict=True))
        case ast.Call(func=ast.Name(id="array"), args=[ast.List() as numbers], keywords=[]):
            return _value(numbers)
        case ast.Call(
            func=ast.Name(id="array"), args=[ast.List() as numbers], keywords=[ast.keyword(arg="dtype")]
        ):
            return _value(numbers)
    raise ValueError(
        f"'{ast.unparse(node) if node else '**'}' is neither a dict, a list, a number nor a string"
    )
