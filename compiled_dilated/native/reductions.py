"""ATen's reductions and products of matrices, on single numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .expressions import SHORT, Untranslatable, register_of
from .tensors import Cells, Index, Tensors, cells, check_entries, positive_dim

# From the nodes of the entries that are reduced to the node of their result.
Combine = Callable[[list[int]], int]


def _reduction(combine: Callable[[Tensors, torch.Tensor, list[int]], int]) -> Callable[..., Cells]:
    """A reduction with ATen's arguments.

    combine: maps the tape, the result and the nodes of the entries to the node of their result.
    """

    def reduction(
        t: Tensors,
        out: torch.Tensor,
        x: Cells,
        dim: Any = None,
        keepdim: bool = False,
        dtype: torch.dtype | None = None,  # of the result, which `out` has
    ) -> Cells:
        return _reduce(out, x, dim, keepdim, partial(combine, t, out))

    return reduction


def _reduce(
    out: torch.Tensor,
    x: Cells,
    dim: Any,
    keepdim: bool,
    combine: Combine,
) -> Cells:
    """A tensor of combine(entries), the entries along the reduced dimensions.

    dim: one dimension, several, or None or [] for all.
    """
    along = _reduced_dims(x, dim)
    sizes = [x.shape[d] for d in along]
    check_entries(math.prod(sizes))

    def at(index: tuple[Index, ...]) -> int:
        outer = list(index)
        if keepdim:
            outer = [position for d, position in enumerate(index) if d not in along]
        entries = []
        for inner in itertools.product(*map(range, sizes)):
            # Positions along reduced and remaining dimensions, in the order of x.
            reduced, remaining = iter(inner), iter(outer)
            place: list[Index] = []
            for d in range(len(x.shape)):
                place.append(next(reduced) if d in along else next(remaining))
            entries.append(x.at(tuple(place)))
        return combine(entries)

    return cells(out.dtype, out.shape, at)


def _reduced_dims(x: Cells, dim: Any) -> list[int]:
    if not x.shape:
        return []
    if dim is None or dim == []:
        return list(range(len(x.shape)))
    dims = [dim] if isinstance(dim, int) else dim
    return sorted({positive_dim(d, len(x.shape)) for d in dims})


def _fold(t: Tensors, op: str, nodes: Sequence[int]) -> int:
    total = nodes[0]
    for node in nodes[1:]:
        total = t.x.binary(op, total, node)
    return total


def _cast_all(t: Tensors, nodes: Sequence[int], dtype: torch.dtype) -> list[int]:
    return [t.x.cast(node, dtype) for node in nodes]


def _finish(t: Tensors, node: int, dtype: torch.dtype) -> int:
    """A result rounded or wrapped to its dtype."""
    return t.x.rounded(node, dtype) if dtype.is_floating_point else t.x.wrapped(node, dtype)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that torch sums in: float32 for float16 and bfloat16."""
    return torch.float32 if dtype in SHORT else dtype


# Sums and products --------------------------------------------------------------------------


def _sum_nodes(t: Tensors, dtype: torch.dtype, nodes: Sequence[int]) -> int:
    if nodes:
        total = _fold(t, "add", _cast_all(t, nodes, _accumulation_dtype(dtype)))
        return _finish(t, total, dtype)
    if dtype.is_floating_point:
        return t.x.constant(0.0, register_of(dtype))
    return t.x.whole(0)


def _sum(t: Tensors, out: torch.Tensor, nodes: list[int]) -> int:
    return _sum_nodes(t, out.dtype, nodes)


def _mean(t: Tensors, out: torch.Tensor, nodes: list[int]) -> int:
    total = _sum_nodes(t, _accumulation_dtype(out.dtype), nodes)
    count = t.x.constant(float(len(nodes)), t.x.type(total))
    return t.x.rounded(t.x.binary("divide", total, count), out.dtype)


def _prod(t: Tensors, out: torch.Tensor, nodes: list[int]) -> int:
    return _finish(t, _fold(t, "multiply", _cast_all(t, nodes, out.dtype)), out.dtype)


def _count_nonzero(t: Tensors, out: torch.Tensor, nodes: list[int]) -> int:
    return _sum_nodes(t, torch.int64, _cast_all(t, nodes, torch.bool))


# Extremes and truth values ------------------------------------------------------------------


def _extreme(op: str, t: Tensors, out: torch.Tensor, nodes: list[int]) -> int:
    """amax and amin: equal entries share the gradient."""
    if out.dtype == torch.bool:
        return _fold(t, "both" if op == "minimum" else "either", nodes)
    best = _fold(t, op, nodes)
    # The rule of a single maximum divides the gradient between two entries already.
    if len(set(nodes)) < 3 or not out.dtype.is_floating_point:
        return best
    return t.x.apart(best, op, lambda grad: _shared_gradient(t, nodes, best, grad))


def _shared_gradient(
    t: Tensors,
    nodes: Sequence[int],
    best: int,
    grad: int,
) -> list[tuple[int, int]]:
    """The gradient in equal parts to all entries that equal the extreme."""
    type = t.x.type(grad)
    hit, miss = t.x.constant(1.0, type), t.x.constant(0.0, type)
    are_best = [t.x.binary("equal", node, best) for node in nodes]
    count = _fold(t, "add", [t.x.choice(is_best, hit, miss) for is_best in are_best])
    part = t.x.binary("divide", grad, count)
    out = []
    for node, is_best in zip(nodes, are_best, strict=True):
        out.append((node, t.x.choice(is_best, part, miss)))
    return out


