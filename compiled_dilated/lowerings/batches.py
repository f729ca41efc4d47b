"""A batch: many dense problems of one shape, and how to run it.

Dense, strided and tiled lowerings differ in the batches they make.

     keys                  queries.tile(i) sees keys.tile(i), less what `masks` hides;
. . # # # . . . .          one kernel call computes all tiles of the batch for all its heads,
. . . . # # # . .          and its result is merged into the whole program's (out, lse).
. . . . . . # # #
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..calls import Call
from ..heads import HeadRange
from ..masks import Mask
from ..masks.positions import pairs_up_to
from ..mods import Mod, TileMod
from ..partials import Saved, merge_
from ..plans import Problem
from . import biases, kernels
from .biases import Bias, Kept
from .lattice import Lattice, Rows, Table, pieces
from .workspace import Workspace


@dataclass(frozen=True, eq=False)
class Batch:
    """`queries.count` tiles of `queries.size` query positions by `keys.size` key positions, for some heads.

    masks: whose sum says how often a pair counts; () when every pair of every tile counts once. open: this many leading columns
    are seen by every row, whatever the masks say. causal: row t sees columns 0 .. t. shared: the masks say the same of every
    tile, so the first one speaks for all. first: no earlier batch wrote these rows. lasting: under what the bias is found again
    by other pieces; None where there is none that lasts. kept: other calls find it too. alike: so many batches, computed as one:
    each stands `apart` from the one before, by so many query heads, key heads and tokens (the residue classes of a short
    sequence, which other heads see; heads that see other keys of all).
    """

    heads: HeadRange
    kv_heads: HeadRange
    queries: Rows
    keys: Rows
    masks: tuple[Mask, ...] = ()
    causal: bool = False
    open: int = 0
    shared: bool = False
    first: bool = False
    lasting: Bias | None = None
    kept: bool = False
    alike: int = 1
    apart: tuple[int, int, int] = (0, 0, 0)

    @property
    def rows(self) -> int:
        """Rows of the result that the batch writes to, over its heads."""
        return self.queries.count * self.queries.size * self.heads.count * self.alike

    @property
    def pairs(self) -> int:
        """Query-key pairs that the kernel computes, over all heads (of a causal tile: those it has to)."""
        rows, columns = self.queries.size, self.keys.size
        per_tile = pairs_up_to(0, range(rows), range(columns)) if self.causal else rows * columns
        return self.queries.count * per_tile * self.heads.count * self.alike

    @property
    def bias(self) -> Bias:
        """What the masks say of the tiles; of those without masks, nothing."""
        heads = tuple(self.heads.start + i * self.apart[0] for i in range(self.alike))
        return Bias(self.masks, heads, self.queries, self.keys, self.open, self.shared)

    def is_whole(self, problem: Problem) -> bool:
        """One tile that is the whole problem, in the order of q and k: what the kernel returns needs no place of its own."""
        return (
            not (self.queries.copies or self.keys.copies)
            and self.queries.count == 1
            and (self.queries.size, self.keys.size) == (problem.q_len, problem.kv_len)
            and (self.heads.count, self.kv_heads.count) == (problem.heads, problem.kv_heads)
        )

    @property
    def overlaps(self) -> bool:
        """Whether tiles share keys, so that the gradients of one key are a sum inside the batch."""
        return isinstance(self.keys, Table) or math.prod(self.keys.repeats) > 1

    def strips(self, converts: bool) -> bool:
        """Whether tiles are copied, in strips: they can be, and one bias serves all."""
        keys = self.keys
        return isinstance(keys, Lattice) and (keys.copies or converts) and keys.strips and (self.shared or not self.masks)

    def of_queries(self, x: Tensor) -> Tensor:
        """Of x (B, Hq, N, ...) the heads of this batch, as a view; where it is many, (alike, Hq', N', ...)."""
        return self._side_by_side(self.heads.of(x), self.apart[0] * x.stride(1))

    def of_keys(self, x: Tensor) -> Tensor:
        """The same of x (B, Hkv, N, ...)."""
        return self._side_by_side(self.kv_heads.of(x), self.apart[1] * x.stride(1))

    def _side_by_side(self, x: Tensor, to_next: int) -> Tensor:
        if self.alike == 1:
            return x
        tokens = self.apart[2]
        x = x[0, :, : x.shape[2] - (self.alike - 1) * tokens]
        return x.as_strided((self.alike, *x.shape), (to_next + tokens * x.stride(1), *x.stride()))

    def by_kv_head(self) -> Iterator[Batch]:
        """The same work, one key head at a time."""
        shared = self.heads.count // self.kv_heads.count
        for each in self._separate():
            for i, kv_head in enumerate(each.kv_heads.indices()):
                start = each.heads.start + i * shared * each.heads.step
                yield replace(each, heads=HeadRange(start, each.heads.step, shared), kv_heads=HeadRange(kv_head, 1, 1))

    def _separate(self) -> Iterator[Batch]:
        for i in range(self.alike):
            first_head, first_kv_head, first_token = (i * each for each in self.apart)
            queries, keys = self.queries, self.keys
            if i:
                assert isinstance(queries, Lattice)
                assert isinstance(keys, Lattice)
                queries = replace(queries, start=queries.start + first_token)
                keys = replace(keys, start=keys.start + first_token)
            heads = replace(self.heads, start=self.heads.start + first_head)
            kv_heads = replace(self.kv_heads, start=self.kv_heads.start + first_kv_head)
            each = replace(self, heads=heads, kv_heads=kv_heads, queries=queries, keys=keys, alike=1)
            yield each if each.lasting is None else replace(each, lasting=each.bias.beginning())

    def split(self, most: int) -> Iterator[Batch]:
        """The same work as batches of at most `most` tiles each."""
        counts = (self.queries.count,) if isinstance(self.queries, Table) else tuple(count for count, _ in self.queries.tiles)
        if math.prod(counts) <= most:
            yield self
            return
        for box in pieces(counts, most):
            queries, keys = self.queries, self.keys
            for axis, (start, stop) in enumerate(box):
                queries, keys = queries.select(axis, start, stop), keys.select(axis, start, stop)
            yield replace(self, queries=queries, keys=keys)


@dataclass(frozen=True)
class Scratch:
    """Memory that the batches of one run share: copies of tiles, and the biases of a batch's pieces, one at a time."""

    workspace: Workspace = field(default_factory=Workspace)
    biases: Kept = field(default_factory=lambda: Kept(most_bytes=0))


