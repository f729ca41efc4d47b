"""Checks of users' arguments.

An error names the argument, what came, what was expected and what to do.
"""

from __future__ import annotations

import operator
from typing import Any

# The limit of positions, lengths and counts: sums of a few of them fit an int64.
MOST = 2**60

# Characters of a value in a message.
_WIDEST = 100

# The supported dtypes of attention, with bytes per element.
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def integer(name: str, value: object, least: int | None = None) -> int:
    """`value` as an int between `least` and MOST.

    numpy and torch integers are accepted; bool, float and str are refused.
    """
    # operator.index would turn a symbolic number of torch.compile into a constant.
    number = value if type(value) is int else _index(name, value)
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}; got {shown(number)}")
    if not -MOST <= number <= MOST:
        raise ValueError(
            f"{name} must be at most 2**60, so that positions fit 64 bits; got {shown(number)}"
        )
    return number


def _index(name: str, value: object) -> int:
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", None)) == "torch.bool":
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name} must be an integer; got {kind_and_text(value)}. Pass a whole number of tokens"
        ) from None


def kind_and_text(value: object) -> str:
    """The type and the text of a value, for a message."""
    kind = type(value).__name__
    shape = _shape_of(value)
    if shape is not None:
        return f"{kind} of shape {shape}"
    return f"{kind} {shown(value)}"


def shown(value: object) -> str:
    """A value as code for a message, shortened; arrays by their shape."""
    shape = _shape_of(value)
    if shape is not None:
        return f"a {type(value).__name__} of shape {shape}"
    # Python refuses to print numbers of thousands of digits.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # such a number in a list
        return "one that is too long to print"
    if len(text) > _WIDEST:
        return f"{text[:_WIDEST]}... ({len(text):,} characters)"
    return text


def _shape_of(value: object) -> tuple[int, ...] | None:
    """The shape of an array of numbers; None for other values."""
    if getattr(value, "is_nested", False):  # which has no shape
        return None
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return tuple(shape)
    return None


def is_iterable(value: object) -> bool:
    """Whether a value can be iterated; False for 0-d tensors and arrays."""
    return hasattr(value, "__iter__") and getattr(value, "ndim", 1) != 0


def integers(name: str, values: Any, least: int | None = None) -> tuple[int, ...]:
    """A non-empty sequence of integers as a tuple."""
    if isinstance(values, (str, bytes)) or not is_iterable(values):
        raise TypeError(
            f"{name} must be a sequence of integers; got {kind_and_text(values)}. "
            f"Write a tuple, as in ({shown(values)},)"
        )
    out = tuple(integer(f"{name}[{i}]", value, least) for i, value in enumerate(values))
    if not out:
        raise ValueError(f"{name} is empty; pass at least one integer")
    return out


def choice(name: str, value: object, options: tuple[str, ...]) -> str:
    """One of `options`."""
    if not isinstance(value, str) or value not in options:
        names = ", ".join(map(repr, options))
        raise ValueError(f"{name} must be one of {names}; got {shown(value)}")
    return value


def flag(name: str, value: object) -> bool:
    """A bool; 0, 1 and "yes" are refused."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {kind_and_text(value)}")
    return value
