"""Packages for a GPU: exported, loaded and run, against the float64 reference.

    program -> torch.export -> AOTInductor -> code, linked to `toolkit` -> load -> launches

Tensors are of cuda:0, in the memory of the host. Kernels are machine code of sm_90 in the package;
where its code launches one, the interpreter runs its source.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import pretended  # isort: skip
from . import launches  # isort: skip

import torch
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import masks

_BATCHES, _LENGTHS = (1, 4), (1, 700)
_HEADS, _KV_HEADS, _WIDTH = 4, 2, 16


@dataclass(frozen=True)
class Case:
    """A program, or the class of a model, and the sizes to run.

    sizes: (batch, tokens) of calls of "model".
    decoded: (tokens, queries) of calls of "decode"; the entry exists where there are some.
    short: whether the case belongs to the short half.
    """

    program: Any
    dtype: torch.dtype = torch.float32
    sizes: tuple[tuple[int, int], ...] = ((2, 300), (1, 1), (3, 129))
    decoded: tuple[tuple[int, int], ...] = ()
    short: bool = False


class _Layer(nn.Module):
    """A layer of attention between projections."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = _HEADS * _WIDTH
        self.inputs, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attend: Any = cd.compile(masks.causal() & masks.window(60))

    def forward(self, x: Tensor) -> Tensor:
        split = self.inputs(x).unflatten(-1, (3, _HEADS, _WIDTH))
        q, k, v = (y.transpose(1, 2) for y in split.unbind(2))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


# Rows after the last document see nothing.
_CACHE = (
    masks.causal() & (masks.window(100) | masks.sinks(4)) & masks.documents(lengths=(100, 130, 20))
)
CASES: dict[str, Case] = {
    "longnet at any length": Case(cd.longnet((64, 128, 256), (1, 2, 4)), short=True),
    "documents, decoding, dead rows": Case(
        _CACHE, torch.bfloat16, ((1, 300), (3, 129)), ((240, 1), (300, 7), (130, 130))
    ),
    "model with projections": Case(_Layer),
}


def on_gpu(x: Tensor) -> Tensor:
    """A tensor of the pretended GPU."""
    return x.to(pretended.DEVICE)


def _is_model(case: Case) -> bool:
    return isinstance(case.program, type)


def _inputs(case: Case, batch: int, tokens: int, queries: int | None = None) -> list[Tensor]:
    """q, k and v on the CPU, or the input of a model, equal in every run."""
    generator = torch.Generator().manual_seed(tokens)
    if _is_model(case):
        return [torch.randn(batch, tokens, _HEADS * _WIDTH, generator=generator)]
    rows = tokens if queries is None else queries
    shapes = ((_HEADS, rows), (_KV_HEADS, tokens), (_KV_HEADS, tokens))
    tensors = []
    for shape in shapes:
        x = torch.randn(batch, *shape, _WIDTH, generator=generator)
        tensors.append(x.to(case.dtype))
    return tensors


def _right(case: Case, tensors: list[Tensor]) -> Tensor:
    """The reference result of a call, in float64."""
    if _is_model(case):
        model = case.program().double()
        model.attend = partial(cd.reference, model.attend.program)
        with torch.no_grad():
            out: Tensor = model(tensors[0].double())
        return out
    offset = tensors[1].shape[2] - tensors[0].shape[2]
    right = cd.reference(case.program, *tensors, q_offset=offset)
    assert isinstance(right, Tensor)
    return right


def error_of(case: Case) -> str | None:
    """The error of a case; None where all results agree with the reference."""
    model = case.program
    if _is_model(case):
        model = case.program().to(pretended.DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pt2")
        about = cd.export(
            model, [on_gpu(x) for x in _inputs(case, 2, 50)], path,
            lengths=_LENGTHS, batches=_BATCHES, decode=bool(case.decoded),
        )  # fmt: skip
        if "code for sm_90" not in str(about):
            return f"it is described as {about}"
        run = cd.load(path)
        return _numbers(case, run) or _refusals(case, run)


def _numbers(case: Case, run: Any) -> str | None:
    """Differences from the reference at all sizes; None without any."""
    calls: list[tuple[Callable[..., Tensor], list[Tensor]]] = []
    for batch, tokens in case.sizes:
        calls.append((run, _inputs(case, batch, tokens)))
    for tokens, queries in case.decoded:
        calls.append((run.decode, _inputs(case, 2, tokens, queries)))
    for entry, tensors in calls:
        launches.LAUNCHED.clear()
        result = entry(*map(on_gpu, tensors))
        if result.device != pretended.DEVICE:
            return f"the result is on {result.device}"
        if "forward" not in dict(launches.LAUNCHED):
            return f"the package launched {launches.LAUNCHED}, not lanes"
        error = float((result.cpu().double() - _right(case, tensors)).abs().max())
        allowed = 64 * torch.finfo(case.dtype).eps
        if not error <= allowed:
            shapes = [tuple(x.shape) for x in tensors]
            return f"off by {error:.1e} at {shapes}; {allowed:.1e} is allowed"
    return None


def _refusals(case: Case, run: Any) -> str | None:
    """A call that its check of inputs lets through though it does not fit."""
    long, wrong = _inputs(case, 1, _LENGTHS[1] + 1), [x.double() for x in _inputs(case, 1, 50)]
    unfit = {
        "tokens must be from 1 to 700": [on_gpu(x) for x in long],
        "on a GPU; got float64 on a GPU": [on_gpu(x) for x in wrong],
        "on a GPU; got": _inputs(case, 1, 50),
    }
    for message, tensors in unfit.items():
        # By the loaded package, and by the first operator of its graph.
        for function in (run, run._runs["model"]):
            try:
                function(*tensors)
            except (RuntimeError, TypeError, ValueError) as error:
                if message not in str(error):
                    return f"it refuses by {str(error).splitlines()[0]!r}, not {message!r}"
            else:
                return f"it takes inputs that do not fit: {message}"
    return None