def joined(batches: list[Batch]) -> list[Batch]:
    """The same work on one sequence in fewer batches: residue classes of one tile each, evenly apart, become one batch."""
    groups: dict[Any, list[Batch]] = {}
    for number, batch in enumerate(batches):
        groups.setdefault(_shape_of(batch) or number, []).append(batch)
    return [each for group in groups.values() for each in as_one(group)]


def _shape_of(batch: Batch) -> Any:
    """What batches that can be one have in common; None for those that are no residue class in one tile without a mask."""
    q, k = batch.queries, batch.keys
    if (
        not isinstance(q, Lattice)
        or not isinstance(k, Lattice)
        or batch.masks
        or q.count > 1
        or len(q.rows) > 1
        or len(k.rows) > 1
    ):
        return None
    heads = (batch.heads.step, batch.heads.count, batch.kv_heads.step, batch.kv_heads.count)
    return heads, q.rows, k.rows, k.start - q.start, batch.causal, batch.first, batch.open


def as_one(group: list[Batch]) -> list[Batch]:
    """The same work as one batch, with the masks of the first, if they differ in places alone and stand evenly apart."""
    places = [(each.heads.start, each.kv_heads.start, each.queries.start) for each in group]
    apart = {(b[0] - a[0], b[1] - a[1], b[2] - a[2]) for a, b in itertools.pairwise(places)}
    if len(apart) != 1:
        return group
    (each,), queries, keys = apart, group[0].queries, group[0].keys
    assert isinstance(queries, Lattice)
    assert isinstance(keys, Lattice)
    # No token of a head may be in two of them, for gradients are added to all at once: other heads, or other residue classes.
    other_heads = each[2] == 0 and min(each[:2]) > 0
    other_classes = min(each) >= 0 and 0 < each[2] * (len(group) - 1) < min(queries.rows[0][1], keys.rows[0][1])
    if not (other_heads or other_classes):
        return group
    return [replace(group[0], alike=len(group), apart=each)]


def _units(batch: Batch, size: int) -> list[slice]:
    """The batch index in slices that one kernel call can take: whole where a tile is a whole problem, else one by one."""
    whole = size == 1 or (batch.queries.count == 1 and not batch.queries.copies and not batch.keys.copies)
    return [slice(0, size)] if whole else [slice(b, b + 1) for b in range(size)]


def _tiles(batch: Batch, call: Call, scratch: Scratch, unit: slice, device: torch.device, dtype: torch.dtype) -> kernels.Tiles:
    score_mod = None if call.score_mod is None else _bound(batch, call.score_mod, unit, device)
    if not batch.masks:
        return kernels.Tiles(call.scale, None, batch.causal, score_mod)
    if batch.lasting is not None:
        table = biases.KEPT if batch.kept else scratch.biases
        tiles = table.tiles(batch.lasting, batch.queries.size, batch.keys.size, batch.causal, device, dtype)
        return replace(tiles, scale=call.scale, score_mod=score_mod)
    bias = batch.bias.made(biases.batch_indices(unit, device), call.data, dtype)
    tiles = kernels.Tiles(call.scale, bias, batch.causal, score_mod)
    return replace(tiles, dead=kernels.dead_rows(tiles, batch.queries.size))


def _bound(batch: Batch, score_mod: Mod, unit: slice, device: torch.device) -> TileMod:
    b = biases.batch_indices(unit, device)
    q = biases.indices(batch.queries, device, False)[:, None, :, None]
    kv = biases.indices(batch.keys, device, False)[:, None, None, :]
    h = torch.tensor(list(batch.heads.indices()), device=device)[None, :, None, None]
    # 64 bits, as a function may multiply positions.
    return score_mod.on(b, h, q.long(), kv.long())


