"""Costs of batches: pairs, flops, bytes and time.

Time is counted in flops of one large dense call.
`python benchmarks/kernels.py` shows how well a kernel runs on tiles of a shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ...plans import Cost, Problem
from ..devices import constants
from .batches import Batch
from .lattice import Table

# Bytes moved and allocated per pair, about, to evaluate a mask and to write a bias.
_BYTES_PER_EVALUATED_PAIR = 24
# The budget of a kernel call and its copies: a share of q, k, v and out, or this many bytes where
# that is more.
_SHARE = 0.05
_LEAST_BYTES = 16 * 2**20
# On a GPU, a call of more bytes than this first compares them with a quarter of the free memory.
_UNCHECKED_BYTES = 2**28


def budget(problem: Problem) -> int:
    """Most bytes of a kernel call beyond q, k, v and out."""
    working_set = constants(problem.device).working_set
    return max(int(_SHARE * problem.tensor_bytes), _LEAST_BYTES, working_set)


def _allowed_now(batch: Batch, problem: Problem, backward: bool) -> int:
    """The budget, or less where a GPU's free memory is short."""
    most = budget(problem)
    tiles = batch.queries.count * problem.batch
    if problem.device != "cuda" or tiles * tile_bytes(batch, problem, backward) < _UNCHECKED_BYTES:
        return most
    free, _ = torch.cuda.mem_get_info()
    # Memory that torch's allocator reserved and no tensor uses.
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min(most, max(_LEAST_BYTES, free // 4))


def tile_bytes(batch: Batch, problem: Problem, backward: bool) -> int:
    """Bytes of one tile in a kernel call.

    Its rows, results, bias and scores; in a backward also gradients.
    """
    heads, rows, columns = batch.heads.count, batch.queries.size, batch.keys.size
    itemsize = max(4, problem.itemsize)
    size = heads * (rows + columns) * (problem.head_dim + problem.value_dim) * itemsize
    if backward:
        size *= 3  # out, its gradient, and the gradients of q, k and v
    if problem.scores:
        # Scores that a score_mod and its derivative need at once.
        copies = 4
        if backward:
            copies = 6
        size += heads * rows * columns * itemsize * copies
    return size + batch.evaluated_pairs // batch.queries.count * _BYTES_PER_EVALUATED_PAIR


def pieces(batch: Batch, problem: Problem, backward: bool) -> Iterator[tuple[Batch, range]]:
    """Parts of a batch that fit the budget, with their batch entries.

    One key head at a time if a tile for all heads does not fit.
    """
    most = _allowed_now(batch, problem, backward)
    parts: Iterable[Batch] = (batch,)
    if tile_bytes(batch, problem, backward) > most:
        parts = batch.by_kv_head()
    for part in parts:
        entries, tiles = _at_once(part, problem, backward, most)
        for start in range(0, problem.batch, entries):
            for piece in part.split(tiles):
                yield piece, range(start, min(start + entries, problem.batch))


def _at_once(batch: Batch, problem: Problem, backward: bool, most: int) -> tuple[int, int]:
    """Batch entries and tiles per entry that fit `most` bytes.

    At least one of both.
    """
    fitting = max(1, most // tile_bytes(batch, problem, backward))
    entries = min(problem.batch, fitting)
    return entries, min(batch.queries.count, fitting // entries)


def of(batches: list[Batch], problem: Problem) -> Cost:
    """The cost of running these batches."""
    width = 2 * (problem.head_dim + problem.value_dim)
    pairs = sum(batch.pairs for batch in batches) * problem.batch
    copied = sum(_copied_bytes(batch, problem) for batch in batches) * problem.batch
    calls = sum(_calls(batch, problem) for batch in batches)
    # Time: flops at the rates of the tiles' shapes, copies and kernel launches.
    device = constants(problem.device)
    slowed_pairs = sum(batch.pairs / _rate(batch) for batch in batches)
    flops = slowed_pairs * problem.batch * width / device.tiles
    # Memory: the largest call.
    forward = max((_call_bytes(batch, problem, False) for batch in batches), default=0)
    backward = max((_call_bytes(batch, problem, True) for batch in batches), default=0)
    if problem.itemsize < 4:
        # The float32 sums are twice as large as the rounded gradients, which do not exist yet. At
        # the end the gradient of q is rounded first, while all three sums exist.
        grad_q = problem.batch * problem.heads * problem.q_len * problem.head_dim * problem.itemsize
        backward = problem.footprint.inputs + max(backward, grad_q)
    return Cost(
        pairs=pairs,
        kernel_flops=pairs * width,
        copied_bytes=copied,
        calls=calls,
        peak_bytes=forward,
        dense_flops=flops + copied * device.flops_per_byte + calls * device.flops_per_call,
        backward_bytes=backward,
    )


def _rate(batch: Batch) -> float:
    """Kernel rate on a batch's tiles, relative to large tiles."""
    rows = batch.queries.size
    if rows < 64:
        return 0.5
    if rows < 192:
        return 0.65
    if rows < 768:
        return 0.85
    return 1.0


def _calls(batch: Batch, problem: Problem) -> int:
    """Number of kernel calls for a batch."""
    heads, part, most = 1, batch, budget(problem)
    if tile_bytes(batch, problem, False) > most:
        # One key head at a time.
        heads, part = batch.kv_heads.count, next(batch.by_kv_head())
    entries, tiles = _at_once(part, problem, False, most)
    return heads * -(-problem.batch // entries) * -(-batch.queries.count // tiles)


def _call_bytes(batch: Batch, problem: Problem, backward: bool) -> int:
    """Bytes of the largest kernel call for a batch."""
    part, most = batch, budget(problem)
    if tile_bytes(batch, problem, backward) > most:
        part = next(batch.by_kv_head())
    entries, tiles = _at_once(part, problem, backward, most)
    return entries * tiles * tile_bytes(part, problem, backward)


def _copied_bytes(batch: Batch, problem: Problem) -> int:
    """Bytes read and written around the kernel: merged results, gathered tiles, biases."""
    queries = batch.heads.count * batch.queries.count * batch.queries.size
    # A merge reads the part and the total, and writes the total.
    numbers = 3 * queries * problem.value_dim
    if isinstance(batch.keys, Table):
        # A gather reads and writes queries, keys and values.
        keys = batch.kv_heads.count * batch.keys.count * batch.keys.size
        gathered = keys * (problem.head_dim + problem.value_dim)
        numbers += 2 * (queries * problem.head_dim + gathered)
    return numbers * problem.itemsize + batch.evaluated_pairs * _BYTES_PER_EVALUATED_PAIR
