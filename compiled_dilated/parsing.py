"""Values of expressions: calls of named functions, literals, `&`, `|` and `~`.

An expression is parsed by a whitelist, never evaluated as Python.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from .masks import Mask
from .orders import Order
from .programs import Branch, Program

_MOST_CHARACTERS, _MOST_DEPTH = 10_000, 50
_SHOWN_CHARACTERS = 100


class ExpressionError(ValueError):
    """Text that is no program, mask or order, with place and reason."""


def value_of(
    text: str,
    names: Mapping[str, Callable[..., Any]],
    most_characters: int = _MOST_CHARACTERS,
    most_depth: int = _MOST_DEPTH,
) -> Any:
    """The value of an expression.

    names: the functions that it may call.
    most_characters, most_depth: limits of the text and of its nesting.
    """
    if len(text) > most_characters:
        raise ExpressionError(
            f"an expression may have {most_characters:,} characters; got {len(text):,}"
        )
    line = text.replace("\n", " ").strip()
    try:
        tree = ast.parse(line, mode="eval").body
    except SyntaxError as error:
        raise ExpressionError(f"{error.msg}{_pointer(line, (error.offset or 1) - 1)}") from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise ExpressionError(
            f"the expression cannot be parsed: {str(error) or 'it is nested too deep'}"
        ) from None
    return _Reader(line, names, most_depth).read(tree)


def kind(value: object) -> str:
    """The kind of a value, for errors."""
    kinds = {
        Mask: "a mask",
        Program: "a program",
        Order: "an order",
        Branch: "a branch; write Program((Branch(...),))",
    }
    for of_kind, name in kinds.items():
        if isinstance(value, of_kind):
            return name
    return f"the {type(value).__name__} {value!r}"


def _pointer(text: str, column: int) -> str:
    """The text around a column, with a mark below it."""
    first = max(0, column - _SHOWN_CHARACTERS // 2)
    return f"\n  {text[first : first + _SHOWN_CHARACTERS]}\n  {' ' * (column - first)}^"


class _Reader:
    """Builds values from a syntax tree.

    It accepts calls of `names`, literals, `&`, `|` and `~`.
    """

    def __init__(self, text: str, names: Mapping[str, Callable[..., Any]], most_depth: int) -> None:
        self.text, self.names, self.most_depth = text, names, most_depth

    def read(self, node: ast.expr, depth: int = 0) -> Any:
        """The value of a node."""
        if depth > self.most_depth:
            raise self.error(node, f"the expression is nested more than {self.most_depth} deep")
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return node.value
            case ast.Tuple(elts=items):
                return tuple(self.read(item, depth + 1) for item in items)
            case ast.List(elts=items):
                return [self.read(item, depth + 1) for item in items]
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return self.joined(lambda a: ~a, operand, depth=depth)
            case ast.BinOp(op=ast.BitAnd(), left=left, right=right):
                return self.joined(lambda a, b: a & b, left, right, depth=depth)
            case ast.BinOp(op=ast.BitOr(), left=left, right=right):
                return self.joined(lambda a, b: a | b, left, right, depth=depth)
            case ast.Call(func=ast.Name(id=name)):
                return self.call(node, name, depth)
            case ast.Name(id=name) if name in self.names:
                raise self.error(node, f"{name} is a function; write {name}(...)")
            case ast.Name(id=name):
                raise self.error(node, _unknown(name, self.names))
            case ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
                message = "masks are joined by `&`, `|` and `~`, not by `and`, `or` and `not`"
                raise self.error(node, message)
        message = (
            "only calls of masks, orders and programs, literals, `&`, `|` and `~` can stand here"
        )
        raise self.error(node, message)

    def joined(self, operator: Callable[..., Any], *operands: ast.expr, depth: int) -> Any:
        """The operator applied to the masks of its operands."""
        values = [self.read(operand, depth + 1) for operand in operands]
        for operand, value in zip(operands, values, strict=True):
            if not isinstance(value, Mask):
                raise self.error(operand, f"`&`, `|` and `~` join masks; this is {kind(value)}")
        return operator(*values)

    def call(self, node: ast.Call, name: str, depth: int) -> Any:
        """The result of a call, whose errors point to its text."""
        if name not in self.names:
            raise self.error(node, _unknown(name, self.names))
        starred = "`*` and `**` cannot stand here; write the arguments out"
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                raise self.error(node, starred)
            positional.append(self.read(argument, depth + 1))
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.error(node, starred)
            named[keyword.arg] = self.read(keyword.value, depth + 1)
        try:
            return self.names[name](*positional, **named)
        except (TypeError, ValueError) as error:
            raise self.error(node, str(error)) from None

    def error(self, node: ast.expr, message: str) -> ExpressionError:
        """The message, with the text and a mark below the node."""
        column = len(self.text.encode()[: node.col_offset].decode())  # ast counts bytes of UTF-8
        return ExpressionError(f"{message}{_pointer(self.text, column)}")


def _unknown(name: str, names: Mapping[str, Any]) -> str:
    """The message for an unknown name, with a similar one or all."""
    hint = f". Known: {', '.join(sorted(names))}"
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        hint = f"; did you mean {near[0]}?"
    return f"no mask, order or program is called {name!r}{hint}"
