"""Factories that a command line names as MODULE:FACTORY."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from . import arguments


class NoFactory(ValueError):
    """The module does not exist, or has no such function."""


def named(target: str) -> tuple[str, str]:
    """Split MODULE:FACTORY into the two names.

    Raises ValueError if it is not of that form.
    """
    module, _, name = target.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(
            "MODULE:FACTORY must name a module and a function of it, as models.llama:small; "
            f"got {arguments.shown(target)}"
        )
    return module, name


def load(module: str, name: str) -> Callable[[], Any]:
    """Import a factory.

    Raises NoFactory if there is none; any other exception of the import is passed on.
    """
    sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise NoFactory(str(error)) from error
    if not callable(factory):
        raise NoFactory(f"MODULE:FACTORY must name a function; {module} has no function {name!r}")
    return factory  # type: ignore[no-any-return]
