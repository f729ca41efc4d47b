"""Functions that a command line names as MODULE:FACTORY."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from . import arguments


class NoFactory(ValueError):
    """A module that is not there, or has no such function."""


def named(target: str) -> tuple[str, str]:
    """The module and the function that MODULE:FACTORY names. Raises ValueError where it names none."""
    module, _, name = target.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        got = arguments.shown(target)
        raise ValueError(f"MODULE:FACTORY must name a module and a function of it, as models.llama:small; got {got}")
    return module, name


def load(module: str, name: str) -> Callable[[], Any]:
    """The factory. A module that is not there is a NoFactory; what else its import raises keeps its traceback."""
    sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise NoFactory(str(error)) from error
    if not callable(factory):
        raise NoFactory(f"MODULE:FACTORY must name a function; {module} has no function {name!r}")
    return factory  # type: ignore[no-any-return]
