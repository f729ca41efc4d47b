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
    name = f"{grid} on {device}"
    if inverted:
        name = f"inverse of {name}"
    _provide(name, grid, inverted, str(device))
    tensor: torch.Tensor = getattr(INDICES, name)
    return tensor


def _provide(name: str, grid: tuple[int, ...], inverted: bool, device: str) -> None:
    """Add the tensor to the cache; a full cache drops its oldest."""
    if hasattr(INDICES, name):
        return
    cache = vars(INDICES)
    while len(cache) >= MOST_INDICES:
        del cache[next(iter(cache))]
    places = curve(grid)
    if inverted:
        places = inverse(places)
    # Later callers use the tensor too. So it must be neither an inference tensor nor a fake one,
    # whatever mode the present caller is in.
    with torch.inference_mode(False), _disable_current_modes():
        setattr(INDICES, name, torch.from_numpy(places).to(device))


# As torch.compiler.assume_constant_result, without its import of the whole compiler: tracing calls
# this function and does not enter it.
_provide._dynamo_marked_constant = True  # type: ignore[attr-defined]
