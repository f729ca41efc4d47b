"""Variants by name: the row of the table, its arguments, the module."""

from __future__ import annotations

import difflib
import inspect
import re
from typing import Any

from torch import nn

from .. import arguments
from ..modules import Attention, Multihead
from ..ring.distributed import Distributed
from ..ring.rings import Ring
from .attentions import RingAttention
from .table import DISTRIBUTED, SINGLE, TABLE, Variant

_BY_NAME = {row.name: row for row in TABLE} | {row.alias: row for row in TABLE if row.alias}


def find(name: str) -> tuple[Variant, dict[str, Any]]:
    """The row of a name, and the arguments in its suffix.

    ring_size for "_r8", sparsity for "_0.95".

    Raises ValueError for an unknown name, with similar ones.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"the name of a variant must be a string; got {arguments.kind_and_text(name)}"
        )
    if name in _BY_NAME:
        return _BY_NAME[name], {}
    # The suffix is split off only for systems that have such an argument.
    with_ring_size = re.fullmatch(r"(.+)_r([0-9]{1,9})", name)
    if with_ring_size:
        row = _BY_NAME.get(with_ring_size[1])
        if row is not None and row.execution != SINGLE:
            return row, {"ring_size": int(with_ring_size[2])}
    with_sparsity = re.fullmatch(r"(.+)_(0?\.[0-9]+)", name)
    if with_sparsity:
        row = _BY_NAME.get(with_sparsity[1])
        if row is not None and row.sparsities:
            return row, {"sparsity": float(with_sparsity[2])}
    names: list[str] = []
    for row in TABLE:
        names += row.names
    similar = difflib.get_close_matches(name, names, n=3)
    if similar:
        raise ValueError(f"no variant is named {name!r}; close to it are {', '.join(similar)}")
    raise ValueError(f"no variant is named {name!r}; there are {', '.join(_BY_NAME)}")


def variant(name: str, **kwargs: Any) -> nn.Module:
    """A system of the benchmark reports as a module.

    It maps (B, N, H, D) to (B, N, H, D); a multihead one (B, N, E) to (B, N, E).

    name: of the table, with "_r8" for ring_size=8 or "_0.95" for sparsity=0.95.
    kwargs: of the program (segment_lengths and dilation_rates, or sparsity, kind and block),
        softmax_scale, lowering; ring_size for a ring; embed_dim, num_heads and the other arguments
        of `Multihead` for a multihead name.

    A distributed ring runs in processes of torch.distributed, as torchrun starts them; other rings
    run in this process.

    Raises ValueError for an unknown name, with similar ones, and TypeError for unknown or missing
    arguments.

    >>> variant("BlockSparse_LocalWindow_0.95")(q, k, v).shape == q.shape
    True
    """
    # 1. The arguments in the name's suffix.
    row, suffix = find(name)
    for argument, value in suffix.items():
        if kwargs.setdefault(argument, value) != value:
            raise ValueError(
                f"the name {name!r} says {argument}={value}; got {argument}={kwargs[argument]!r}. "
                f"Use the name {row.name!r}"
            )
    # 2. Checks and defaults.
    _check_arguments(name, row, kwargs)
    if row.sparsities:
        kwargs.setdefault("sparsity", row.sparsities[0])
    ring_size = kwargs.pop("ring_size", 1)
    # 3. The attention takes its own arguments; the others are of the projections around it.
    settings = {}
    for parameter in inspect.signature(row.attention).parameters:
        if parameter in kwargs:
            settings[parameter] = kwargs.pop(parameter)
    module: nn.Module = row.attention(**settings, ring=_ring(row.execution, ring_size))
    if row.execution != SINGLE:
        assert isinstance(module, Attention)
        module = RingAttention(row.name, row.execution, ring_size, module)
    if row.multihead:
        return Multihead(module, **kwargs)
    return module


def _check_arguments(name: str, row: Variant, kwargs: dict[str, Any]) -> None:
    """Raise TypeError for unknown and missing arguments."""
    parameters = row.takes
    unknown = [argument for argument in kwargs if argument not in parameters]
    missing = []
    for argument, is_required in parameters.items():
        if is_required and argument not in kwargs:
            missing.append(argument)
    mistakes = []
    if unknown:
        mistakes.append(f"takes no {', '.join(unknown)}")
    if missing:
        mistakes.append(f"needs {', '.join(missing)}")
    if mistakes:
        raise TypeError(
            f"variant {name!r} {' and '.join(mistakes)}. Its arguments are {', '.join(parameters)}"
        )


def _ring(execution: str, ring_size: object) -> Ring | None:
    """The ring of an execution; None for one device."""
    size = arguments.integer("ring_size", ring_size, 1)
    if size == 1:
        return None
    if execution == DISTRIBUTED:
        return Ring(size, "contiguous", Distributed())
    return Ring(size)
