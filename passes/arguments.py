"""Checks of arguments.

Errors name the argument, the value, what was expected, what to do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Operators take 64-bit integers, and figures are printed as floats: no count may be larger.
MOST = 2**63 - 1
# Numbers above it may not convert to a float.
_HUGE = 1e300
# Characters of a value in a message.
_WIDEST = 100


def shown(value: object) -> str:
    """Format a value as code for a message, truncated.

    Tensors and modules appear by their kind.
    """
    if isinstance(value, Tensor):
        if value.is_nested:
            return "a nested tensor"
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # an int of more than a few thousand digits, perhaps in a list
        return f"one of type {type(value).__name__} that is too long to print"
    if len(text) > _WIDEST:
        return f"{text[:_WIDEST]}... ({len(text)} characters)"
    return text


def whole(name: str, value: object, least: int) -> None:
    """Raise TypeError or ValueError unless `value` is an int in range.

    least: the smallest value allowed; the largest is 2**63 - 1
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be a whole number; got {type(value).__name__} {shown(value)}. Pass an int"
        )
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {shown(value)}")
    if value > MOST:
        raise ValueError(f"{name} must be at most 2**63 - 1; got {shown(value)}")


def rate(name: str, value: object, *, zero: bool) -> None:
    """Raise ValueError unless `value` is a finite number above 0.

    zero: 0 is allowed too
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        is_large_enough = value > 0 or (zero and value == 0)
        if is_large_enough and value < _HUGE:
            return
    least = "at least 0" if zero else "above 0"
    raise ValueError(f"{name} must be a finite number, {least}; got {shown(value)}")


def flag(name: str, value: object, *, or_none: bool = False) -> None:
    """Raise TypeError unless `value` is a bool.

    or_none: None is allowed too
    """
    if isinstance(value, bool) or (or_none and value is None):
        return
    expected = "True, False or None" if or_none else "True or False"
    raise TypeError(f"{name} must be {expected}; got {type(value).__name__} {shown(value)}")


def sequence(name: str, value: object, of: str) -> Sequence[Any]:
    """Return a tuple or a list; raise TypeError for anything else.

    of: what its members are, for the message
    """
    if not isinstance(value, tuple | list):
        raise TypeError(
            f"{name} must be a tuple or a list of {of}; got {shown(value)}. "
            "For one, write [...] around it"
        )
    return value


def function(name: str, value: object) -> None:
    """Raise TypeError unless `value` is callable."""
    if not callable(value):
        raise TypeError(f"{name} must be a function; got {type(value).__name__} {shown(value)}")


def kind(name: str, value: object, expected: type, hint: str) -> None:
    """Raise TypeError unless `value` is of a class.

    hint: what to do, without a full stop
    """
    if not isinstance(value, expected):
        raise TypeError(
            f"{name} must be a {expected.__name__}; "
            f"got {type(value).__name__} {shown(value)}. {hint}"
        )


def model(value: object) -> None:
    """Raise TypeError unless `value` is a module or a function."""
    if isinstance(value, type):
        description = f"the class {value.__name__}"
    elif callable(value):
        return
    else:
        description = f"{type(value).__name__} {shown(value)}"
    raise TypeError(
        f"model must be a torch.nn.Module or a function; got {description}. "
        "Make or load the model first"
    )


def inputs(name: str, value: object, model: Callable[..., Any] | None = None) -> tuple[Any, ...]:
    """Return a model's inputs as a tuple.

    Raises TypeError if they are no tuple or list (one tensor is not), or a tensor in them is nested
    or sparse; ValueError if the model's signature does not take as many.
    """
    result = tuple(sequence(name, value, "inputs of the model"))
    for place, tensor in enumerate(result):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_nested:
            layout = "a nested one"
        elif tensor.layout != torch.strided:
            layout = f"one of layout {tensor.layout}"
        else:
            continue
        raise TypeError(
            f"{name}[{place}] must be a dense tensor; got {layout}. Pass its dense form"
        )
    if model is not None:
        _check_signature(name, model, result)
    return result


def _check_signature(name: str, model: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    """Raise ValueError if a model cannot be called with so many inputs."""
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):  # a builtin function has no signature, and checks itself
        return
    try:
        signature.bind(*inputs)
    except TypeError as error:
        raise ValueError(
            f"{name} must be what the model takes, {signature}; got {len(inputs)} inputs: {error}"
        ) from None


def sizes(value: object) -> Mapping[str, int]:
    """Return values of symbols, {} for None.

    Raises TypeError or ValueError for anything else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError(
            "sizes must be a mapping of symbols' names to ints, as {'s77': 4096}; "
            f"got {shown(value)}"
        )
    for name, size in value.items():
        whole(f"sizes[{name!r}]", size, 0)
    return value


def names(name: str, value: object) -> frozenset[str]:
    """Return names of nodes as a set.

    Raises TypeError for a single name, and for what is no string.
    """
    if isinstance(value, tuple | list | set | frozenset) and all(
        isinstance(member, str) for member in value
    ):
        return frozenset(value)
    raise TypeError(
        f"{name} must be a list or a set of nodes' names; got {shown(value)}. "
        "For one, write [...] around it"
    )
