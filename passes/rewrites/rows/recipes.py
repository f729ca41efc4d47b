"""Row-wise work as text: an argument of a custom op, hashable by caches.

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
    """One line: result = primitive(*operands, **options).

    operands: names of values, numbers, None
    """

    result: str
    primitive: str
    operands: tuple[Operand, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        arguments = [str(operand) for operand in self.operands]
        arguments += [f"{name}={value!r}" for name, value in self.options]
        return f"{self.result} = {self.primitive}({', '.join(arguments)})"

    @property
    def definition(self) -> Primitive:
        return PRIMITIVES[self.primitive]

    @property
    def names(self) -> list[str]:
        """The operands that are values."""
        return [operand for operand in self.operands if isinstance(operand, str)]

    def arguments(self, values: Mapping[str, Tensor]) -> list[Any]:
        """The operands, names replaced by their values."""
        return [values[name] if isinstance(name, str) else name for name in self.operands]

    def run(self, values: Values) -> None:
        """Compute the result and add it to `values`."""
        forward = self.definition.forward
        values[self.result] = forward(*self.arguments(values), **dict(self.options))

    def run_over(self, name: str, values: Values) -> None:
        """Compute the result into the memory of the operand `name`."""
        over = self.definition.over
        assert over is not None
        others = [value for value in self.arguments(values) if value is not values[name]]
        values[self.result] = over(values[name], *others, **dict(self.options))


@dataclass(frozen=True)
class Recipe:
    """At least one step. `Recipe.parse(str(recipe)) == recipe`.

    Its methods take the operands as two lists of tensors: rows (..., features), shared.
    """

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.steps))

    @staticmethod
    @lru_cache
    def parse(text: str) -> Recipe:
        return Recipe(tuple(_parse_step(line) for line in ast.parse(text).body))

    @property
    def result(self) -> str:
        return self.steps[-1].result

    def run(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        """Compute the result for some rows.

        Frees each value at its last use, and computes in-place where that gives the same bits.
        """
        values, over = _values(rows, shared), self._over(rows, shared)
        for step, name, dying in zip(self.steps, over, self._last_uses, strict=True):
            if name is None:
                step.run(values)
            else:
                step.run_over(name, values)
            for used in dying:
                del values[used]
        return values[self.result]

    def kinds(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Every value as a meta tensor of one row."""
        return _kinds(self, _signature(rows, one_row=True), _signature(shared))

    def kind(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        """The result as a meta tensor of one row."""
        return self.kinds(rows, shared)[self.result]

    def row_bytes(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> int:
        """Bytes of all results of one row together."""
        kinds = self.kinds(rows, shared)
        return sum(kinds[step.result].nbytes for step in self.steps)

    def live_bytes(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> int:
        """The peak of `run` in bytes a row, its result included."""
        kinds = self.kinds(rows, shared)
        # 1. homes: for each result the value whose memory it is in: its own, or an operand's that
        # it overwrites or views. An operand of the recipe is nobody's home: it is the caller's.
        homes: dict[str, str] = {}
        for step, name in zip(self.steps, self._over(rows, shared), strict=True):
            if name is None and step.definition.is_view:
                first = step.names[0]
                is_copy = kinds[first].dtype != kinds[step.result].dtype  # a cast
                name = None if is_copy else first
            homes[step.result] = step.result if name is None else homes.get(name, name)
        # 2. A home is free after the last step that uses a value in it.
        last: dict[str, int] = {}
        for number, step in enumerate(self.steps):
            for name in step.names:
                if name in homes:
                    last[homes[name]] = number
        # 3. Count.
        live = most = 0
        for number, step in enumerate(self.steps):
            if homes[step.result] == step.result:
                live += kinds[step.result].nbytes
            most = max(most, live)
            for home, end in last.items():
                if end == number and home in homes:
                    live -= kinds[home].nbytes
        return most

    def backward(
        self,
        grad: Tensor,
        rows: Sequence[Tensor],
        shared: Sequence[Tensor],
        sums: Mapping[str, Tensor],
        needed: frozenset[str],
    ) -> list[Tensor]:
        """The gradients of the needed rows, in order; those of shared operands go to `sums`.

        Recomputes the values that it reads, and no others.

        grad: (rows, features), of the result
        needed: names of the operands that need a gradient
        sums: for each needed shared operand, a tensor like it, of its dtype or a wider one; the
            gradient is added in-place
        """
        plan, kinds, values = _plan(self, needed), self.kinds(rows, shared), _values(rows, shared)
        # 1. Forward again, as far as a step's backward reads it.
        for step, dying in zip(self.steps, self._last_uses, strict=True):
            if step.result in plan.recomputed:
                step.run(values)
            for name in dying:
                if name not in plan.read:
                    values.pop(name, None)
        # 2. Back, step by step. A value that is not read is given as a meta tensor.
        grads = {self.result: grad}
        for step in reversed(self.steps):
            if step.result in plan.needed:
                operands = {
                    name: values.get(name, kinds[name]) for name in (step.result, *step.names)
                }
                # No name for the step's gradient and for the list: they would stay live longer.
                for name, piece in _gradients(
                    step, grads.pop(step.result), operands, plan.needed, sums
                ):
                    grads[name] = grads[name] + piece if name in grads else piece
            values.pop(step.result, None)
        return [grads[name] for name in _values(rows, ()) if name in needed]

    def _over(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Sequence[str | None]:
        """For each step the operand that its result overwrites, or None."""
        return _overwritten(self, _signature(rows, one_row=True), _signature(shared))

    @cached_property
    def _last_uses(self) -> list[list[str]]:
        """For each step the results that it is the last to use."""
        last: dict[str, int] = {}
        for number, step in enumerate(self.steps):
            for name in step.names:
                if name.startswith("v"):
                    last[name] = number
        dying: list[list[str]] = [[] for _ in self.steps]
        for name, number in last.items():
            dying[number].append(name)
        return dying


@dataclass(frozen=True)
class _Plan:
    """The plan of a backward, as names of values.

    needed: values that need a gradient
    read: values that some step's backward reads
    recomputed: values that the forward computes again, to have those
    """

    needed: frozenset[str]
    read: frozenset[str]
    recomputed: frozenset[str]


@lru_cache
def _plan(recipe: Recipe, needed: frozenset[str]) -> _Plan:
    for step in recipe.steps:
        if not needed.isdisjoint(step.names):
            needed |= {step.result}
    read: set[str] = set()
    for step in recipe.steps:
        if step.result in needed:
            read.update(_read_by_backward(step, needed))
    recomputed = set(read)
    for step in reversed(recipe.steps):
        if step.result in recomputed:
            recomputed.update(step.names)
    return _Plan(needed, frozenset(read), frozenset(recomputed))


def _read_by_backward(step: Step, needed: frozenset[str]) -> list[str]:
    """The values that a step's backward reads."""
    if step.primitive == "linear":
        x, weight = step.names[:2]
        return [weight, x] if weight in needed else [weight]
    reads = step.definition.reads
    if reads is Reads.OPERANDS:
        return step.names
    return [step.result] if reads is Reads.RESULT else []


def _gradients(
    step: Step,
    grad: Tensor,
    values: Mapping[str, Tensor],
    needed: frozenset[str],
    sums: Mapping[str, Tensor],
) -> list[tuple[str, Tensor]]:
    """What one step adds to gradients: named tensors for rows, in-place in `sums` for shared."""
    if step.primitive == "linear":
        return _linear_gradients(step, grad, values, needed, sums)
    backward = step.definition.backward
    assert backward is not None
    pieces = backward(grad, values[step.result], *step.arguments(values), **dict(step.options))
    gradients: list[tuple[str, Tensor]] = []
    for name, piece in zip(step.operands, pieces, strict=False):  # a number has no gradient
        if not isinstance(name, str) or name not in needed or piece is None:
            continue
        if name in sums:
            sums[name].add_(_sum_over_rows(piece, sums[name]))
        else:
            gradients.append((name, _reduce_like(piece, values[name])))
    return gradients


def _linear_gradients(
    step: Step,
    grad: Tensor,
    values: Mapping[str, Tensor],
    needed: frozenset[str],
    sums: Mapping[str, Tensor],
) -> list[tuple[str, Tensor]]:
    """As _gradients; products are added to the sums without a tensor of their own."""
    x, weight, *bias = step.names
    if weight in sums:
        add_product(sums[weight], grad.t(), values[x])
    if bias and bias[0] in sums:
        sums[bias[0]].add_(grad.sum(0, dtype=sums[bias[0]].dtype))
    return [(x, grad @ values[weight])] if x in needed else []


def zero_sum(weight: Tensor) -> Tensor:
    """Zeros like a weight, in float32 at least, to sum its gradients."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(weight.shape, dtype=dtype, device=weight.device)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in-place if dtypes allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _sum_over_rows(piece: Tensor, total: Tensor) -> Tensor:
    """The gradient of a shared operand of (features,) or ()."""
    has_features = piece.shape[-1:] == total.shape
    return piece.sum(0, dtype=total.dtype) if has_features else piece.sum(dtype=total.dtype)


def _reduce_like(piece: Tensor, value: Tensor) -> Tensor:
    """The gradient of a value that was broadcast over features, or converted."""
    if value.shape[-1] == 1 and piece.shape[-1] != 1:
        piece = piece.sum(-1, keepdim=True)
    return piece.to(value.dtype)


def _values(rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Values:
    """The operands by their names in a recipe."""
    values = {f"x{i}": value for i, value in enumerate(rows)}
    return values | {f"w{i}": value for i, value in enumerate(shared)}


Signature = tuple[tuple[tuple[int, ...], torch.dtype], ...]


def _signature(tensors: Sequence[Tensor], *, one_row: bool = False) -> Signature:
    """Shapes and dtypes. one_row: of one row of each."""
    signature: list[tuple[tuple[int, ...], torch.dtype]] = []
    for tensor in tensors:
        shape = (1, tensor.shape[-1]) if one_row else tuple(tensor.shape)
        signature.append((tuple(map(int, shape)), tensor.dtype))
    return tuple(signature)


@lru_cache
def _kinds(recipe: Recipe, rows: Signature, shared: Signature) -> Mapping[str, Tensor]:
    def empty(signature: Signature) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in signature]

    with _disable_current_modes():
        values = _values(empty(rows), empty(shared))
        for step in recipe.steps:
            step.run(values)
    return values


@lru_cache
def _overwritten(recipe: Recipe, rows: Signature, shared: Signature) -> Sequence[str | None]:
    """For each step an operand that its result may overwrite, or None.

    An earlier result at its last use, of the same shape and dtype, that shares memory with no view.
    """
    kinds = _kinds(recipe, rows, shared)
    unviewed: set[str] = set()
    for step in recipe.steps:
        if step.definition.is_view:
            unviewed.difference_update(step.names)
        else:
            unviewed.add(step.result)

    overwritten: list[str | None] = []
    for step, dying in zip(recipe.steps, recipe._last_uses, strict=True):
        result = kinds[step.result]
        choice = None
        for name in step.names if step.definition.over is not None else ():
            same = kinds[name].shape == result.shape and kinds[name].dtype == result.dtype
            is_free = name in dying and name in unviewed and step.names.count(name) == 1
            if same and is_free:
                choice = name
                break
        overwritten.append(choice)
    return overwritten


def _parse_step(line: ast.stmt) -> Step:
    assert isinstance(line, ast.Assign)
    assert isinstance(line.value, ast.Call)
    (target,), call = line.targets, line.value
    assert isinstance(target, ast.Name)
    assert isinstance(call.func, ast.Name)
    operands = [
        argument.id if isinstance(argument, ast.Name) else ast.literal_eval(argument)
        for argument in call.args
    ]
    options = [(str(option.arg), ast.literal_eval(option.value)) for option in call.keywords]
    return Step(target.id, call.func.id, tuple(operands), tuple(options))
