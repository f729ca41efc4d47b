"""Ways to run a program, with bytes and seconds predicted by plans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .. import fitting, masks, planner, rates
from ..compiler import plan
from ..masks import Mask
from ..plans import Plan
from ..programs import Program
from ..ring.loads import Load
from ..ring.plans import RingPlan

# Pairs of a head whose tiles are counted in about a second. Past these the allowed pairs replace
# the computed ones, which differ little where most tiles are full, and no ring is planned.
_MOST_COUNTED = 2**33
# The most ranks of a ring, and parts of a stream, that are tried.
_MOST_RANKS, _MOST_PARTS = 1024, 2**18
# Parts of a stream in memory: computed, read ahead, written, and their buffers for the next.
_PARTS_IN_MEMORY = 3


@dataclass(frozen=True)
class Request:
    """A problem, and what it may take.

    tokens, batch, heads, kv_heads, head_dim: sizes of q and k.
    dtype: a name, as "float32".
    device: "cpu" or "cuda".
    training: whether a backward follows.
    limit: bytes of one device.
    seconds: longest time of a call.
    flops: rate of dense attention on the device, in flops a second; None for the measured one.
    """

    tokens: int
    limit: int
    batch: int = 1
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    training: bool = False
    seconds: float = 10.0
    flops: float | None = None

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, N, D)."""
        return self.batch, self.heads, self.tokens, self.head_dim

    @cached_property
    def all_pairs(self) -> int:
        """Pairs that full attention computes: tiles of few tokens are padded."""
        pairs, _ = _work(self.plan(masks.full()))
        return pairs

    def plan(self, program: Program | Mask, **options: Any) -> Any:
        """The plan of a program: a `Plan`, or with `ranks` a `RingPlan`."""
        return plan(
            program,
            self.q_shape,
            self.kv_heads,
            dtype=getattr(torch, self.dtype),
            device=self.device,
            training=self.training,
            **options,
        )

    def time(self, lowering: str, dense_flops: float) -> float | None:
        """Expected seconds; None where no rate was measured or given."""
        if self.flops is None:
            return rates.seconds(lowering, self.dtype, self.device, dense_flops, self.training)
        work = 1.0
        if self.training:
            work = rates.FORWARD_AND_BACKWARD
        return dense_flops * work / self.flops


@dataclass(frozen=True)
class Way:
    """A way to run a program.

    kind: "call", "ring" or "stream".
    ranks: devices of a ring, parts of a stream, 1 of a call.
    peak_bytes: of one device.
    seconds: of the slowest device, without the time of messages and files; None if unknown.
    """

    kind: str
    ranks: int
    peak_bytes: int
    seconds: float | None

    def __str__(self) -> str:
        if self.kind == "ring":
            return f"ring of {self.ranks:,}"
        if self.kind == "stream":
            return f"{self.ranks:,} parts"
        return "one call"

    @property
    def code(self) -> str:
        """How the way is called in Python."""
        if self.kind == "ring":
            return (
                'cd.compile(program, mesh=device_mesh, layout="contiguous")(q, k, v)'
                f"  # shards, on {self.ranks:,} processes"
            )
        if self.kind == "stream":
            return (
                f'cd.compile(program, ranks={self.ranks}, transport="streamed")'
                '("q.npy", "k.npy", "v.npy", "out.npy", journal="journal")'
            )
        return "cd.compile(program)(q, k, v)"


@dataclass(frozen=True)
class Weighed:
    """A program for a request, and the ways to run it.

    pairs: computed pairs as a share of those that full attention computes.
    longest: tokens of the longest sequence that fits in one call.
    ways: one call first.
    """

    pairs: float
    longest: int
    ways: tuple[Way, ...]


def weigh(program: Program, request: Request) -> Weighed:
    """The ways of a program that are worth a look.

    A stream and a ring are considered where one call does not fit.
    """
    call: Plan = request.plan(program)
    size = call.memory.total
    pairs, dense_flops = _work(call)
    ways = [Way("call", 1, size, request.time(call.lowering, dense_flops))]
    if size > request.limit and not _is_beyond_counting(call):
        ways += _first_fitting(_streams(program, request, ways[0]), request.limit)
        ways += _first_fitting(_rings(program, request, size), request.limit)
    longest, _, _ = fitting.longest(call, "auto", request.limit)
    return Weighed(pairs / request.all_pairs, longest, tuple(ways))


