"""Programs that depend on the number of tokens.

Also masks and data of programs of both kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from .. import arguments
from ..masks import Mask
from ..masks.functions import functions_of
from ..mods import MaskMod
from .core import NoMask, Program

Builder = TypeVar("Builder", bound=Callable[..., Program])
BUILDERS: dict[str, Callable[..., Program]] = {}


def builder(build: Builder) -> Builder:
    """Register a function by name, for `PerLength` as text."""
    BUILDERS[build.__name__] = build
    return build


@dataclass(frozen=True, repr=False)
class PerLength(NoMask):
    """A program that depends on the number of tokens: `build(*settings, tokens)`.

    build: a function marked with `builder`.
    names: data tensors that it reads, at every length.
    """

    build: Callable[..., Program]
    settings: tuple[Any, ...]
    names: tuple[str, ...] = ()

    def at(self, tokens: int) -> Program:
        """The program for `tokens` tokens."""
        return self.build(*self.settings, tokens)

    def map(self, change: Callable[[Mask], Mask]) -> PerLength:
        """The `PerLength` with `change` applied to masks in its settings."""
        return replace(self, settings=tuple(_mapped(setting, change) for setting in self.settings))

    def __repr__(self) -> str:
        return f"per_length({self.build.__name__!r}, {self.settings!r}, {self.names!r})"

    def __str__(self) -> str:
        settings = ", ".join(map(_shown, self.settings))
        return f"per_length({self.build.__name__!r}, ({settings}), {self.names!r})"


def per_length(build: str, settings: tuple[Any, ...], names: tuple[str, ...]) -> PerLength:
    """The `PerLength` of a registered builder."""
    name = arguments.choice("build", build, tuple(BUILDERS))
    return PerLength(BUILDERS[name], settings, names)


def _shown(setting: Any) -> str:
    """Text of a setting, with masks by `str`."""
    if isinstance(setting, (Program, PerLength)):
        return str(setting)
    return repr(setting)


def _mapped(setting: Any, change: Callable[[Mask], Mask]) -> Any:
    """A setting with `change` applied to the masks of a program."""
    if isinstance(setting, (Program, PerLength)):
        return setting.map(change)
    return setting


def mask_mods_of(program: Program | PerLength) -> tuple[MaskMod, ...]:
    """Functions of the program's `from_mod` masks, in the order of tracing."""
    functions: list[MaskMod] = []
    for mask in masks_of(program):
        functions += functions_of(mask)
    return tuple(functions)


def query_names_of(program: Program | PerLength) -> tuple[str, ...]:
    """Names of data tensors that are read at query positions too."""
    names: set[str] = set()
    for mask in masks_of(program):
        names.update(mask.query_names)
    return tuple(names)


def check_data(program: Program | PerLength, data: Mapping[str, Any]) -> None:
    """Raise TypeError if a data tensor has the wrong dtype."""
    for mask in masks_of(program):
        mask.check_data(data)


def masks_of(program: Program | PerLength) -> tuple[Mask, ...]:
    """Masks of the branches; for a `PerLength`, those in its settings."""
    if isinstance(program, Program):
        return tuple(branch.mask for branch in program.branches)
    masks: list[Mask] = []
    for setting in program.settings:
        if isinstance(setting, (Program, PerLength)):
            masks += masks_of(setting)
    return tuple(masks)
