"""How well the kernels run on tiles of a shape: measured shares of a dense kernel's rate, and what moving bytes costs beside it.

Figures for ATen's flash attention on a CPU (its query blocks are 32, 64 and 256 rows from 1, 192 and 768 queries on);
reproduce with `python benchmarks/kernels.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..plans import Cost, Problem
from .batches import Batch
from .lattice import Lattice

# A dense kernel does this many flops while one byte is copied, or while a kernel call is set up.
_FLOPS_PER_BYTE = 10.0
_FLOPS_PER_CALL = 4e6

# Asking a mask about a pair, and writing the answer into a bias, moves about so many bytes.
_BIAS_BYTES = 16

# The most a forward, or a backward, may hold beyond its tensors, as a share of q, k, v and out; and the least that is worth
# having beside short sequences.
_FORWARD_SHARE, _BACKWARD_SHARE = 0.01, 0.05
_LEAST_BYTES, _LONG_BYTES = 8 * 2**20, 256 * 2**20
# What a forward's kernel returns is merged while it is still in the cache.
_MOST_FORWARD_BYTES = 8 * 2**20
# Biases that stay from call to call: of long sequences a share, of short ones up to so many bytes.
_KEPT_SHARE, _MOST_KEPT_BYTES = 0.005, 16 * 2**20


def efficiency(problem: Problem, rows: int, columns: int) -> float:
    """Rate on tiles of `rows` queries by `columns` keys, as a share of the rate on dense 4096 x 4096."""
    if problem.itemsize == 2:
        by_rows = 0.3 if rows < 32 else 0.5 if rows < 64 else 0.7 if rows < 192 else 0.85 if rows < 768 else 1.0
    else:
        by_rows = 0.45 if rows < 64 else 0.6 if rows < 128 else 0.65 if rows < 192 else 0.85 if rows < 768 else 1.0
    return by_rows * (0.8 if columns < 256 else 1.0)


def seconds(flops: float, moved_bytes: float, calls: float) -> float:
    """Time in units of dense flops: what the kernels compute, what is moved beside them, what calls take to set up."""
    return flops + moved_bytes * _FLOPS_PER_BYTE + calls * _FLOPS_PER_CALL


def budget(problem: Problem, backward: bool) -> int:
    """Bytes that the work at hand may take beyond q, k, v and out."""
    share, most = (_BACKWARD_SHARE, problem.tensor_bytes) if backward else (_FORWARD_SHARE, _MOST_FORWARD_BYTES)
    least = min(_LEAST_BYTES, problem.tensor_bytes) if problem.tensor_bytes < _LONG_BYTES else 0
    return min(max(int(share * problem.tensor_bytes), least), most)


def tile_bytes(batch: Batch, problem: Problem, backward: bool) -> int:
    """Bytes held per tile of a batch while it is computed.

    Results, copies of tiles, biases of their own, scores under a score_mod.
    """
    heads, kv_heads = (batch.alike * each.count for each in (batch.heads, batch.kv_heads))
    rows, columns = batch.queries.size, batch.keys.size
    q_bytes, k_bytes = heads * rows * problem.itemsize, kv_heads * columns * problem.itemsize
    width = max(problem.head_dim, problem.value_dim)
    padded = problem.head_dim != problem.value_dim
    # In low precision a CPU's forward repacks keys and values, and its backward works on copies in float32.
    converts = problem.itemsize == 2 and problem.device == "cpu"
    held = q_bytes * width + heads * rows * 20
    if backward:
        held += 2 * k_bytes * width * (2 if converts else 1)
        if converts and batch.overlaps:
            held += 2 * kv_heads * rows * width * 4  # sums; neighbouring tiles share most keys
    if batch.queries.copies or padded or (backward and converts):
        held += q_bytes * width * (3 if backward else 1) * (2 if converts else 1)
    if batch.keys.copies or padded or converts:
        held += int(2 * k_bytes * width * _share_copied(batch, backward and converts)) * (2 if converts else 1)
    if batch.masks and not batch.shared:
        held += rows * columns * (12 if not batch.bias.key_only else 0)
    if problem.scores:
        held += heads * rows * columns * (6 if backward else 4) * max(4, problem.itemsize)
    return held


def _share_copied(batch: Batch, converts: bool = False) -> float:
    """Tiles in a strip share a copy: of each only the rows that the one before does not have."""
    if isinstance(batch.keys, Lattice) and batch.strips(converts):
        (count, stride), (size, step) = batch.keys.tiles[0], batch.keys.rows[0]
        return ((count - 1) * (stride // step) + size) / (count * size)
    return 1.0


def tiles_at_once(batch: Batch, problem: Problem, backward: bool) -> int:
    """How many tiles of a batch fit the budget together; at least one.

    In a backward on a CPU, where a thread takes whole heads of whole tiles, as many as leave no thread idle at the end.
    """
    most = max(1, budget(problem, backward) // tile_bytes(batch, problem, backward))
    if not backward or problem.device != "cpu" or most >= batch.queries.count:
        return most
    each, threads = batch.heads.count * batch.alike, torch.get_num_threads()
    return next((tiles for tiles in range(most, most // 2, -1) if tiles * each % threads == 0), most)


def exceeds(batch: Batch, problem: Problem, backward: bool) -> bool:
    """Whether one tile, for all heads of the batch, is more than the budget allows."""
    return tile_bytes(batch, problem, backward) > budget(problem, backward)


def keep_biases(batches: list[Batch], problem: Problem) -> list[Batch]:
    """Mark the biases worth keeping from call to call: those of most tiles first, up to a small share of the tensors."""
    short = problem.tensor_bytes < _LONG_BYTES
    left = min(_MOST_KEPT_BYTES, 2 * problem.tensor_bytes) if short else int(_KEPT_SHARE * problem.tensor_bytes)
    kept = set()
    for i, batch in sorted(enumerate(batches), key=lambda each: -each[1].queries.count):
        size = _lasting_bytes(batch, problem)
        if 0 < size <= left:
            kept.add(i)
            left -= size
    return [
        replace(batch, lasting=batch.bias.beginning(), kept=i in kept) if batch.bias.lasting_entries else batch
        for i, batch in enumerate(batches)
    ]


def _lasting_bytes(batch: Batch, problem: Problem) -> int:
    return batch.bias.lasting_entries * max(problem.itemsize, 4)


def of(batches: list[Batch], problem: Problem) -> Cost:
    """The cost of running these batches."""
    width = 2 * (problem.head_dim + problem.value_dim)
    pairs, copied, calls, dense = 0, 0, 0, 0.0
    for batch in batches:
        together = min(tiles_at_once(batch, problem, False), batch.queries.count)
        pieces = -(-batch.queries.count // together) * problem.batch
        moved = _moved(batch, problem) * problem.batch
        batch_pairs = batch.pairs * problem.batch
        pairs, copied, calls = pairs + batch_pairs, copied + moved, calls + pieces
        rate = efficiency(problem, batch.queries.size, batch.keys.size) * (0.95 if batch.masks else 1.0)
        dense += seconds(batch_pairs * width / rate, moved, pieces)
    forward, backward = (_peak(batches, problem, each) for each in (False, True))
    return Cost(pairs, pairs * width, copied, calls, forward, dense, backward)


def _peak(batches: list[Batch], problem: Problem, backward: bool) -> int:
    """Most bytes held at once: the biases that are kept, the tiles at work, and what the kernel holds for itself."""
    peak, kept = 0, 0
    for batch in batches:
        together = min(tiles_at_once(batch, problem, backward), batch.queries.count)
        # Of one that is the whole problem, what the kernel returns is the result.
        whole = batch.is_whole(problem) and not (backward and problem.itemsize == 2)
        held = 0 if whole else together * tile_bytes(batch, problem, backward)
        lasting = _lasting_bytes(batch, problem)
        kept += lasting if batch.kept else 0
        peak = max(peak, held + _kernel_bytes(batch, together, problem, backward) + (0 if batch.kept else lasting))
    return peak + kept


def _kernel_bytes(batch: Batch, tiles: int, problem: Problem, backward: bool) -> int:
    """ATen's flash kernel on a CPU: a block of scores for each thread; in a backward two, and grad_out token by token."""
    if problem.device != "cpu":
        return 0
    size, itemsize = batch.queries.size, max(4, problem.itemsize)
    rows = min(size, 256 if size >= 768 else 64 if size >= 192 else 32)
    scores = torch.get_num_threads() * rows * min(batch.keys.size, 512) * itemsize
    return 2 * scores + tiles * batch.alike * batch.heads.count * size * problem.value_dim * itemsize if backward else scores


def _moved(batch: Batch, problem: Problem) -> int:
    """Bytes read and written around the kernel: copies of tiles in, the result out."""
    rows, columns = batch.queries.count * batch.queries.size, batch.keys.count * batch.keys.size
    out = batch.alike * batch.heads.count * rows * problem.value_dim * (2 if batch.first else 3)
    q = batch.heads.count * rows * problem.head_dim * 2 if batch.queries.copies else 0
    kv = batch.kv_heads.count * columns * (problem.head_dim + problem.value_dim) * 2 if batch.keys.copies else 0
    kv = int(kv * _share_copied(batch))
    biases = batch.queries.count if not batch.shared else 0 if batch.kept else 1
    bias = biases * batch.alike * batch.queries.size * batch.keys.size * len(batch.masks) if not batch.bias.key_only else 0
    return (out + q + kv) * problem.itemsize + bias * _BIAS_BYTES