def forward(batch: Batch, call: Call, scratch: Scratch, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge the batch into out (B, Hq, N, Dv) and lse (B, Hq, N)."""
    q, out, lse = (batch.of_queries(x) for x in (q, out, lse))
    k, v = (batch.of_keys(x) for x in (k, v))
    read = _reader(batch, call, scratch, q.dtype, q.dtype)
    for unit in _units(batch, q.shape[0]):
        part_out, part_lse = kernels.attention(
            read("query", q[unit]),
            read("key", k[unit]),
            read("value", v[unit]),
            _tiles(batch, call, scratch, unit, q.device, q.dtype),
        )
        _merge(batch, call, out[unit], lse[unit], part_out, part_lse)


def _reader(
    batch: Batch, call: Call, scratch: Scratch, given: torch.dtype, wanted: torch.dtype
) -> Callable[[str, Tensor], Tensor]:
    """Reads tensors (B, H, N, D) of one kernel call as the kernel takes them: those of dtype `given` in dtype `wanted`.

    All of them in strips, or none: in strips where nothing but shared biases has to know which tile is which.
    """
    converts = given != wanted
    in_strips = call.score_mod is None and batch.strips(converts)

    def read(name: str, x: Tensor) -> Tensor:
        rows, shift = (batch.keys, 0) if name in ("key", "value") else (batch.queries, call.q_offset)
        converted = converts and x.dtype == given
        copy = scratch.workspace.copy(name, wanted if converted else x.dtype)
        if isinstance(rows, Lattice) and in_strips and x.shape[0] == 1:
            return rows.read_strips(x, shift, copy)
        return rows.read(x, shift, copy, converted)

    return read


def whole(batch: Batch, call: Call, scratch: Scratch, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A batch that is the whole problem: (out, lse) as the kernel returns them."""
    return kernels.attention(q, k, v, _tiles(batch, call, scratch, slice(0, q.shape[0]), q.device, q.dtype))


def whole_backward(batch: Batch, call: Call, scratch: Scratch, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a batch that is the whole problem."""
    given, dtype = saved.q.dtype, kernels.backward_dtype(saved.q)
    tiles = _tiles(batch, call, scratch, slice(0, saved.q.shape[0]), saved.q.device, dtype)
    q, k, v, out, grad_out = (x.to(dtype) for x in (saved.q, saved.k, saved.v, saved.out, saved.grad_out))
    grad_q, grad_k, grad_v = kernels.attention_backward(grad_out, saved.grad_lse, q, k, v, out, saved.lse, tiles)
    return grad_q.to(given), grad_k.to(given), grad_v.to(given)


def _merge(batch: Batch, call: Call, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    rows, shift = batch.queries, call.q_offset
    if isinstance(rows, Lattice):
        out, lse = rows.view(out, shift), rows.view(lse, shift)
        heads = batch.heads.count
        part_out, part_lse = rows.shaped(part_out, heads), rows.shaped(part_lse, heads)
        if batch.first:
            out.copy_(part_out)
            lse.copy_(part_lse)
        else:
            merge_(out, lse, part_out, part_lse)
        return
    if not batch.first:
        old_out, old_lse = rows.read(out, shift), rows.read(lse, shift)
        merge_(old_out, old_lse, part_out, part_lse)
        part_out, part_lse = old_out, old_lse
    rows.write(out, part_out, shift)
    rows.write(lse, part_lse, shift)


@dataclass(frozen=True)
class Grads:
    """Sums of gradients for the heads of one batch: grad_q (B, Hq', N, D), and grad_k, grad_v from token `k_shift` on."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_shift: int = 0


def backward(batch: Batch, call: Call, scratch: Scratch, saved: Saved, into: Grads) -> None:
    """Add the batch's share of the gradients, from the merged out and lse (+inf in rows that see nothing)."""
    queries, keys, at = batch.queries, batch.keys, call.q_offset
    q, out, lse, grad_out = (batch.of_queries(x) for x in (saved.q, saved.out, saved.lse, saved.grad_out))
    k, v = (batch.of_keys(x) for x in (saved.k, saved.v))
    grad_lse = None if saved.grad_lse is None else batch.of_queries(saved.grad_lse)
    dtype = kernels.backward_dtype(q)
    read = _reader(batch, call, scratch, q.dtype, dtype)
    for unit in _units(batch, q.shape[0]):
        part_q, part_k, part_v = kernels.attention_backward(
            read("grad_out", grad_out[unit]),
            None if grad_lse is None else read("grad_lse", grad_lse[unit].unsqueeze(-1)).squeeze(-1),
            read("query", q[unit]),
            read("key", k[unit]),
            read("value", v[unit]),
            read("out", out[unit]),
            read("lse", lse[unit].unsqueeze(-1)).squeeze(-1),
            _tiles(batch, call, scratch, unit, q.device, dtype),
        )
        queries.add(into.q[unit], part_q, at)
        keys.add(into.k[unit], part_k, into.k_shift)
        keys.add(into.v[unit], part_v, into.k_shift)
