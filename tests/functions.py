"""score_mods and mask_mods: bodies, their compositions, and every kind of Python function.

parameters = Parameters.of(heads, n, dtype)      the tensors and numbers that the functions capture
fn = WRAPPINGS["bound method"](score_mod(("alibi", "soft cap"), parameters))
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import noop_mask

Mod = Callable[..., Any]


@dataclass(frozen=True)
class Parameters:
    """The values that functions capture; the float tensors are leaves.

    table: (N, N).
    rows: (N, 3).
    slopes: (H,).
    relative: (H, 2 N - 1).
    buckets: (8, H).
    gain: ().
    segments: (N,), int64.
    allowed: (N, N), bool.
    """

    table: Tensor
    rows: Tensor
    slopes: Tensor
    relative: Tensor
    buckets: Tensor
    gain: Tensor
    segments: Tensor
    allowed: Tensor
    number: float = 0.3
    integer: int = 7

    @staticmethod
    def of(
        heads: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0, number: float = 0.3
    ) -> Parameters:
        """Random parameters, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)

        def learned(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return x.to(dtype).requires_grad_()

        allowed = torch.rand(n, n, generator=generator) > 0.4
        segments = torch.randint(0, 3, (n,), generator=generator)
        return Parameters(
            table=learned(n, n),
            rows=learned(n, 3),
            slopes=learned(heads),
            relative=learned(heads, 2 * n - 1),
            buckets=learned(8, heads),
            gain=learned(),
            segments=segments,
            allowed=allowed | torch.eye(n, dtype=torch.bool),
            number=number,
        )

    @property
    def detached(self) -> Parameters:
        """The parameters without gradients."""
        tensors: dict[str, Any] = {}
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                tensors[name] = x.detach()
        return replace(self, **tensors)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that get gradients."""
        return self.table, self.rows, self.slopes, self.relative, self.buckets, self.gain


# Bodies: closures over parameters


def alibi(p: Parameters) -> Mod:
    slopes = p.slopes
    return lambda score, b, h, i, j: score - slopes[h] * (i - j).abs() / 8


def looked_up(p: Parameters) -> Mod:
    table = p.table
    return lambda score, b, h, i, j: score + table[i, j]


def looked_up_twice(p: Parameters) -> Mod:
    table = p.table
    return lambda score, b, h, i, j: score + table[i][j]


def relative_positions(p: Parameters) -> Mod:
    relative, most = p.relative, p.integer
    return lambda score, b, h, i, j: score + relative[h, torch.clamp(i - j, -most, most) + most]


def relative_positions_by_head_of_rows(p: Parameters) -> Mod:
    relative, most = p.relative, p.integer
    return lambda score, b, h, i, j: score + relative[h][(i - j).clamp(min=-most, max=most) + most]


def t5_buckets(p: Parameters) -> Mod:
    buckets = p.buckets

    def mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = (i - j).abs()
        far = 4 + (torch.log(distance.clamp(min=1) / 4) / math.log(16) * 4).to(torch.int64)
        return score + buckets[torch.where(distance < 4, distance, far.clamp(4, 7)), h]

    return mod


def row_products(p: Parameters) -> Mod:
    rows = p.rows
    return lambda score, b, h, i, j: score + (rows[i] * rows[j]).sum()


def row_dots(p: Parameters) -> Mod:
    rows = p.rows
    return lambda score, b, h, i, j: score + 0.5 * torch.dot(rows[i], rows[j])


def row_cosines(p: Parameters) -> Mod:
    rows = p.rows
    return lambda score, b, h, i, j: score * torch.sigmoid((rows[i] - rows[j]).square().mean())


def row_maxima(p: Parameters) -> Mod:
    rows = p.rows
    return lambda score, b, h, i, j: score + torch.stack([rows[i, 0], rows[j, 1], score]).amax()


def soft_cap(p: Parameters) -> Mod:
    cap = p.integer
    return lambda score, b, h, i, j: cap * torch.tanh(score / cap)


def learned_soft_cap(p: Parameters) -> Mod:
    gain = p.gain
    return lambda score, b, h, i, j: (1 + gain.square()) * torch.tanh(score)


def temperature(p: Parameters) -> Mod:
    number = p.number
    return lambda score, b, h, i, j: score * number - b / 8


def hidden_ahead(p: Parameters) -> Mod:
    number = p.number
    return lambda score, b, h, i, j: torch.where(i + 3 >= j, score * (1 + number), -math.inf)


def same_segment(p: Parameters) -> Mod:
    segments, gain = p.segments, p.gain
    return lambda score, b, h, i, j: torch.where(
        segments[i] == segments[j], score + gain, score - 1.0
    )


def all_of(p: Parameters) -> Mod:
    integer = p.integer
    return lambda score, b, h, i, j: torch.where(
        torch.stack([i >= j, i - j < integer, j % 2 == 0]).all(), score, 0.5 * score
    )


def in_place(p: Parameters) -> Mod:
    table = p.table

    def mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score * 1.5
        score += table[j, i]
        score *= 0.5
        return score

    return mod


SCORE_MODS: dict[str, Callable[[Parameters], Mod]] = {
    "alibi": alibi,
    "table[i, j]": looked_up,
    "table[i][j]": looked_up_twice,
    "table[h, i - j]": relative_positions,
    "table[h][i - j]": relative_positions_by_head_of_rows,
    "T5 buckets": t5_buckets,
    "products of rows": row_products,
    "torch.dot": row_dots,
    "distances of rows": row_cosines,
    "torch.stack and amax": row_maxima,
    "soft cap": soft_cap,
    "learned soft cap": learned_soft_cap,
    "temperature": temperature,
    "-inf": hidden_ahead,
    "torch.where": same_segment,
    "torch.stack and all": all_of,
    "in place": in_place,
}

MASK_MODS: dict[str, Callable[[Parameters], Mod]] = {
    "causal": lambda p: lambda b, h, i, j: i >= j,
    "window": lambda p: _window(p.integer),
    "allowed[i, j]": lambda p: _allowed(p.allowed),
    "allowed[i][j]": lambda p: _allowed_rows(p.allowed),
    "segments": lambda p: _segments(p.segments),
    "torch.stack and all": lambda p: lambda b, h, i, j: torch.stack([i >= j, i - j < 9]).all(),
    "torch.stack and any": lambda p: (
        lambda b, h, i, j: torch.stack([i == j, (i + j) % 3 == 0, j < 2]).any()
    ),
    "by head": lambda p: lambda b, h, i, j: (i - j).abs() <= h * 3,
    "by batch entry": lambda p: lambda b, h, i, j: (i - j).abs() <= 4 + b * 5,
    "distances of rows": lambda p: _near(p.rows),
    "noop_mask": lambda p: noop_mask,
    "torch.where": lambda p: lambda b, h, i, j: torch.where(i % 2 == 0, i >= j, i - j == j % 2),
}


def _window(reach: int) -> Mod:
    return lambda b, h, i, j: (i - j).abs() < reach


def _allowed(allowed: Tensor) -> Mod:
    return lambda b, h, i, j: allowed[i, j]


def _allowed_rows(allowed: Tensor) -> Mod:
    return lambda b, h, i, j: allowed[i][j]


def _segments(segments: Tensor) -> Mod:
    return lambda b, h, i, j: segments[i] == segments[j]


def _near(rows: Tensor) -> Mod:
    return lambda b, h, i, j: (rows[i] - rows[j]).square().sum() < 6.0


def score_mod(names: Sequence[str], parameters: Parameters) -> Mod:
    """The bodies of these names one after another.

    -inf comes last, since its products may be NaN.
    """
    mods = [SCORE_MODS[name](parameters) for name in sorted(names, key="-inf".__eq__)]

    def mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for inner in mods:
            score = inner(score, b, h, i, j)
        return score

    return mod


def mask_mod(names: Sequence[str], parameters: Parameters, join: str = "and") -> Mod:
    """The bodies of these names, joined by "and" or "or"."""
    mods = [MASK_MODS[name](parameters) for name in names]
    operators = {"and": operator.and_, "or": operator.or_}

    def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = mods[0](b, h, i, j)
        for inner in mods[1:]:
            allowed = operators[join](allowed, inner(b, h, i, j))
        return allowed

    return mod


# Kinds of functions


class CallableObject:
    """An object with the function as a method and as its call."""

    def __init__(self, inner: Mod) -> None:
        self.inner = inner

    def method(self, *arguments: Tensor) -> Tensor:
        return self.inner(*arguments)

    __call__ = method


class FunctionModule(nn.Module):
    """A module with the function as a method and as its forward."""

    def __init__(self, inner: Mod) -> None:
        super().__init__()
        self.inner = inner

    def method(self, *arguments: Tensor) -> Tensor:
        return self.inner(*arguments)

    forward = method


def with_default(inner: Mod) -> Mod:
    """A function with the body as a default argument."""

    def of_mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor, inner: Mod = inner) -> Tensor:
        return inner(b, h, i, j)

    def of_score(
        score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, inner: Mod = inner
    ) -> Tensor:
        return inner(score, b, h, i, j)

    return of_score if inner.__code__.co_argcount == 5 else of_mask


def partial_of(inner: Mod) -> Mod:
    """functools.partial with a bound first argument and a bound keyword."""

    def with_more(number: float, *arguments: Tensor, factor: float) -> Tensor:
        result = inner(*arguments)
        return result if result.dtype == torch.bool else result * (number * factor)

    return functools.partial(with_more, 2.0, factor=0.5)


def nested(inner: Mod) -> Mod:
    """A closure over a closure."""

    def outer(inner: Mod) -> Mod:
        return lambda *arguments: inner(*arguments)

    return outer(outer(inner))


WRAPPINGS: dict[str, Callable[[Mod], Mod]] = {
    "closure": lambda inner: inner,
    "nested closure": nested,
    "bound method": lambda inner: CallableObject(inner).method,
    "callable object": CallableObject,
    "bound method of a module": lambda inner: FunctionModule(inner).method,
    "module": FunctionModule,
    "functools.partial": partial_of,
    "default argument": with_default,
}
