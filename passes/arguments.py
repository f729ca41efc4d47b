"""Checks of what callers pass: one error that names the argument, what came, what was expected and what to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Operators take 64-bit integers, and figures are printed as floats: nothing counted here is larger.
MOST = 2**63 - 1
# Above it an int is no float any more.
_HUGE = 1e300
_WIDEST = 100


def shown(value: object) -> str:
    """A value as code for a message, cut where it is long; tensors and modules by their kind."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if not value.is_nested else "a nested tensor"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # Python writes no int of more than a few thousand digits, in a list neither
        return f"one of type {type(value).__name__} that is too long to print"
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST]}... ({len(text)} characters)"


def whole(name: str, value: object, least: int) -> None:
    """Raises TypeError or ValueError unless `value` is an int, no bool, from `least` to 2**63 - 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number; got {type(value).__name__} {shown(value)}. Pass an int")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {shown(value)}")
    if value > MOST:
        raise ValueError(f"{name} must be at most 2**63 - 1; got {shown(value)}")


def rate(name: str, value: object, *, zero: bool) -> None:
    """Raises ValueError unless `value` is a finite number above 0, or 0 where that is allowed."""
    if isinstance(value, int | float) and not isinstance(value, bool) and (value > 0 or (zero and value == 0)) and value < _HUGE:
        return
    raise ValueError(f"{name} must be a finite number, {'at least' if zero else 'above'} 0; got {shown(value)}")


def flag(name: str, value: object, *, or_none: bool = False) -> None:
    """Raises TypeError unless `value` is a bool, or None where that is allowed."""
    if not isinstance(value, bool) and not (or_none and value is None):
        wanted = "True, False or None" if or_none else "True or False"
        raise TypeError(f"{name} must be {wanted}; got {type(value).__name__} {shown(value)}")


def sequence(name: str, value: object, of: str) -> Sequence[Any]:
    """`value` where it is a tuple or a list, as which one thing alone is not taken; else raises TypeError. of: its members."""
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a tuple or a list of {of}; got {shown(value)}. For one, write [...] around it")
    return value


def function(name: str, value: object) -> None:
    """Raises TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function; got {type(value).__name__} {shown(value)}")


def kind(name: str, value: object, wanted: type, hint: str) -> None:
    """Raises TypeError unless `value` is of the class that is wanted. hint: what to do, a sentence without its full stop."""
    if not isinstance(value, wanted):
        raise TypeError(f"{name} must be a {wanted.__name__}; got {type(value).__name__} {shown(value)}. {hint}")


def model(value: object) -> None:
    """Raises TypeError unless `value` is a model: a module or another callable that is no class."""
    if not callable(value) or isinstance(value, type):
        got = f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} {shown(value)}"
        raise TypeError(f"model must be a torch.nn.Module or a function; got {got}. Make or load the model first")


def inputs(name: str, value: object, model: Callable[..., Any] | None = None) -> tuple[Any, ...]:
    """What a model is called with, as a tuple.

    Raises TypeError where it is no tuple or list (a tensor alone is not), or a tensor in it is nested or sparse; ValueError where
    a model's signature does not take so many.
    """
    given = tuple(sequence(name, value, "inputs of the model"))
    for place, each in enumerate(given):
        if isinstance(each, Tensor) and (each.is_nested or each.layout != torch.strided):
            got = "a nested one" if each.is_nested else f"one of layout {each.layout}"
            raise TypeError(f"{name}[{place}] must be a dense tensor; got {got}. Pass its dense form")
    if model is not None:
        _bind(name, model, given)
    return given


def _bind(name: str, model: Callable[..., Any], given: tuple[Any, ...]) -> None:
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):  # a builtin function has none: its own call checks
        return
    try:
        signature.bind(*given)
    except TypeError as error:
        raise ValueError(f"{name} must be what the model takes, {signature}; got {len(given)} inputs: {error}") from None


def sizes(value: object) -> Mapping[str, int]:
    """Values of symbols: an empty mapping of None. Raises TypeError or ValueError of anything but counts by name."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"sizes must be a mapping of symbols' names to ints, as {{'s77': 4096}}; got {shown(value)}")
    for name, size in value.items():
        whole(f"sizes[{name!r}]", size, 0)
    return value


def names(name: str, value: object) -> frozenset[str]:
    """Names of nodes. Raises TypeError of one name alone, which is a collection of letters, and of what are no strings."""
    if not isinstance(value, tuple | list | set | frozenset) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{name} must be a list or a set of nodes' names; got {shown(value)}. For one, write [...] around it")
    return frozenset(value)
