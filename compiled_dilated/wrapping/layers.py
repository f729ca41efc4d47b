"""What a user says of a model's attention layers, as a program for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from .. import counting, masks
from ..masks import Mask
from ..masks.grids import Neighborhood
from ..programs import Program, as_program

# The length at which a program is asked whether it sees later keys.
_ASKED_LENGTH = 2048
_SHOWN_PATHS = 20


@dataclass(frozen=True)
class Layer:
    """What a function of layers is told of one.

    path: of its module, as "model.layers.3.self_attn". kind: the name of its class. index: its number; None where it has none.
    causal: whether the model hides later keys from it. layer_type: as "sliding_attention", where the config says so.
    """

    path: str
    kind: str
    index: int | None
    causal: bool
    layer_type: str | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None


Choice = Program | Mask | None | Callable[[Layer], Any] | Mapping[str, Any]


def programs_of(attention: Choice, layers: Mapping[str, Layer]) -> dict[str, Program | None]:
    """Each layer's program, by path; checked."""
    check_patterns(attention, layers)
    return {path: program_of(attention, layer) for path, layer in layers.items()}


def check_patterns(attention: Choice, paths: Collection[str]) -> None:
    """Raise ValueError for a pattern that matches no layer."""
    if not isinstance(attention, Mapping):
        return
    for pattern in attention:
        if not any(fnmatchcase(path, pattern) for path in paths):
            shown = [path for path in paths if path][:_SHOWN_PATHS]
            more = ", ..." if len(paths) > len(shown) + 1 else ""
            raise ValueError(f"no layer matches {pattern!r}. The layers: {', '.join(shown)}{more}")


def check_choice(attention: object) -> None:
    """Raise TypeError for what is no choice of programs."""
    if isinstance(attention, Mapping):
        for pattern in attention:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"attention's patterns must be text, as '*.layers.0.*'; got {pattern!r}"
                )
    elif not (attention is None or isinstance(attention, (Program, Mask)) or callable(attention)):
        raise TypeError(
            "attention must be a program, a mask, a function of a layer or {pattern: program}; got "
            f"{type(attention).__name__} {attention!r}"
        )


def program_of(attention: Choice, layer: Layer) -> Program | None:
    """A layer's program, checked; None: what the model says stays."""
    choice: Any = attention
    if isinstance(attention, Mapping):
        choice = next(
            (value for pattern, value in attention.items() if fnmatchcase(layer.path, pattern)),
            None,
        )
    elif callable(attention) and not isinstance(attention, (Program, Mask)):
        choice = attention(layer)
    if choice is None:
        return None
    if not isinstance(choice, (Program, Mask)):
        raise TypeError(
            f"attention of {layer.path} must be a program, a mask or None; got {type(choice).__name__} {choice!r}"
        )
    program = as_program(choice)
    _check(layer, program)
    return program


def _check(layer: Layer, program: Program) -> None:
    if program.names:
        raise ValueError(
            f"the program of {layer.path} reads the data {', '.join(program.names)}, which no call of the model passes. Padding "
            "and packed sequences join a program by themselves"
        )
    if layer.causal and sees_later(program, layer.heads or 1):
        raise ValueError(
            f"{layer.path} is causal, and its program shows later keys to queries. Write masks.causal() & ..., or causal=True "
            "in a program that takes it"
        )


@lru_cache(maxsize=64)
def sees_later(program: Program, heads: int) -> bool:
    """Whether a program shows later keys to queries."""
    length = _length_of(program)
    later = ~masks.causal()
    for branch in program.branches:
        # Heads mostly see the same.
        for mask in {branch.mask_at(head, heads) for head in branch.head_range(heads)}:
            if counting.pairs(masks.conjunction((mask, later)), length, length) != 0:
                return True
    return False


def _length_of(program: Program) -> int:
    """A length that the program speaks of."""
    grids = [_grid_length(branch.mask) for branch in program.branches]
    return min((length for length in grids if length), default=_ASKED_LENGTH)


def _grid_length(mask: Mask) -> int:
    """The tokens of the mask's grid; 0 where it has none."""
    if isinstance(mask, Neighborhood):
        return math.prod(mask.grid)
    return max((_grid_length(part) for part in mask.parts), default=0)
