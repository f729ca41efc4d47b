"""Masks, orders and programs written as code on a command line: parsed by a whitelist, never evaluated as Python."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from . import masks, orders, programs
from .masks import Mask
from .orders import Order
from .programs import Program

# `from_mod` takes a Python function, which text cannot name.
_NOT_CALLED = {"And", "Full", "Mask", "Not", "OFFSET_RULES", "Or", "Padding", "Tiles", "conjunction", "conjuncts", "from_mod"}
NAMES: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(masks, name) for name in masks.__all__ if name not in _NOT_CALLED},
    **{each.__name__: each for each in (orders.identity, orders.residue, orders.hilbert)},
    **{each.__name__: each for each in (programs.Branch, programs.Program)},
    **{each.__name__: each for each in (programs.longnet, programs.local_window, programs.hilbert_window, programs.block_sparse)},
}
_MOST_CHARACTERS = 10_000
_MOST_DEPTH = 50
_SHOWN_CHARACTERS = 100


class ExpressionError(ValueError):
    """Text that is no program, mask or order; the message shows where and why."""


def read_program(text: str) -> Program:
    """The program that the text writes; a mask is a program of one branch. ExpressionError if it is neither.

    >>> read_program("causal() & window(256)")
    Program((Branch(causal() & window(256)),))
    """
    value = _value(text)
    if not isinstance(value, (Program, Mask)):
        raise ExpressionError(f"{text!r} is {_kind(value)}, and a program or a mask is needed, such as causal() & window(256)")
    return programs.as_program(value)


def read_order(text: str) -> Order:
    """The order that the text writes. ExpressionError if it is none.

    >>> read_order("hilbert(64, 64)")
    hilbert(64, 64)
    """
    value = _value(text)
    if not isinstance(value, Order):
        raise ExpressionError(f"{text!r} is {_kind(value)}, and an order is needed: identity(), residue(4) or hilbert(64, 64)")
    return value


def _kind(value: object) -> str:
    kinds = {Mask: "a mask", Program: "a program", Order: "an order", programs.Branch: "a branch; write Program((Branch(...),))"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), f"the {type(value).__name__} {value!r}")


def _value(text: str) -> Any:
    if len(text) > _MOST_CHARACTERS:
        raise ExpressionError(f"an expression may have {_MOST_CHARACTERS:,} characters; got {len(text):,}")
    line = text.replace("\n", " ").strip()
    try:
        tree = ast.parse(line, mode="eval").body
    except SyntaxError as error:
        raise ExpressionError(f"{error.msg}{_pointer(line, (error.offset or 1) - 1)}") from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise ExpressionError(f"the expression cannot be parsed: {str(error) or 'it is nested too deep'}") from None
    return _Reader(line).read(tree)


def _pointer(text: str, column: int) -> str:
    """The text with a mark below a column; a long one cut to what is around it."""
    first = max(0, column - _SHOWN_CHARACTERS // 2)
    return f"\n  {text[first : first + _SHOWN_CHARACTERS]}\n  {' ' * (column - first)}^"


class _Reader:
    """Builds values from a syntax tree: calls of known names, literals, `&`, `|`, `~`, and nothing else."""

    def __init__(self, text: str) -> None:
        self.text = text

    def read(self, node: ast.expr, depth: int = 0) -> Any:
        if depth > _MOST_DEPTH:
            raise self.error(node, f"the expression is nested more than {_MOST_DEPTH} deep")
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
                return self.joined(node, lambda a: ~a, operand, depth=depth)
            case ast.BinOp(op=ast.BitAnd(), left=left, right=right):
                return self.joined(node, lambda a, b: a & b, left, right, depth=depth)
            case ast.BinOp(op=ast.BitOr(), left=left, right=right):
                return self.joined(node, lambda a, b: a | b, left, right, depth=depth)
            case ast.Call(func=ast.Name(id=name)):
                return self.call(node, name, depth)
            case ast.Name(id=name) if name in NAMES:
                raise self.error(node, f"{name} is a function; write {name}(...)")
            case ast.Name(id=name):
                raise self.error(node, _unknown(name))
            case ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
                raise self.error(node, "masks are joined by `&`, `|` and `~`, not by `and`, `or` and `not`")
        raise self.error(node, "only calls of masks, orders and programs, literals, `&`, `|` and `~` can stand here")

    def joined(self, node: ast.expr, operator: Callable[..., Any], *operands: ast.expr, depth: int) -> Any:
        values = [self.read(operand, depth + 1) for operand in operands]
        for operand, value in zip(operands, values, strict=True):
            if not isinstance(value, Mask):
                raise self.error(operand, f"`&`, `|` and `~` join masks; this is {_kind(value)}")
        return operator(*values)

    def call(self, node: ast.Call, name: str, depth: int) -> Any:
        if name not in NAMES:
            raise self.error(node, _unknown(name))
        if any(isinstance(each, ast.Starred) for each in node.args) or any(each.arg is None for each in node.keywords):
            raise self.error(node, "`*` and `**` cannot stand here; write the arguments out")
        positional = [self.read(each, depth + 1) for each in node.args]
        named = {each.arg: self.read(each.value, depth + 1) for each in node.keywords if each.arg}
        try:
            return NAMES[name](*positional, **named)
        except (TypeError, ValueError) as error:
            raise self.error(node, str(error)) from None

    def error(self, node: ast.expr, message: str) -> ExpressionError:
        column = len(self.text.encode()[: node.col_offset].decode())  # ast counts bytes of UTF-8
        return ExpressionError(f"{message}{_pointer(self.text, column)}")


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"; did you mean {near[0]}?" if near else f". Known: {', '.join(sorted(NAMES))}"
    return f"no mask, order or program is called {name!r}{hint}"
