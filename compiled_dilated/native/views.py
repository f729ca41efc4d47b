"""ATen's operators that move entries and compute none: views, concatenation and look-ups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .expressions import Untranslatable
from .tensors import Cells, Index, Place, Tensors, broadcast_entry, cells, positive_dim


def _identity(t: Tensors, out: torch.Tensor, x: Cells, **_: Any) -> Cells:
    return x


# Dimensions ---------------------------------------------------------------------------------


def _permute(t: Tensors, out: torch.Tensor, x: Cells, dims: Sequence[int]) -> Cells:
    order = [positive_dim(dim, len(x.shape)) for dim in dims]

    def at(index: tuple[Index, ...]) -> int:
        place: list[Index] = [0] * len(order)
        for position, dim in zip(index, order, strict=True):
            place[dim] = position
        return x.at(tuple(place))

    return cells(x.dtype, out.shape, at)


def _transpose(t: Tensors, out: torch.Tensor, x: Cells, dim0: int, dim1: int) -> Cells:
    order = list(range(len(x.shape)))
    dim0, dim1 = positive_dim(dim0, len(order)), positive_dim(dim1, len(order))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(t, out, x, order)


def _t(t: Tensors, out: torch.Tensor, x: Cells) -> Cells:
    return x if len(x.shape) < 2 else _transpose(t, out, x, 0, 1)


def _unsqueeze(t: Tensors, out: torch.Tensor, x: Cells, dim: int) -> Cells:
    dim = positive_dim(dim, len(x.shape) + 1)
    return cells(x.dtype, out.shape, lambda index: x.at(index[:dim] + index[dim + 1 :]))


def _expand(t: Tensors, out: torch.Tensor, x: Cells, sizes: Any, **_: Any) -> Cells:
    return cells(x.dtype, out.shape, lambda index: broadcast_entry(x, index))


def _reshape(t: Tensors, out: torch.Tensor, x: Cells, *_: Any) -> Cells:
    shape = tuple(out.shape)
    long_sizes = [size for size in shape if size != 1]
    if long_sizes == [size for size in x.shape if size != 1]:
        return _with_unit_dims(out, x)

    def at(index: tuple[Index, ...]) -> int:
        # The row-major position of the entry in the new shape, then its index in the old one.
        flat: Index = 0
        for position, size in zip(index, shape, strict=True):
            flat = t.plus(t.times(flat, size), t.within(position, size))
        place: list[Index] = []
        for size in reversed(x.shape):
            flat, remainder = t.divided(flat, size)
            place.insert(0, remainder)
        return x.at(tuple(place))

    return cells(x.dtype, shape, at)


def _with_unit_dims(out: torch.Tensor, x: Cells) -> Cells:
    """A reshape that only adds or removes dimensions of size 1."""

    def at(index: tuple[Index, ...]) -> int:
        positions = iter([i for i, size in zip(index, out.shape, strict=True) if size != 1])
        place = tuple(0 if size == 1 else next(positions) for size in x.shape)
        return x.at(place)

    return cells(x.dtype, out.shape, at)


def _squeeze(t: Tensors, out: torch.Tensor, x: Cells, *_: Any) -> Cells:
    return _reshape(t, out, x)


# Parts and joins ----------------------------------------------------------------------------


def _select(t: Tensors, out: torch.Tensor, x: Cells, dim: int, index: int) -> Cells:
    dim = positive_dim(dim, len(x.shape))
    position = positive_dim(index, x.shape[dim])

    def at(outer: tuple[Index, ...]) -> int:
        return x.at((*outer[:dim], position, *outer[dim:]))

    return cells(x.dtype, out.shape, at)


def _slice(
    t: Tensors,
    out: torch.Tensor,
    x: Cells,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Cells:
    if tuple(out.shape) == x.shape:
        return x
    dim = positive_dim(dim, len(x.shape))
    first, _, _ = slice(start, end, step).indices(x.shape[dim])

    def at(index: tuple[Index, ...]) -> int:
        position = t.strided(index[dim], out.shape[dim], first, step)
        return x.at((*index[:dim], position, *index[dim + 1 :]))

    return cells(x.dtype, out.shape, at)


def _flip(t: Tensors, out: torch.Tensor, x: Cells, dims: Sequence[int]) -> Cells:
    flipped = {positive_dim(dim, len(x.shape)) for dim in dims}

    def at(index: tuple[Index, ...]) -> int:
        place = list(index)
        for dim in sorted(flipped):
            size = x.shape[dim]
            place[dim] = t.strided(index[dim], size, size - 1, -1)
        return x.at(tuple(place))

    return cells(x.dtype, out.shape, at)


def _stack(t: Tensors, out: torch.Tensor, parts: Sequence[Cells], dim: int = 0) -> Cells:
    dim = positive_dim(dim, len(out.shape))

    def at(index: tuple[Index, ...]) -> int:
        inner = index[:dim] + index[dim + 1 :]

        def entry(number: int) -> int:
            return t.converted(parts[number], inner, out.dtype)

        return t.choose(index[dim], len(parts), entry)

    return cells(out.dtype, out.shape, at)


def _cat(t: Tensors, out: torch.Tensor, parts: Sequence[Cells], dim: int = 0) -> Cells:
    dim = positive_dim(dim, len(out.shape))
    # By position along the result: part and position in it. torch skips parts of shape (0,).
    sources: list[tuple[Cells, int]] = []
    for part in parts:
        if part.shape != (0,):
            sources += [(part, position) for position in range(part.shape[dim])]

    def at(index: tuple[Index, ...]) -> int:
        def entry(number: int) -> int:
            part, position = sources[number]
            return t.converted(part, (*index[:dim], position, *index[dim + 1 :]), out.dtype)

        return t.choose(index[dim], len(sources), entry)

    return cells(out.dtype, out.shape, at)


def _index(t: Tensors, out: torch.Tensor, x: Cells, indices: Sequence[Cells | None]) -> Cells:
    by_dim = {dim: index for dim, index in enumerate(indices) if index is not None}
    if any(index.dtype in (torch.bool, torch.uint8) for index in by_dim.values()):
        raise Untranslatable("it picks entries by a tensor of bools")
    shape = torch.broadcast_shapes(*(index.shape for index in by_dim.values()))
    dims = sorted(by_dim)
    # The dimensions of the indices replace indexed neighbours, else they come first, as in numpy.
    are_neighbours = dims == list(range(dims[0], dims[-1] + 1))
    start = dims[0] if are_neighbours else 0
    stop = start + len(shape)

    def at(index: tuple[Index, ...]) -> int:
        inner = index[start:stop]
        outer = iter((*index[:start], *index[stop:]))
        place: list[Index] = []
        for dim in range(len(x.shape)):
            if dim in by_dim:
                place.append(Place(broadcast_entry(by_dim[dim], inner)))
            else:
                place.append(next(outer))
        return x.at(tuple(place))

    return cells(x.dtype, out.shape, at)


VIEWS: dict[str, Callable[..., Cells]] = {
    "clone": _identity,
    "alias": _identity,
    "detach": _identity,
    "lift_fresh": _identity,
    "lift_fresh_copy": _identity,
    "contiguous": _identity,
    "view": _reshape,
    "_unsafe_view": _reshape,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "permute": _permute,
    "transpose": _transpose,
    "t": _t,
    "unsqueeze": _unsqueeze,
    "select": _select,
    "slice": _slice,
    "flip": _flip,
    "expand": _expand,
    "stack": _stack,
    "cat": _cat,
    "index": _index,
}
