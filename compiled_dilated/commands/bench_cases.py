"""What `compiled-dilated bench` measures: programs, lengths, rivals, and the figures that they must reach.

Useful FLOPs are 4 * D per allowed pair and head, a pair that two branches allow counted twice; a backward counts 2.5 times its
forward. The dense rate is that of SDPA over all pairs of `dense_tokens` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import masks
from ..compiler import compile, plan
from ..masks import Mask
from ..orders import Order, identity
from ..programs import Program, as_program, hilbert_window, local_window, longnet
from . import rivals
from .rivals import Attention

_BACKWARD = 2.5


@dataclass(frozen=True)
class Setup:
    """How to measure: B 1, `heads` heads of width `head_dim`; at most `repeats` turns, none started after `seconds`."""

    heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    dense_tokens: int = 4096
    repeats: int = 7
    seconds: float = 10.0

    @property
    def judged(self) -> bool:
        """Whether the required figures, which are for float32 on a CPU, apply."""
        return (self.device, self.dtype) == ("cpu", "float32")

    def tensors(self, tokens: int, backward: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, the same in every run."""
        random = torch.Generator(self.device).manual_seed(0)
        shape = (1, self.heads, tokens, self.head_dim)
        q, k, v = (torch.randn(shape, generator=random, device=self.device, dtype=getattr(torch, self.dtype)) for _ in range(3))
        return q.requires_grad_(backward), k.requires_grad_(backward), v.requires_grad_(backward)

    def lacks_memory(self, tokens: int, backward: bool) -> str | None:
        """Why so many tokens do not fit, or None."""
        import psutil

        tensors = 9 if backward else 4
        wanted = 1.25 * tensors * tokens * self.heads * self.head_dim * getattr(torch, self.dtype).itemsize
        free = torch.cuda.mem_get_info()[0] if self.device == "cuda" else psutil.virtual_memory().available
        return None if wanted < free else f"needs {wanted / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"

    def flops(self, allowed_pairs: int, backward: bool) -> float:
        """Useful FLOPs of that many pairs, over all heads."""
        return 4 * self.head_dim * allowed_pairs * (1 + _BACKWARD if backward else 1)

    def dense_flops(self, backward: bool) -> float:
        """Those of the dense call that everything is compared to."""
        return self.flops(self.heads * self.dense_tokens**2, backward)


@dataclass(frozen=True)
class Rival:
    """Something that our time is compared to: `make(setup)` builds it; its time must be `least` times ours."""

    name: str
    least: float
    make: Callable[[Setup], Attention]


@dataclass(frozen=True)
class Case:
    """A program whose useful rate must reach a share of the dense rate, forward and forward + backward."""

    name: str
    program: Program
    tokens: int
    forward: float
    both: float
    rivals: tuple[Rival, ...] = ()
    pairs_per_head: int | None = None

    def pairs(self, setup: Setup) -> int:
        """Allowed pairs over all heads: as the plan counts them, or as the case says where there are too many to count."""
        if self.pairs_per_head is not None:
            return self.pairs_per_head * setup.heads
        counted = plan(self.program, (1, setup.heads, self.tokens, setup.head_dim)).useful_pairs
        assert counted is not None
        return counted


def _flex(name: str, least: float, program: Program, tokens: int, order: Order = identity(), tile: int = 128) -> Rival:
    return Rival(name, least, lambda setup: rivals.flex(program, tokens, setup.heads, setup.device, order, tile))


def _longnet_case(tokens: int, against: bool) -> Case:
    # The union's block mask of 128K tokens takes torch minutes, so that flex is measured at 16K alone.
    flex = (_flex("flex, union", 7.0, LONGNET, tokens),) if against else ()
    return Case(f"longnet-{tokens // 1024}k", LONGNET, tokens, 1.05, 0.95, flex)


def _window_case(tokens: int) -> Case:
    program = local_window(256)
    flex = tuple(_flex(f"flex, tile {tile}", 1.0, program, tokens, tile=tile) for tile in (64, 128))
    return Case(f"window-{tokens // 1024}k", program, tokens, 0.92, 0.85, flex)


def _hilbert_case(side: int) -> Case:
    program, grid = hilbert_window((side, side), 12), (side, side)
    row_major = as_program(masks.neighborhood(grid, 12))
    against = (
        Rival("ours, row-major", 1.0, lambda setup: compile(row_major)),
        _flex("flex, row-major", 1.0, row_major, side * side),
        _flex("flex, Hilbert order", 1.0, row_major, side * side, program.branches[0].order),
    )
    forward = 0.75 if side == 64 else 0.70
    return Case(f"hilbert-{side}x{side}", program, side * side, forward, 0.65, against, pairs_within(side, 12) ** 2)


def pairs_within(size: int, radius: int) -> int:
    """Pairs of coordinates along one axis that are at most `radius` apart."""
    return size + 2 * sum(size - distance for distance in range(1, min(radius, size - 1) + 1))


LONGNET = longnet((2048, 4096, 8192), (1, 2, 4))
CASES = (
    _longnet_case(2**14, True),
    _longnet_case(2**17, False),
    _window_case(2**14),
    _window_case(2**16),
    _hilbert_case(64),
    _hilbert_case(256),
)
QUICK_CASES = tuple(case for case in CASES if case.tokens <= 2**14)

FLAT: Mapping[str, Callable[[int], Program]] = {
    "longnet": lambda tokens: LONGNET,
    "window": lambda tokens: local_window(256),
    "hilbert": lambda tokens: hilbert_window(_grid(tokens), 12),
}
FLAT_WITHIN = 1.15

SHORT: Mapping[str, tuple[Program | Mask, bool, float]] = {
    # name: program, whether dense is causal, the most that our time may be as a multiple of dense
    "longnet": (LONGNET, False, 1.5),
    "causal": (masks.causal(), True, 1.1),
    "window": (masks.window(1024), False, 1.5),
}
SHORT_TOKENS = (512, 1024, 2048)


def _grid(tokens: int) -> tuple[int, int]:
    """Rows and columns, as near to a square as powers of two allow."""
    rows = 2 ** (int(math.log2(tokens)) // 2)
    return rows, tokens // rows
