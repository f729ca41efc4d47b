"""Index tensors of Hilbert curves, cached per grid and device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .curves import curve, inverse


class _Indices:
    """Cache of index tensors, as attributes.

    A tracer reads an attribute again at every call; it would cache the contents of a dictionary.
    """


INDICES = _Indices()
MOST_INDICES = 16


def index(grid: tuple[int, ...], inverted: bool, device: torch.device) -> torch.Tensor:
    """Index tensor of the curve or its inverse.

    Under torch.compile it is an input of the graph.
    """
    name = f"{'inverse of ' if inverted else ''}{grid} on {device}"
    _provide(name, grid, inverted, str(device))
    tensor: torch.Tensor = getattr(INDICES, name)
    return tensor


def _provide(name: str, grid: tuple[int, ...], inverted: bool, device: str) -> None:
    """Add the tensor to the cache, dropping the oldest if it is full."""
    if hasattr(INDICES, name):
        return
    cache = vars(INDICES)
    while len(cache) >= MOST_INDICES:
        del cache[next(iter(cache))]
    places = inverse(curve(grid)) if inverted else curve(grid)
    # Later callers use it too, so that it must be neither an inference tensor nor a fake one,
    # whatever mode this caller is in.
    with torch.inference_mode(False), _disable_current_modes():
        setattr(INDICES, name, torch.from_numpy(places).to(device))


# What torch.compiler.assume_constant_result sets, without its import of the whole compiler: tracing
# calls this function, it does not enter it.
_provide._dynamo_marked_constant = True  # type: ignore[attr-defined]
