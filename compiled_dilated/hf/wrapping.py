"""Programs for the layers of a transformers model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .. import counting, masks
from ..masks import Mask
from ..masks.grids import Neighborhood
from ..programs import Program, as_program
from . import NAME
from .layers import Site, put_site

# Lengths at which a program is asked whether it sees later keys.
_ASKED_LENGTH = 2048


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


def wrap(model: Any, attention: Choice = None) -> Any:
    """The model with this library's attention, in place.

    attention: a program or mask for all layers; a function of a `Layer`; or {pattern of paths: program}, as
    {"*.layers.0.*": program}, the first that matches. None, or None for a layer: the model's own masks stay. A program takes the
    place of the model's structure (causal, windows, chunks) and is joined with a call's data (padding, packed sequences).

    Raises ValueError where there is no layer, a pattern matches none, or a program shows later keys to a causal layer.
    """
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} does not take its attention from transformers' AttentionInterface. Rewrite it to, or wrap "
            "its inner layers"
        )
    layers = {path: module for path, module in model.named_modules() if _is_attention(module)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention layer that transformers hands to an implementation")
    programs = _programs(attention, {path: _layer_of(path, module, model) for path, module in layers.items()})
    model.set_attn_implementation(NAME)
    for path, module in layers.items():
        put_site(module, Site(path, type(module).__name__, programs[path]))
    return model


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ and hasattr(module, "is_causal")


def _layer_of(path: str, module: nn.Module, model: Any) -> Layer:
    config = getattr(module, "config", model.config)
    index = getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    layer_type = types[index] if types and index is not None else None
    heads = getattr(config, "num_attention_heads", None)
    return Layer(
        path, type(module).__name__, index, bool(module.is_causal), layer_type, heads,
        getattr(config, "num_key_value_heads", heads), getattr(module, "head_dim", None),
    )  # fmt: skip


def _programs(attention: Choice, layers: Mapping[str, Layer]) -> dict[str, Program | None]:
    """Each layer's program, checked."""
    choose = _chooser(attention, layers)
    programs: dict[str, Program | None] = {}
    for path, layer in layers.items():
        choice = choose(layer)
        if choice is not None and not isinstance(choice, (Program, Mask)):
            raise TypeError(f"attention of {path} must be a program, a mask or None; got {type(choice).__name__} {choice!r}")
        program = None if choice is None else as_program(choice)
        if program is not None:
            _check(layer, program)
        programs[path] = program
    return programs


def _chooser(attention: Choice, layers: Mapping[str, Layer]) -> Callable[[Layer], Any]:
    if attention is None or isinstance(attention, (Program, Mask)):
        return lambda layer: attention
    if isinstance(attention, Mapping):
        for pattern in attention:
            if not isinstance(pattern, str):
                raise TypeError(f"attention's patterns must be text, as '*.layers.0.*'; got {pattern!r}")
            if not any(fnmatchcase(path, pattern) for path in layers):
                raise ValueError(f"no attention layer matches {pattern!r}. The layers: {', '.join(layers)}")

        def matching(layer: Layer) -> Any:
            for pattern, choice in attention.items():
                if fnmatchcase(layer.path, pattern):
                    return choice
            return None

        return matching
    if callable(attention):
        return attention
    raise TypeError(
        "attention must be a program, a mask, a function of a layer or {pattern: program}; got "
        f"{type(attention).__name__} {attention!r}"
    )


def _check(layer: Layer, program: Program) -> None:
    if program.names:
        raise ValueError(
            f"the program of {layer.path} reads the data {', '.join(program.names)}, which no call of the model passes. Padding "
            "and packed sequences join a program by themselves"
        )
    if layer.causal and _sees_later(program, layer.heads or 1):
        raise ValueError(
            f"{layer.path} is causal, and its program shows later keys to queries. Write masks.causal() & ..., causal=True in a "
            "program that takes it, or set is_causal=False in the model's config"
        )


def _sees_later(program: Program, heads: int) -> bool:
    length = _length_of(program)
    later = ~masks.causal()
    for branch in program.branches:
        for head in branch.head_range(heads):
            if counting.pairs(masks.conjunction((branch.mask_at(head, heads), later)), length, length) != 0:
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
