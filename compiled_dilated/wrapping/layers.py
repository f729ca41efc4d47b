"""The user's `attention=` for a model's layers, as one program per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from .. import arguments, counting, masks
from ..masks import Mask
from ..masks.bounds import upper_bound
from ..masks.functions import functions_of
from ..masks.neighborhoods import Neighborhood
from ..masks.traced import traced_parts
from ..programs import Program, as_program

# The lengths at which programs are checked for later keys: a function is evaluated pair by pair.
_CHECKED_TOKENS, _CHECKED_TOKENS_OF_FUNCTIONS = 2**20, 2048
_MOST_SHOWN_PATHS = 20


@dataclass(frozen=True)
class Layer:
    """An attention layer, the argument of a user's function of layers.

    path: of its module, as "model.layers.3.self_attn".
    kind: name of the module's class.
    index: its number, if it has one.
    causal: whether the model hides later keys from it.
    layer_type: as "sliding_attention", where the model's config has types.
    heads, kv_heads, head_dim: None if unknown.
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
    """The checked program of every layer, by path."""
    check_patterns(attention, layers)
    return {path: program_of(attention, layer) for path, layer in layers.items()}


def check_patterns(attention: Choice, paths: Collection[str]) -> None:
    """Raise ValueError for a pattern that matches no layer."""
    if not isinstance(attention, Mapping):
        return
    for pattern in attention:
        if not any(fnmatchcase(path, pattern) for path in paths):
            shown = [path for path in paths if path][:_MOST_SHOWN_PATHS]
            more = ", ..." if len(paths) > len(shown) + 1 else ""
            raise ValueError(f"no layer matches {pattern!r}. The layers: {', '.join(shown)}{more}")


def check_choice(attention: object) -> None:
    """Raise TypeError unless `attention` is a `Choice`."""
    if isinstance(attention, Mapping):
        for pattern in attention:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"attention's patterns must be text, as '*.layers.0.*'; got {pattern!r}"
                )
    elif not (attention is None or isinstance(attention, (Program, Mask)) or callable(attention)):
        raise TypeError(
            "attention must be a program, a mask, a function of a layer or {pattern: program}; "
            f"got {arguments.kind_and_text(attention)}"
        )


def program_of(attention: Choice, layer: Layer) -> Program | None:
    """The checked program of a layer; None for the model's own mask."""
    choice: Any = attention
    if isinstance(attention, Mapping):
        matching = (
            program for pattern, program in attention.items() if fnmatchcase(layer.path, pattern)
        )
        choice = next(matching, None)
    elif callable(attention) and not isinstance(attention, (Program, Mask)):
        choice = attention(layer)
    if choice is None:
        return None
    if not isinstance(choice, (Program, Mask)):
        raise TypeError(
            f"attention of {_name_of(layer)} must be a program, a mask or None; "
            f"got {arguments.kind_and_text(choice)}"
        )
    program = as_program(choice)
    _check(layer, program)
    return program


def _name_of(layer: Layer) -> str:
    """The layer's path; its kind if it is the model itself."""
    return layer.path or layer.kind


def _check(layer: Layer, program: Program) -> None:
    if layer.causal and sees_later(program, layer.heads or 1):
        raise ValueError(
            f"{_name_of(layer)} is causal, and its program shows later keys to queries. "
            "Write masks.causal() & ..., or causal=True in a program that takes it"
        )


@lru_cache(maxsize=64)
def sees_later(program: Program, heads: int) -> bool:
    """Whether a program shows later keys to queries, for some data.

    Up to a million tokens; masks by a function up to 2048.
    """
    tokens = _checked_tokens(program)
    for branch in program.branches:
        # A set, as most heads see the same.
        for mask in {branch.mask_at(head, heads) for head in branch.head_range(heads)}:
            most = upper_bound(mask) if mask.names else mask
            if _has_later_pairs(most, tokens):
                return True
    return False


def _checked_tokens(program: Program) -> int:
    """A length for which all of the program's masks are defined."""
    grids = [_grid_tokens(branch.mask) for branch in program.branches]
    return min((tokens for tokens in grids if tokens), default=_CHECKED_TOKENS)


def _has_later_pairs(mask: Mask, tokens: int) -> bool:
    """Whether one of so many queries sees a later key."""
    later_pairs = masks.conjunction((mask, ~masks.causal()))
    count = None
    if not functions_of(mask) and not traced_parts(mask):
        count = counting.pairs(later_pairs, tokens, tokens)
    if count is None:
        tokens = min(tokens, _CHECKED_TOKENS_OF_FUNCTIONS)
        count = counting.pairs(later_pairs, tokens, tokens)
    return count != 0


def _grid_tokens(mask: Mask) -> int:
    """The tokens of a mask's grid; 0 without one."""
    grids = [part.grid for part in mask.walk() if isinstance(part, Neighborhood)]
    return max((math.prod(grid) for grid in grids), default=0)