def _is_beyond_counting(call: Plan) -> bool:
    """Whether the allowed pairs have too many tiles to count."""
    problem = call.problem
    most = _MOST_COUNTED * problem.batch * problem.heads
    return call.useful_pairs is not None and call.useful_pairs > most


def _work(call: Plan) -> tuple[int, float]:
    """Pairs that a call computes, and the dense flops of its time."""
    if call.lowering == "native" and call.useful_pairs is not None and _is_beyond_counting(call):
        pairs = call.useful_pairs
        return pairs, 2.0 * pairs * (call.problem.head_dim + call.problem.value_dim)
    return call.cost.pairs, call.cost.dense_flops


def _first_fitting(options: Iterator[Way], limit: int) -> list[Way]:
    """The first way within a limit, as a list; possibly empty."""
    for way in options:
        if way.peak_bytes <= limit:
            return [way]
    return []


def _powers(least: float, most: int) -> Iterator[int]:
    """Powers of two from `least` to `most`."""
    count = 2
    while count < least:
        count *= 2
    while count <= most:
        yield count
        count *= 2


def _rings(program: Program, request: Request, size: int) -> Iterator[Way]:
    """Rings of ever more ranks, from the first that may fit.

    Contiguous: the layout that moves least for windows and segments, and the only one whose plan
    takes no time over long sequences.
    """
    for ranks in _powers(size / request.limit, min(_MOST_RANKS, request.tokens)):
        ring: RingPlan = request.plan(program, ranks=ranks, layout="contiguous")
        peak = max(_bytes_of_rank(ring, load) for load in ring.loads)
        slowest = max(load.dense_flops for load in ring.loads)
        yield Way("ring", ranks, peak, request.time(_lowering(ring), slowest))


def _streams(program: Program, request: Request, call: Way) -> Iterator[Way]:
    """Streams of ever more parts.

    Only a forward is streamed, and no data tensors.
    """
    if request.training or program.names:
        return
    least = _PARTS_IN_MEMORY * call.peak_bytes / request.limit
    for parts in _powers(least, min(_MOST_PARTS, request.tokens)):
        ring: RingPlan = request.plan(program, ranks=parts, layout="contiguous")
        peak = max(_bytes_of_part(ring, load) for load in ring.loads)
        yield Way("stream", parts, peak, call.seconds)
        # A part receives no less where there are more of them: dense attention needs all keys.
        received = max(load.received_bytes for load in ring.loads)
        if _PARTS_IN_MEMORY * received > request.limit:
            return


def _lowering(ring: RingPlan) -> str:
    """The lowering of most blocks: native where one device has it."""
    return planner.plan_for(ring.problem).lowering


def _shards(ring: RingPlan, load: Load) -> tuple[int, int, int]:
    """Bytes of a rank's inputs (q, k, v), out and lse."""
    problem, tokens = ring.problem, ring.schedule.layout.count(load.rank)
    rows = problem.batch * problem.heads * tokens
    share = problem.tensor_bytes * tokens // problem.q_len
    out = rows * problem.value_dim * problem.itemsize
    return share - out, out, rows * max(4, problem.itemsize)


def _bytes_of_rank(ring: RingPlan, load: Load) -> int:
    """Peak bytes of a rank: shards, messages, kernels, and gradients in training."""
    inputs, out, lse = _shards(ring, load)
    if not ring.problem.training:
        return load.peak_bytes + lse
    # Gradients are summed in float32 or wider, also those of messages, and rounded at the end.
    itemsize = ring.problem.itemsize
    wider = max(4, itemsize) / itemsize
    sums = int(inputs * wider)
    if itemsize < 4:
        sums += inputs
    messages = load.peak_bytes - inputs - out
    return load.peak_bytes + 2 * lse + out + sums + int(messages * wider)


def _bytes_of_part(ring: RingPlan, load: Load) -> int:
    """Peak bytes of a stream at a part.

    Parts and all their messages are in memory, and the kernels.
    """
    inputs, out, lse = _shards(ring, load)
    kernels = load.peak_bytes - inputs - out
    return _PARTS_IN_MEMORY * (inputs + out + load.received_bytes) + lse + kernels
