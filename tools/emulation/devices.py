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


def _refused() -> str | None:
    """Exports of programs that lanes do not compute, and arguments that are of CPUs."""
    q, k, v = (x.to(pretended.DEVICE) for x in _inputs())
    padding = torch.zeros(1, _SHAPE[2], dtype=torch.bool, device=pretended.DEVICE)
    options = {"lengths": (1, 100)}
    attempts: list[tuple[object, list[Tensor], dict[str, object], str]] = [
        (masks.padding("pad"), [q, k, v, padding], options, "it reads data"),
        (masks.neighborhood((8, 8), 1), [q, k, v], {}, "is not made of runs of keys"),
        (masks.causal(), [q, k, v], {"lengths": (1, 2**25)}, "at most 16,777,216 tokens"),
        (masks.causal(), [q, k, v], options | {"isa": "avx2"}, "isa is of CPUs"),
        (masks.causal(), [q, k, v.cpu()], options, "must all be on one device"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for program, tensors, arguments, message in attempts:
            try:
                cd.export(program, tensors, Path(folder, "model.pt2"), **arguments)  # type: ignore[arg-type]
            except ValueError as error:
                if message not in str(error):
                    return f"refused by {str(error)!r}, not {message!r}"
            else:
                return f"{program!r} is exported"
    return None


def _planned() -> str | None:
    """Plans of large tensors ask for free memory; what kernels cannot take is refused."""
    small, low = (1, 2, 64, 64), torch.bfloat16
    attempts: list[tuple[str, tuple[int, ...], torch.dtype, int, str]] = [
        ("lanes", small, torch.float64, 0, "not in float64"),
        ("lanes", (1, 2, 64, 320), low, 0, "heads of at most 256 numbers"),
        ("lanes", small, low, 2**31, "positions are counted in 32 bits"),
        ("flex", (1, 2, 64, 8), low, 0, "heads of at least 16 numbers"),
        ("tiled", (1, 8, 2**17, 64), low, 0, ""),
    ]
    for lowering, shape, dtype, q_offset, message in attempts:
        refusal = ""
        try:
            options = {"q_offset": q_offset, "kv_len": q_offset + shape[2]}
            cd.plan(
                masks.causal() & masks.window(9), shape, dtype=dtype, device="cuda",
                lowering=lowering, **options,
            )  # fmt: skip
        except ValueError as error:
            refusal = str(error)
        if message not in refusal or bool(message) != bool(refusal):
            return f"{lowering} of {shape}: {refusal!r}, not {message!r}"
    return None


CASES: dict[str, Case] = {
    "a streamed ring": Case(_streamed, short=True),
    "tiles": Case(_tiles, short=True),
    "peak memory": Case(_peak, short=True),
    "exports that are refused": Case(_refused),
    "plans, and what kernels cannot take": Case(_planned, short=True),
}


def error_of(case: Case) -> str | None:
    """The error of a case; None where its result is right."""
    return case.run()


__all__ = ["CASES", "Case", "aten", "error_of"]