def _logical(op: str, t: Tensors, out: torch.Tensor, nodes: list[int]) -> int:
    """all and any."""
    if not nodes:
        return t.x.constant(op == "both", register_of(torch.bool))
    return t.x.cast(_fold(t, op, _cast_all(t, nodes, torch.bool)), out.dtype)


# Norms --------------------------------------------------------------------------------------


def _norm(
    t: Tensors,
    out: torch.Tensor,
    x: Cells,
    ord: float = 2,
    dim: Any = None,
    keepdim: bool = False,
    **_: Any,
) -> Cells:
    if ord not in (1, 2):
        raise Untranslatable(f"the tape has no norm of order {ord}")

    def combine(nodes: list[int]) -> int:
        nodes = _cast_all(t, nodes, out.dtype)
        if ord == 1:
            return _sum_nodes(t, out.dtype, [t.x.unary("absolute", node) for node in nodes])
        return t.x.rounded(_euclidean_norm(t, nodes), out.dtype)

    return _reduce(out, x, dim, keepdim, combine)


def _euclidean_norm(t: Tensors, nodes: Sequence[int]) -> int:
    squares = [t.x.binary("multiply", node, node) for node in nodes]
    norm = t.x.unary("square_root", _fold(t, "add", squares))

    def pull(grad: int) -> list[tuple[int, int]]:
        # At the zero vector torch's gradient is 0.
        zero = t.x.constant(0.0, t.x.type(grad))
        is_zero = t.x.binary("equal", norm, zero)
        part = t.x.choice(is_zero, zero, t.x.binary("divide", grad, norm))
        return [(node, t.x.binary("multiply", part, node)) for node in nodes]

    return t.x.apart(norm, "norm", pull)


def _logsumexp(t: Tensors, out: torch.Tensor, nodes: list[int]) -> int:
    return t.x.rounded(_logsumexp_nodes(t, _cast_all(t, nodes, out.dtype)), out.dtype)


def _logsumexp_nodes(t: Tensors, nodes: Sequence[int]) -> int:
    # Shifted by the maximum, unless that is infinite: inf - inf would be NaN.
    peak = _fold(t, "maximum", nodes)
    type = t.x.type(peak)
    zero, infinity = t.x.constant(0.0, type), t.x.constant(math.inf, type)
    is_infinite = t.x.binary("equal", t.x.unary("absolute", peak), infinity)
    shift = t.x.choice(is_infinite, zero, peak)
    terms = [t.x.unary("exp", t.x.binary("subtract", node, shift)) for node in nodes]
    result = t.x.binary("add", t.x.unary("log", _fold(t, "add", terms)), shift)

    def pull(grad: int) -> list[tuple[int, int]]:
        # The softmax of the entries.
        weights = [t.x.unary("exp", t.x.binary("subtract", node, result)) for node in nodes]
        out = []
        for node, weight in zip(nodes, weights, strict=True):
            out.append((node, t.x.binary("multiply", grad, weight)))
        return out

    return t.x.apart(result, "logsumexp", pull)


# Products of vectors and matrices -----------------------------------------------------------


def _inner_product(t: Tensors, out: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> int:
    products = [t.x.binary("multiply", a, b) for a, b in pairs]
    if not out.dtype.is_floating_point:
        products = [t.x.wrapped(product, out.dtype) for product in products]
    return _sum_nodes(t, out.dtype, products)


def _dot(t: Tensors, out: torch.Tensor, a: Cells, b: Cells) -> Cells:
    def at(_: tuple[Index, ...]) -> int:
        pairs = list(zip(a.entries(), b.entries(), strict=True))
        return _inner_product(t, out, pairs)

    return cells(out.dtype, (), at)


def _mv(t: Tensors, out: torch.Tensor, a: Cells, b: Cells) -> Cells:
    def at(index: tuple[Index, ...]) -> int:
        (size,) = b.shape
        check_entries(size)
        return _inner_product(t, out, [(a.at((index[0], i)), b.at((i,))) for i in range(size)])

    return cells(out.dtype, out.shape, at)


def _mm(t: Tensors, out: torch.Tensor, a: Cells, b: Cells) -> Cells:
    def at(index: tuple[Index, ...]) -> int:
        row, column = index
        size = b.shape[0]
        check_entries(size)
        return _inner_product(t, out, [(a.at((row, i)), b.at((i, column))) for i in range(size)])

    return cells(out.dtype, out.shape, at)


REDUCTIONS: dict[str, Callable[..., Cells]] = {
    "sum": _reduction(_sum),
    "mean": _reduction(_mean),
    "prod": _reduction(_prod),
    "amax": _reduction(partial(_extreme, "maximum")),
    "amin": _reduction(partial(_extreme, "minimum")),
    "all": _reduction(partial(_logical, "both")),
    "any": _reduction(partial(_logical, "either")),
    "count_nonzero": _reduction(_count_nonzero),
    "linalg_vector_norm": _norm,
    "logsumexp": _reduction(_logsumexp),
    "dot": _dot,
    "vdot": _dot,
    "mv": _mv,
    "mm": _mm,
}
