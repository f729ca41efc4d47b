"""ATen's operators over tensors of expressions, which are asked for one entry at a time.

A tensor of a mod is small, or a captured one that is looked up: nothing is computed but the entries that the result asks for, so
that (table * 2)[i] is one look-up and one product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .cells import POINTWISE, Cell
from .expressions import Expressions, Range, Register, Untranslatable, register_of

MOST_ENTRIES = 512  # of a reduction


@dataclass(frozen=True)
class Place:
    """An index that is computed. bare: as the user gives it, so that a negative one counts from the end."""

    node: int
    bare: bool = True


Index = int | Place


@dataclass(frozen=True)
class Cells:
    """A tensor: at((i, j, ...)) is the node of an entry."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    at: Callable[[tuple[Index, ...]], int]

    @property
    def meta(self) -> torch.Tensor:
        """A tensor without data of this shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def indices(self) -> list[tuple[Index, ...]]:
        """Of all entries, in order."""
        if math.prod(self.shape) > MOST_ENTRIES:
            raise Untranslatable(f"it reduces {math.prod(self.shape):,} numbers for each pair, more than {MOST_ENTRIES}")
        return list(itertools.product(*map(range, self.shape)))

    def entries(self) -> list[int]:
        """The nodes of all entries, in order."""
        return [self.at(index) for index in self.indices()]


@dataclass
class Operators:
    """The operators, and the expressions that they add to.

    fixed: (operand, dimension) whose size the expressions were made for.
    """

    x: Expressions
    fixed: dict[tuple[int, int], int] = field(default_factory=dict)

    def operand(self, number: int, dtype: torch.dtype, shape: Sequence[Any]) -> Cells:
        """A captured tensor."""
        register = register_of(dtype)
        limits = None if dtype.is_floating_point or dtype == torch.bool else Range(torch.iinfo(dtype).min, torch.iinfo(dtype).max)

        def at(index: tuple[Index, ...]) -> int:
            for dim, i in enumerate(index):
                if isinstance(i, int) or not i.bare:  # which the size has a part in
                    if not isinstance(shape[dim], int):
                        raise Untranslatable("it counts along a dimension whose size varies")
                    self.fixed[number, dim] = shape[dim]
            return self.x.add("load", register, *map(self.node, index), number=number, within=limits)

        sizes = tuple(size if isinstance(size, int) else size.node.hint for size in shape)
        return self.made(dtype, sizes, at)

    def node(self, index: Index) -> int:
        """An index as a node."""
        return self.x.whole(index) if isinstance(index, int) else index.node

    def made(self, dtype: torch.dtype, shape: Sequence[int], at: Callable[[tuple[Index, ...]], int]) -> Cells:
        """A tensor; a single number is computed at once."""
        if not shape:
            node = at(())
            return Cells(dtype, (), lambda _: node)
        return Cells(dtype, tuple(shape), at)

    def call(self, op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Cells:
        """One operator's result."""
        name = str(op._schema.name).removeprefix("aten::")
        out = op(*_metas(args), **_metas(kwargs))
        if out.dtype.is_complex:
            raise Untranslatable(f"{op} gives complex numbers")
        if name in POINTWISE:
            return self._pointwise(name, op, out, args, kwargs)
        if name not in OPERATORS:
            raise Untranslatable(f"the tape has no {op}")
        return OPERATORS[name](self, out, *args, **kwargs)

    def _pointwise(self, name: str, op: Any, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Cells:
        compute = _computing_dtype(args) if out.dtype == torch.bool else out.dtype
        shape = tuple(out.shape)

        def at(index: tuple[Index, ...]) -> int:
            given = [_entry(arg, index) for arg in args]
            cell = Cell(self.x, op, out.dtype, compute)
            return cell.result(POINTWISE[name](cell, *given, **kwargs))

        return self.made(out.dtype, shape, at)

    def within(self, index: Index, size: int) -> Index:
        """An index as a position 0 .. size - 1."""
        if isinstance(index, int):
            return index + size if index < 0 else index
        if not index.bare:
            return index
        return Place(self.x.add("within", Register.I64, index.node, number=size, within=Range(0, size - 1)), bare=False)

    def times(self, index: Index, factor: int) -> Index:
        """A position times a number."""
        if isinstance(index, int):
            return index * factor
        return index if factor == 1 else Place(self.x.binary("multiply", index.node, self.x.whole(factor)), bare=False)

    def plus(self, a: Index, b: Index) -> Index:
        """The sum of two positions."""
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0 or b == 0:
            return b if a == 0 else a
        return Place(self.x.binary("add", self.node(a), self.node(b)), bare=False)

    def divided(self, index: Index, by: int) -> tuple[Index, Index]:
        """Quotient and rest of a position."""
        if isinstance(index, int):
            return divmod(index, by)
        number = self.x.whole(by)
        parts = (self.x.binary(op, index.node, number) for op in ("floor_divide", "remainder"))
        quotient, rest = (Place(part, bare=False) for part in parts)
        return quotient, rest

    def moved(self, index: Index, size: int, start: int, step: int) -> Index:
        """start + step * index."""
        return self.plus(self.times(self.within(index, size), step), start)

    def chosen(self, index: Index, size: int, of: Callable[[int], int]) -> int:
        """of(index) for an index that may be computed: of all positions, one after the other."""
        index = self.within(index, size)
        if isinstance(index, int):
            return of(index)
        if size > MOST_ENTRIES:
            raise Untranslatable(f"it looks up one of {size:,} computed numbers, more than {MOST_ENTRIES}")
        out = of(size - 1)
        for i in reversed(range(size - 1)):
            out = self.x.choice(self.x.binary("equal", index.node, self.x.whole(i)), of(i), out)
        return out


def _metas(value: Any) -> Any:
    if isinstance(value, Cells):
        return value.meta
    if isinstance(value, (list, tuple)):
        return [_metas(item) for item in value]
    if isinstance(value, dict):
        return {key: torch.device("meta") if key == "device" else _metas(item) for key, item in value.items()}
    return value


def _computing_dtype(args: Sequence[Any]) -> torch.dtype:
    """The dtype that a comparison is made in."""
    out: list[Any] = [_metas(arg) for arg in args if isinstance(arg, Cells | int | float)]
    dtype: torch.dtype = torch.result_type(out[0], out[-1]) if len(out) > 1 else out[0].dtype
    return dtype


def _entry(arg: Any, index: tuple[Index, ...]) -> Any:
    """The entry of an argument that broadcasts to an index: its node and dtype."""
    if not isinstance(arg, Cells):
        return arg
    own = index[len(index) - len(arg.shape) :] if arg.shape else ()
    return arg.at(tuple(0 if size == 1 else i for i, size in zip(own, arg.shape, strict=True))), arg.dtype


# Shapes ---------------------------------------------------------------------------------------------------------------------


def _same(t: Operators, out: torch.Tensor, x: Cells, **_: Any) -> Cells:
    return x


def _dim(dim: int, dims: int) -> int:
    return dim + dims if dim < 0 else dim


def _permute(t: Operators, out: torch.Tensor, x: Cells, dims: Sequence[int]) -> Cells:
    order = [_dim(dim, len(x.shape)) for dim in dims]
    return t.made(x.dtype, out.shape, lambda index: x.at(tuple(index[order.index(dim)] for dim in range(len(order)))))


def _transpose(t: Operators, out: torch.Tensor, x: Cells, a: int, b: int) -> Cells:
    order = list(range(len(x.shape)))
    a, b = _dim(a, len(order)), _dim(b, len(order))
    order[a], order[b] = order[b], order[a]
    return _permute(t, out, x, order)


def _t(t: Operators, out: torch.Tensor, x: Cells) -> Cells:
    return x if len(x.shape) < 2 else _transpose(t, out, x, 0, 1)


def _unsqueeze(t: Operators, out: torch.Tensor, x: Cells, dim: int) -> Cells:
    at = _dim(dim, len(x.shape) + 1)
    return t.made(x.dtype, out.shape, lambda index: x.at(index[:at] + index[at + 1 :]))


def _select(t: Operators, out: torch.Tensor, x: Cells, dim: int, place: int) -> Cells:
    at = _dim(dim, len(x.shape))
    position = _dim(place, x.shape[at])
    return t.made(x.dtype, out.shape, lambda index: x.at((*index[:at], position, *index[at:])))


def _slice(
    t: Operators, out: torch.Tensor, x: Cells, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Cells:
    at = _dim(dim, len(x.shape))
    first, _, _ = slice(start, end, step).indices(x.shape[at])
    if tuple(out.shape) == x.shape:
        return x
    size = out.shape[at]
    return t.made(x.dtype, out.shape, lambda index: x.at((*index[:at], t.moved(index[at], size, first, step), *index[at + 1 :])))


def _flip(t: Operators, out: torch.Tensor, x: Cells, dims: Sequence[int]) -> Cells:
    turned = {_dim(dim, len(x.shape)) for dim in dims}

    def at(index: tuple[Index, ...]) -> int:
        return x.at(tuple(t.moved(i, x.shape[dim], x.shape[dim] - 1, -1) if dim in turned else i for dim, i in enumerate(index)))

    return t.made(x.dtype, out.shape, at)


def _expand(t: Operators, out: torch.Tensor, x: Cells, sizes: Any, **_: Any) -> Cells:
    return t.made(x.dtype, out.shape, lambda index: _entry(x, index)[0])


def _reshape(t: Operators, out: torch.Tensor, x: Cells, *_: Any) -> Cells:
    """Another shape: dimensions that stay keep their indices, the others go by the place in the whole."""
    shape = tuple(out.shape)
    kept = [size for size in shape if size != 1] == [size for size in x.shape if size != 1]

    def at(index: tuple[Index, ...]) -> int:
        if kept:  # dimensions of one entry come and go
            longer = [i for i, size in zip(index, shape, strict=True) if size != 1]
            return x.at(tuple(0 if size == 1 else longer.pop(0) for size in x.shape))
        flat: Index = 0
        for i, size in zip(index, shape, strict=True):
            flat = t.plus(t.times(flat, size), t.within(i, size))
        own: list[Index] = []
        for size in reversed(x.shape):
            flat, rest = t.divided(flat, size)
            own.insert(0, rest)
        return x.at(tuple(own))

    return t.made(x.dtype, shape, at)


def _stack(t: Operators, out: torch.Tensor, parts: Sequence[Cells], dim: int = 0) -> Cells:
    at = _dim(dim, len(out.shape))

    def entry(index: tuple[Index, ...]) -> int:
        return t.chosen(index[at], len(parts), lambda i: _converted(t, parts[i], index[:at] + index[at + 1 :], out.dtype))

    return t.made(out.dtype, out.shape, entry)


def _cat(t: Operators, out: torch.Tensor, parts: Sequence[Cells], dim: int = 0) -> Cells:
    at = _dim(dim, len(out.shape))
    parts = [part for part in parts if part.shape != (0,)]
    places = [(part, i) for part in parts for i in range(part.shape[at])]

    def entry(index: tuple[Index, ...]) -> int:
        def of(i: int) -> int:
            return _converted(t, places[i][0], (*index[:at], places[i][1], *index[at + 1 :]), out.dtype)

        return t.chosen(index[at], len(places), of)

    return t.made(out.dtype, out.shape, entry)


def _converted(t: Operators, x: Cells, index: tuple[Index, ...], dtype: torch.dtype) -> int:
    return x.at(index) if x.dtype == dtype else t.x.cast(x.at(index), dtype)


def _index(t: Operators, out: torch.Tensor, x: Cells, indices: Sequence[Cells | None]) -> Cells:
    given = {dim: index for dim, index in enumerate(indices) if index is not None}
    if any(index.dtype in (torch.bool, torch.uint8) for index in given.values()):
        raise Untranslatable("it picks entries by a tensor of bools")
    shape = tuple(torch.broadcast_shapes(*(index.shape for index in given.values())))
    dims = sorted(given)
    start = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0

    def at(index: tuple[Index, ...]) -> int:
        inner, rest = index[start : start + len(shape)], [*index[:start], *index[start + len(shape) :]]
        own = [Place(_entry(given[dim], inner)[0]) if dim in given else rest.pop(0) for dim in range(len(x.shape))]
        return x.at(tuple(own))

    return t.made(x.dtype, out.shape, at)


# Constants ------------------------------------------------------------------------------------------------------------------


def _constant(t: Operators, out: torch.Tensor, value: Any) -> Cells:
    def at(_: tuple[Index, ...]) -> int:
        if out.dtype.is_floating_point:
            return t.x.rounded(t.x.constant(float(value), register_of(out.dtype)), out.dtype)
        return t.x.constant(value, register_of(out.dtype)) if out.dtype == torch.bool else t.x.whole(int(value))

    return t.made(out.dtype, out.shape, at)


def _full(t: Operators, out: torch.Tensor, size: Any, value: Any, **_: Any) -> Cells:
    if isinstance(value, Cells):
        return t.made(out.dtype, out.shape, lambda _: _converted(t, value, (), out.dtype))
    return _constant(t, out, value)


def _scalar_tensor(t: Operators, out: torch.Tensor, value: Any, **_: Any) -> Cells:
    return _full(t, out, (), value)


def _arange(t: Operators, out: torch.Tensor, start: float, end: float, step: float = 1, **_: Any) -> Cells:
    if out.dtype.is_floating_point:
        return t.made(
            out.dtype,
            out.shape,
            lambda index: t.chosen(index[0], out.shape[0], lambda i: t.x.constant(start + step * i, register_of(out.dtype))),
        )
    return t.made(out.dtype, out.shape, lambda index: t.node(t.moved(index[0], out.shape[0], int(start), int(step))))


# Reductions -----------------------------------------------------------------------------------------------------------------


def _reduced(t: Operators, out: torch.Tensor, x: Cells, dim: Any, keepdim: bool, of: Callable[[list[int]], int]) -> Cells:
    """of(the nodes of some entries) for each entry of the result."""
    dims = range(len(x.shape)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    along = sorted({_dim(d, len(x.shape)) for d in dims}) if x.shape else []
    sizes = [x.shape[d] for d in along]
    if math.prod(sizes) > MOST_ENTRIES:
        raise Untranslatable(f"it reduces {math.prod(sizes):,} numbers for each pair, more than {MOST_ENTRIES}")

    def at(index: tuple[Index, ...]) -> int:
        rest = [i for d, i in enumerate(index) if d not in along] if keepdim else list(index)
        entries = []
        for place in itertools.product(*map(range, sizes)):
            inner, outer = iter(place), iter(rest)
            entries.append(x.at(tuple(next(inner) if d in along else next(outer) for d in range(len(x.shape)))))
        return of(entries)

    return t.made(out.dtype, out.shape, at)


def _folded(t: Operators, op: str, places: Sequence[int]) -> int:
    total = places[0]
    for place in places[1:]:
        total = t.x.binary(op, total, place)
    return total


def _summed(t: Operators, dtype: torch.dtype, places: Sequence[int]) -> int:
    if not places:
        return t.x.constant(0.0, register_of(dtype)) if dtype.is_floating_point else t.x.whole(0)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = _folded(t, "add", [t.x.cast(place, wide) for place in places])
    return t.x.rounded(total, dtype) if dtype.is_floating_point else t.x.wrapped(total, dtype)


def _sum(t: Operators, out: torch.Tensor, x: Cells, dim: Any = None, keepdim: bool = False, **_: Any) -> Cells:
    return _reduced(t, out, x, dim, keepdim, lambda places: _summed(t, out.dtype, places))


def _mean(t: Operators, out: torch.Tensor, x: Cells, dim: Any = None, keepdim: bool = False, **_: Any) -> Cells:
    def of(places: list[int]) -> int:
        total = _summed(t, torch.float32 if out.dtype in (torch.float16, torch.bfloat16) else out.dtype, places)
        return t.x.rounded(t.x.binary("divide", total, t.x.constant(float(len(places)), t.x.type(total))), out.dtype)

    return _reduced(t, out, x, dim, keepdim, of)


def _prod(t: Operators, out: torch.Tensor, x: Cells, dim: Any = None, keepdim: bool = False, **_: Any) -> Cells:
    def of(places: list[int]) -> int:
        total = _folded(t, "multiply", [t.x.cast(place, out.dtype) for place in places])
        return t.x.rounded(total, out.dtype) if out.dtype.is_floating_point else t.x.wrapped(total, out.dtype)

    return _reduced(t, out, x, dim, keepdim, of)


def _extreme(op: str) -> Callable[..., Cells]:
    """amax and amin: the gradient is shared by all entries that are the greatest."""

    def reduction(t: Operators, out: torch.Tensor, x: Cells, dim: Any = None, keepdim: bool = False) -> Cells:
        def of(places: list[int]) -> int:
            if out.dtype == torch.bool:
                return _folded(t, "both" if op == "minimum" else "either", places)
            best = _folded(t, op, places)
            if len(set(places)) < 3 or not out.dtype.is_floating_point:
                return best

            def pull(grad: int) -> list[tuple[int, int]]:
                type = t.x.type(grad)
                one, zero = t.x.constant(1.0, type), t.x.constant(0.0, type)
                are_best = [t.x.binary("equal", place, best) for place in places]
                count = _folded(t, "add", [t.x.choice(is_best, one, zero) for is_best in are_best])
                part = t.x.binary("divide", grad, count)
                return [(place, t.x.choice(is_best, part, zero)) for place, is_best in zip(places, are_best, strict=True)]

            return t.x.apart(best, op, pull)

        return _reduced(t, out, x, dim, keepdim, of)

    return reduction


def _logical(op: str) -> Callable[..., Cells]:
    def reduction(t: Operators, out: torch.Tensor, x: Cells, dim: Any = None, keepdim: bool = False) -> Cells:
        def of(places: list[int]) -> int:
            if not places:
                return t.x.constant(op == "both", register_of(torch.bool))
            return t.x.cast(_folded(t, op, [t.x.cast(place, torch.bool) for place in places]), out.dtype)

        return _reduced(t, out, x, dim, keepdim, of)

    return reduction


def _count_nonzero(t: Operators, out: torch.Tensor, x: Cells, dim: Any = None) -> Cells:
    return _reduced(
        t, out, x, dim, False, lambda places: _summed(t, torch.int64, [t.x.cast(place, torch.bool) for place in places])
    )


def _norm(t: Operators, out: torch.Tensor, x: Cells, ord: float = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Cells:
    if ord not in (1, 2):
        raise Untranslatable(f"the tape has no norm of order {ord}")

    def of(places: list[int]) -> int:
        places = [t.x.cast(place, out.dtype) for place in places]
        if ord == 1:
            return _summed(t, out.dtype, [t.x.unary("absolute", place) for place in places])
        norm = t.x.unary("square_root", _folded(t, "add", [t.x.binary("multiply", place, place) for place in places]))

        def pull(grad: int) -> list[tuple[int, int]]:
            zero = t.x.constant(0.0, t.x.type(grad))
            part = t.x.choice(t.x.binary("equal", norm, zero), zero, t.x.binary("divide", grad, norm))
            return [(place, t.x.binary("multiply", part, place)) for place in places]

        return t.x.rounded(t.x.apart(norm, "norm", pull), out.dtype)

    return _reduced(t, out, x, dim, keepdim, of)


def _logsumexp(t: Operators, out: torch.Tensor, x: Cells, dim: Any, keepdim: bool = False) -> Cells:
    def of(places: list[int]) -> int:
        places = [t.x.cast(place, out.dtype) for place in places]
        most = _folded(t, "maximum", places)
        zero, infinity = t.x.constant(0.0, t.x.type(most)), t.x.constant(math.inf, t.x.type(most))
        shift = t.x.choice(t.x.binary("equal", t.x.unary("absolute", most), infinity), zero, most)
        total = _folded(t, "add", [t.x.unary("exp", t.x.binary("subtract", place, shift)) for place in places])
        result = t.x.binary("add", t.x.unary("log", total), shift)

        def pull(grad: int) -> list[tuple[int, int]]:
            weights = [t.x.unary("exp", t.x.binary("subtract", place, result)) for place in places]
            return [(place, t.x.binary("multiply", grad, weight)) for place, weight in zip(places, weights, strict=True)]

        return t.x.rounded(t.x.apart(result, "logsumexp", pull), out.dtype)

    return _reduced(t, out, x, dim, keepdim, of)


def _products(t: Operators, out: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> int:
    products = [t.x.binary("multiply", a, b) for a, b in pairs]
    if not out.dtype.is_floating_point:
        products = [t.x.wrapped(product, out.dtype) for product in products]
    return _summed(t, out.dtype, products)


def _dot(t: Operators, out: torch.Tensor, a: Cells, b: Cells) -> Cells:
    return t.made(out.dtype, (), lambda _: _products(t, out, list(zip(a.entries(), b.entries(), strict=True))))


def _mv(t: Operators, out: torch.Tensor, a: Cells, b: Cells) -> Cells:
    def at(index: tuple[Index, ...]) -> int:
        if b.shape[0] > MOST_ENTRIES:
            raise Untranslatable(f"it reduces {b.shape[0]:,} numbers for each pair, more than {MOST_ENTRIES}")
        return _products(t, out, [(a.at((index[0], i)), b.at((i,))) for i in range(b.shape[0])])

    return t.made(out.dtype, out.shape, at)


def _mm(t: Operators, out: torch.Tensor, a: Cells, b: Cells) -> Cells:
    def at(index: tuple[Index, ...]) -> int:
        if b.shape[0] > MOST_ENTRIES:
            raise Untranslatable(f"it reduces {b.shape[0]:,} numbers for each pair, more than {MOST_ENTRIES}")
        return _products(t, out, [(a.at((index[0], i)), b.at((i, index[1]))) for i in range(b.shape[0])])

    return t.made(out.dtype, out.shape, at)


def _squeeze(t: Operators, out: torch.Tensor, x: Cells, *_: Any) -> Cells:
    return _reshape(t, out, x)


OPERATORS: dict[str, Callable[..., Cells]] = {
    **dict.fromkeys(("clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "contiguous"), _same),
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _reshape),
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
    "full": _full,
    "full_like": _full,
    "new_full": lambda t, out, x, size, value, **_: _full(t, out, size, value),
    "scalar_tensor": _scalar_tensor,
    **dict.fromkeys(("ones", "ones_like", "new_ones"), lambda t, out, *_, **__: _constant(t, out, 1)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), lambda t, out, *_, **__: _constant(t, out, 0)),
    "arange": _arange,
    "sum": _sum,
    "mean": _mean,
    "prod": _prod,
    "amax": _extreme("maximum"),
    "amin": _extreme("minimum"),
    "all": _logical("both"),
    "any": _logical("either"),
    "count_nonzero": _count_nonzero,
    "linalg_vector_norm": _norm,
    "logsumexp": _logsumexp,
    "dot": _dot,
    "vdot": _dot,
    "mv": _mv,
    "mm": _mm,
}
