"""Recipes: row-wise work as text, an argument of custom operators.

Text (steps.py) can be hashed by caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .gradients import gradients, plan
from .steps import Step, parse, values_of


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
        return Recipe(parse(text))

    @property
    def result(self) -> str:
        return self.steps[-1].result

    def run(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        """Compute the result for some rows.

        Frees each value at its last use, and computes in-place where that gives the same bits.
        """
        values, over = values_of(rows, shared), self._over(rows, shared)
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
        kinds, homes = self.kinds(rows, shared), self._homes(rows, shared)
        # 1. A home is free after the last step that uses a value in it.
        last: dict[str, int] = {}
        for number, step in enumerate(self.steps):
            for name in step.names:
                if name in homes:
                    last[homes[name]] = number
        # 2. Count.
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
        """The gradients of the needed rows, in order.

        Zeros if none flows to a row. Those of shared operands are added to `sums`. Recomputes the
        values that it reads, and no others.

        grad: (rows, features), of the result
        needed: names of the operands that need a gradient
        sums: for each needed shared operand, a tensor like it, of its dtype or a wider one; the
            gradient is added in-place
        """
        backward, kinds = plan(self.steps, needed), self.kinds(rows, shared)
        values = values_of(rows, shared)
        # 1. Forward again, as far as a step's backward reads it.
        for step, dying in zip(self.steps, self._last_uses, strict=True):
            if step.result in backward.recomputed:
                step.run(values)
            for name in dying:
                if name not in backward.read:
                    values.pop(name, None)
        # 2. Back, step by step. A value that is not read is a meta tensor.
        grads = {self.result: grad}
        for step in reversed(self.steps):
            if step.result in backward.needed:
                operands = {
                    name: values.get(name, kinds[name]) for name in (step.result, *step.names)
                }
                # No name for the step's gradient and for the list: they would stay live longer.
                for name, piece in gradients(
                    step, grads.pop(step.result), operands, backward.needed, sums
                ):
                    if name in grads:
                        grads[name] = grads[name] + piece
                    else:
                        grads[name] = piece
            values.pop(step.result, None)
        row_grads: list[Tensor] = []
        for name, operand in values_of(rows, ()).items():
            if name in needed:
                row_grads.append(grads[name] if name in grads else torch.zeros_like(operand))
        return row_grads

    def _homes(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> dict[str, str]:
        """For each result the value whose memory it is in.

        Its own, or that of an operand that it overwrites or views; not one of the recipe's
        operands, which are the caller's.
        """
        kinds = self.kinds(rows, shared)
        homes: dict[str, str] = {}
        for step, name in zip(self.steps, self._over(rows, shared), strict=True):
            if name is None and step.definition.is_view:
                # A cast between different dtypes is a copy.
                first = step.names[0]
                if kinds[first].dtype == kinds[step.result].dtype:
                    name = first
            homes[step.result] = step.result
            if name is not None:
                homes[step.result] = homes.get(name, name)
        return homes

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
        values = values_of(empty(rows), empty(shared))
        for step in recipe.steps:
            step.run(values)
    return values


@lru_cache
def _overwritten(recipe: Recipe, rows: Signature, shared: Signature) -> Sequence[str | None]:
    """For each step an operand that its result may overwrite, or None.

    An earlier result at its last use, of the same shape and dtype, that shares memory with no view.
    """
    kinds = _kinds(recipe, rows, shared)
    # 1. Results that share memory with no view.
    unviewed: set[str] = set()
    for step in recipe.steps:
        if step.definition.is_view:
            unviewed.difference_update(step.names)
        else:
            unviewed.add(step.result)

    # 2. For each step the first operand that is free and has the result's kind.
    overwritten: list[str | None] = []
    for step, dying in zip(recipe.steps, recipe._last_uses, strict=True):
        overwritten.append(_free_operand(step, kinds, unviewed.intersection(dying)))
    return overwritten


def _free_operand(step: Step, kinds: Mapping[str, Tensor], free: set[str]) -> str | None:
    """The first operand that a step's result may overwrite, or None.

    kinds: every value as a meta tensor
    free: values at their last use, whose memory no view shares
    """
    if step.definition.over is None:
        return None
    result = kinds[step.result]
    for name in step.names:
        is_same = kinds[name].shape == result.shape and kinds[name].dtype == result.dtype
        if is_same and name in free and step.names.count(name) == 1:
            return name
    return None
