"""Work on rows as a value that prints: what a custom op is told to do, as text that an fx graph and the compile cache can hold.

v0 = layer_norm(x0, w0, w1, eps=1e-05)      x0, x1, ...   operands whose rows are worked on
v1 = linear(v0, w2, w3)                     w0, w1, ...   operands that all rows share
v2 = gelu(v1, approximate='none')           v0, v1, ...   results; the last is the recipe's
v3 = linear(v2, w4, w5)
v4 = add(x0, v3)
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .primitives import PRIMITIVES, Primitive, Reads

Operand = str | float | None
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One line: result = primitive(*operands, **options). Operands: names of values, numbers, None."""

    result: str
    primitive: str
    operands: tuple[Operand, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        arguments = [str(each) for each in self.operands] + [f"{name}={value!r}" for name, value in self.options]
        return f"{self.result} = {self.primitive}({', '.join(arguments)})"

    @property
    def does(self) -> Primitive:
        return PRIMITIVES[self.primitive]

    @property
    def names(self) -> list[str]:
        """The operands that are values."""
        return [each for each in self.operands if isinstance(each, str)]

    def given(self, values: Mapping[str, Tensor]) -> list[Any]:
        return [values[each] if isinstance(each, str) else each for each in self.operands]

    def run(self, values: Values) -> None:
        values[self.result] = self.does.forward(*self.given(values), **dict(self.options))

    def run_over(self, name: str, values: Values) -> None:
        """The same into the memory of an operand, one that can be: see `over`."""
        assert self.does.over is not None
        others = [each for each in self.given(values) if each is not values[name]]
        values[self.result] = self.does.over(values[name], *others, **dict(self.options))


@dataclass(frozen=True)
class Recipe:
    """At least one step. `Recipe.parse(str(recipe)) == recipe`."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.steps))

    @staticmethod
    @lru_cache
    def parse(text: str) -> Recipe:
        return Recipe(tuple(_step(line) for line in ast.parse(text).body))

    @property
    def result(self) -> str:
        return self.steps[-1].result

    def run(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        """The result for some rows, each (..., features). Holds no value longer than it is used, and writes over what it can."""
        values, over = _named(rows, shared), self._over(rows, shared)
        for step, name, dying in zip(self.steps, over, self._dying, strict=True):
            if name is None:
                step.run(values)
            else:
                step.run_over(name, values)
            for each in dying:
                del values[each]
        return values[self.result]

    def kinds(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Every value as a meta tensor of one row: its features and its dtype."""
        return _kinds(self, _signature(rows, one_row=True), _signature(shared))

    def kind(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        """The result's."""
        return self.kinds(rows, shared)[self.result]

    def row_bytes(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> int:
        """What all results of one row take."""
        kinds = self.kinds(rows, shared)
        return sum(kinds[step.result].nbytes for step in self.steps)

    def held_bytes(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> int:
        """What `run` holds at most of one row, its result included."""
        kinds, over, homes = self.kinds(rows, shared), self._over(rows, shared), dict[str, str]()
        for step, name in zip(self.steps, over, strict=True):
            if name is None and step.does.is_view and kinds[step.names[0]].dtype == kinds[step.result].dtype:
                name = step.names[0]
            homes[step.result] = step.result if name is None else homes.get(name, name)
        last = {homes[name]: number for number, step in enumerate(self.steps) for name in step.names if name in homes}
        held = most = 0
        for number, step in enumerate(self.steps):
            held += kinds[step.result].nbytes if homes[step.result] == step.result else 0
            most = max(most, held)
            held -= sum(kinds[home].nbytes for home, at in last.items() if at == number and home in homes)
        return most

    def backward(
        self, grad: Tensor, rows: Sequence[Tensor], shared: Sequence[Tensor], sums: Mapping[str, Tensor], wanted: frozenset[str]
    ) -> list[Tensor]:
        """The gradients of the rows that are wanted, in their order; those of shared operands are added to `sums` in place.

        grad: (rows, features), as the result. wanted: names of operands. sums: a tensor like it for each shared one of them, of
        the same or a wider dtype. Recomputes what it reads, and no more.
        """
        plan, kinds, values = _plan(self, wanted), self.kinds(rows, shared), _named(rows, shared)
        for step, dying in zip(self.steps, self._dying, strict=True):
            if step.result in plan.recomputed:
                step.run(values)
            for name in dying:
                if name not in plan.read:
                    values.pop(name, None)
        grads = {self.result: grad}
        for step in reversed(self.steps):
            if step.result in plan.wanted:
                known = {name: values.get(name, kinds[name]) for name in (step.result, *step.names)}
                for name, piece in _pieces(step, grads.pop(step.result), known, plan.wanted, sums):
                    grads[name] = grads[name] + piece if name in grads else piece
            values.pop(step.result, None)
        return [grads[name] for name in _named(rows, ()) if name in wanted]

    def _over(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Sequence[str | None]:
        """Of each step the operand that its result is written over, if any."""
        return _overwritten(self, _signature(rows, one_row=True), _signature(shared))

    @cached_property
    def _dying(self) -> list[list[str]]:
        """The results that each step uses last."""
        last = {name: number for number, step in enumerate(self.steps) for name in step.names if name.startswith("v")}
        return [[name for name, at in last.items() if at == number] for number in range(len(self.steps))]


@dataclass(frozen=True)
class _Plan:
    """What a backward does. wanted: values that have a gradient; read: by backwards; recomputed: to have those."""

    wanted: frozenset[str]
    read: frozenset[str]
    recomputed: frozenset[str]


@lru_cache
def _plan(recipe: Recipe, wanted: frozenset[str]) -> _Plan:
    for step in recipe.steps:
        if not wanted.isdisjoint(step.names):
            wanted |= {step.result}
    read = frozenset(name for step in recipe.steps if step.result in wanted for name in _read(step, wanted))
    recomputed = set(read)
    for step in reversed(recipe.steps):
        if step.result in recomputed:
            recomputed.update(step.names)
    return _Plan(wanted, read, frozenset(recomputed))


def _read(step: Step, wanted: frozenset[str]) -> list[str]:
    if step.primitive == "linear":
        x, weight = step.names[:2]
        return [weight, *([x] if weight in wanted else [])]
    return {Reads.NOTHING: [], Reads.OPERANDS: step.names, Reads.RESULT: [step.result]}[step.does.reads]


def _pieces(
    step: Step, grad: Tensor, known: Mapping[str, Tensor], wanted: frozenset[str], sums: Mapping[str, Tensor]
) -> list[tuple[str, Tensor]]:
    """What one step adds to the gradients of values; what it adds to those of shared operands goes to `sums`."""
    if step.primitive == "linear":
        return _linear_pieces(step, grad, known, wanted, sums)
    backward = step.does.backward
    assert backward is not None
    found = backward(grad, known[step.result], *step.given(known), **dict(step.options))
    pieces = []
    for name, piece in zip(step.operands, found, strict=False):  # a number as last operand has no gradient
        if isinstance(name, str) and name in wanted and piece is not None:
            if name in sums:
                sums[name].add_(_over_rows(piece, sums[name]))
            else:
                pieces.append((name, _like(piece, known[name])))
    return pieces


def _linear_pieces(
    step: Step, grad: Tensor, known: Mapping[str, Tensor], wanted: frozenset[str], sums: Mapping[str, Tensor]
) -> list[tuple[str, Tensor]]:
    x, weight, *bias = step.names
    if weight in sums:
        add_product(sums[weight], grad.t(), known[x])
    if bias and bias[0] in sums:
        sums[bias[0]].add_(grad.sum(0, dtype=sums[bias[0]].dtype))
    return [(x, grad @ known[weight])] if x in wanted else []


def zero_sum(weight: Tensor) -> Tensor:
    """Where the gradients of a weight are added up, chunk by chunk: in float32 at least."""
    return torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a second tensor like it where dtypes allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _over_rows(piece: Tensor, total: Tensor) -> Tensor:
    """The gradient of what all rows share: summed over them, and over features where it has one or no dim of them."""
    kept = piece.shape[-1:] == total.shape
    return piece.sum(0, dtype=total.dtype) if kept else piece.sum(dtype=total.dtype)


def _like(piece: Tensor, value: Tensor) -> Tensor:
    """The gradient of a value that was broadcast over features, or converted."""
    narrow = value.shape[-1] == 1 and piece.shape[-1] != 1
    return (piece.sum(-1, keepdim=True) if narrow else piece).to(value.dtype)


def _named(rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Values:
    return {f"x{i}": each for i, each in enumerate(rows)} | {f"w{i}": each for i, each in enumerate(shared)}


Signature = tuple[tuple[tuple[int, ...], torch.dtype], ...]


def _signature(tensors: Sequence[Tensor], *, one_row: bool = False) -> Signature:
    return tuple(((1, int(each.shape[-1])) if one_row else tuple(map(int, each.shape)), each.dtype) for each in tensors)


@lru_cache
def _kinds(recipe: Recipe, rows: Signature, shared: Signature) -> Mapping[str, Tensor]:
    with _disable_current_modes():
        made = [[torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in each] for each in (rows, shared)]
        values = _named(*made)
        for step in recipe.steps:
            step.run(values)
    return values


@lru_cache
def _overwritten(recipe: Recipe, rows: Signature, shared: Signature) -> Sequence[str | None]:
    """A result used for the last time, as large as the step's own and of its dtype, that shares its memory with no other."""
    kinds, found = _kinds(recipe, rows, shared), list[str | None]()
    alone = {step.result for step in recipe.steps if not step.does.is_view}
    alone -= {name for step in recipe.steps if step.does.is_view for name in step.names}
    for step, dying in zip(recipe.steps, recipe._dying, strict=True):
        kind, able = kinds[step.result], step.does.over is not None
        once = [name for name in step.names if name in dying and name in alone and step.names.count(name) == 1]
        fits = (name for name in once if (kinds[name].shape, kinds[name].dtype) == (kind.shape, kind.dtype))
        found.append(next(fits, None) if able else None)
    return found


def _step(line: ast.stmt) -> Step:
    assert isinstance(line, ast.Assign)
    assert isinstance(line.value, ast.Call)
    (target,), call = line.targets, line.value
    assert isinstance(target, ast.Name)
    assert isinstance(call.func, ast.Name)
    operands = tuple(each.id if isinstance(each, ast.Name) else ast.literal_eval(each) for each in call.args)
    options = tuple((str(each.arg), ast.literal_eval(each.value)) for each in call.keywords)
    return Step(target.id, call.func.id, operands, options)
