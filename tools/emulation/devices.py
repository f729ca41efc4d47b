"""Calls with tensors of the pretended GPU itself: what depends on the device of a tensor.

Tensors of the other cases are on the CPU, and only plans are of a GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import pretended  # isort: skip
from . import aten  # isort: skip

import numpy as np
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks, measure

_SHAPE, _RANKS, _ALLOWED = (1, 2, 64, 16), 4, 1e-5


@dataclass(frozen=True)
class Case:
    """A function that returns its error, or None.

    short: whether the case belongs to the short half.
    """

    run: Callable[[], str | None]
    short: bool = False


def _inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(_SHAPE, generator=generator) for _ in range(3)]


def _differs(out: Tensor, right: Tensor) -> str | None:
    error = float((out.cpu().double() - right).abs().max())
    return None if error <= _ALLOWED else f"off by {error:.1e}; {_ALLOWED:.1e} is allowed"


def _streamed() -> str | None:
    """A ring whose blocks are copied to the GPU and back."""
    program, tensors = masks.causal(), _inputs()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{name}.npy") for name in ("q", "k", "v", "out")]
        for path, x in zip(paths, tensors, strict=False):
            np.save(path, x.numpy())
        run = cd.compile(program, ranks=_RANKS, transport="streamed", device="cuda")
        run(*paths)
        return _differs(torch.from_numpy(np.load(paths[3])), cd.reference(program, *tensors))


def _tiles() -> str | None:
    """torch's kernel of tiles, with a bias and without.

    Backwards are run by cases of the CPU: autograd looks for streams, which are not pretended.
    """
    tensors = _inputs()
    for program in (cd.longnet((16, 64), (1, 2)), masks.causal() & masks.window(9)):
        out = cd.compile(program, lowering="tiled")(*(x.to(pretended.DEVICE) for x in tensors))
        error = _differs(out, cd.reference(program, *tensors))
        if error is not None:
            return error
    return None


def _peak() -> str | None:
    """The peak of a call, by the counters of CUDA."""
    peak = measure.peak_bytes(lambda: torch.zeros(8, device=pretended.DEVICE), "cuda")
    return None if peak == 0 else f"the pretended counters say 0 bytes; got {peak}"


CASES: dict[str, Case] = {
    "a streamed ring": Case(_streamed, short=True),
    "tiles": Case(_tiles, short=True),
    "peak memory": Case(_peak, short=True),
}


def error_of(case: Case) -> str | None:
    """The error of a case; None where its result is right."""
    return case.run()


__all__ = ["CASES", "Case", "aten", "error_of"]
