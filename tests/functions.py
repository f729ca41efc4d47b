"""score_mods and mask_mods as users write them: bodies from a grammar, wrapped in every kind of function that Python has.

parameters = Parameters.of(heads, n, dtype)            the tensors and numbers that the functions capture
fn = WRAPPINGS["bound method"](score_mod(("alibi", "soft cap"), parameters))
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import noop_mask

Mod = Callable[..., Any]


@dataclass(frozen=True)
class Parameters:
    """What functions capture; the float tensors are leaves.

    table (N, N), rows (N, 3), slopes (H,), relative (H, 2 N - 1), buckets (8, H), gain (); segments (N,) and allowed (N, N)
    learn nothing.
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
    whole: int = 7

    @staticmethod
    def of(
        heads: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0, number: float = 0.3
    ) -> Parameters:
        """Random ones, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)

        def learned(*shape: int) -> Tensor:
            return (
                torch.randn(shape, generator=generator, dtype=torch.float64)
                .to(dtype)
                .requires_grad_()
            )

        allowed = torch.rand(n, n, generator=generator) > 0.4
        segments = torch.randint(0, 3, (n,), generator=generator)
        return Parameters(
            learned(n, n), learned(n, 3), learned(heads), learned(heads, 2 * n - 1), learned(8, heads), learned(),
            segments, allowed | torch.eye(n, dtype=torch.bool), number,
        )  # fmt: skip

    @property
    def detached(self) -> Parameters:
        """The same without gradients."""
        detached: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                detached[field.name] = value.detach()
        return replace(self, **detached)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that learn."""
        return self.table, self.rows, self.slopes, self.relative, self.buckets, self.gain


# Bodies: each makes a closure over what it names. ---------------------------------------------------------------------------


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
    relative, most = p.relative, p.whole
    return lambda score, b, h, i, j: score + relative[h, torch.clamp(i - j, -most, most) + most]


def relative_positions_by_head_of_rows(p: Parameters) -> Mod:
    relative, most = p.relative, p.whole
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
    cap = p.whole
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
    whole = p.whole
    return lambda score, b, h, i, j: torch.where(
        torch.stack([i >= j, i - j < whole, j % 2 == 0]).all(), score, 0.5 * score
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
    "window": lambda p: _window(p.whole),
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
    """Those bodies one after the other, -inf last, as its product with a number may be NaN."""
    mods = [SCORE_MODS[name](parameters) for name in sorted(names, key="-inf".__eq__)]

    def mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for inner in mods:
            score = inner(score, b, h, i, j)
        return score

    return mod


def mask_mod(names: Sequence[str], parameters: Parameters, join: str = "and") -> Mod:
    """Those bodies, joined by "and" or "or"."""
    mods = [MASK_MODS[name](parameters) for name in names]

    def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = mods[0](b, h, i, j)
        for inner in mods[1:]:
            allowed = allowed & inner(b, h, i, j) if join == "and" else allowed | inner(b, h, i, j)
        return allowed

    return mod


# Wrappings ------------------------------------------------------------------------------------------------------------------


class Holder:
    """A plain object whose method or call is the function."""

    def __init__(self, inner: Mod) -> None:
        self.inner = inner

    def method(self, *arguments: Tensor) -> Tensor:
        return self.inner(*arguments)

    __call__ = method


class HolderModule(nn.Module):
    """The same as a module."""

    def __init__(self, inner: Mod) -> None:
        super().__init__()
        self.inner = inner

    def method(self, *arguments: Tensor) -> Tensor:
        return self.inner(*arguments)

    forward = method


def with_default(inner: Mod) -> Mod:
    """A function whose default argument holds the other; of four arguments and of five."""

    def of_mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor, inner: Mod = inner) -> Tensor:
        return inner(b, h, i, j)

    def of_score(
        score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, inner: Mod = inner
    ) -> Tensor:
        return inner(score, b, h, i, j)

    return of_score if inner.__code__.co_argcount == 5 else of_mask


def partial_of(inner: Mod) -> Mod:
    """functools.partial with a bound first argument and one by name."""

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
    "bound method": lambda inner: Holder(inner).method,
    "callable object": Holder,
    "bound method of a module": lambda inner: HolderModule(inner).method,
    "module": HolderModule,
    "functools.partial": partial_of,
    "default argument": with_default,
}
