"""The problem of a plan: a program and a call's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..arguments import BYTES
from ..footprints import Footprint
from ..mods import Graph, Kind, Mod, kind_of
from ..programs import Program


@dataclass(frozen=True)
class Scores:
    """A score_mod as plans see it.

    operands: dtype and shape of each operand of the graph.
    """

    graph: Graph
    operands: tuple[Kind, ...]

    @staticmethod
    def of(mod: Mod | None) -> Scores | None:
        """The scores of a call's score_mod; None without one."""
        if mod is None:
            return None
        return Scores(mod.graph, tuple(map(kind_of, mod.operands)))


@dataclass(frozen=True)
class Problem:
    """A program and everything that a plan may depend on.

    q_len, kv_len, q_offset: in tokens.
    scores: the score_mod, if any.
    partial: the result is a part of a larger softmax, merged into the parts before it; the backward
        gets the merged out and lse.
    """

    program: Program
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    dtype: str
    device: str
    q_offset: int = 0
    training: bool = False
    scores: Scores | None = None
    partial: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes per element of q, k, v and out."""
        return BYTES[self.dtype]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        heads, tokens = (self.heads, self.kv_heads), (self.q_len, self.kv_len)
        return 0 in (self.batch, *heads, *tokens, self.head_dim, self.value_dim)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of q, k, v and out together."""
        queries = self.heads * self.q_len * (self.head_dim + self.value_dim)
        keys = self.kv_heads * self.kv_len * (self.head_dim + self.value_dim)
        return self.batch * (queries + keys) * self.itemsize

    @property
    def footprint(self) -> Footprint:
        """Bytes of a call's tensors, and of a backward's copies of lse."""
        rows = self.batch * self.heads * self.q_len
        output = rows * self.value_dim * self.itemsize
        inputs = self.tensor_bytes - output
        lse = rows * max(4, self.itemsize)
        if not self.training:
            return Footprint(inputs, output, lse, 0, 0)
        # A backward copies the lse, and marks rows without keys by a byte each.
        return Footprint(inputs, output, lse, self.tensor_bytes, lse + rows)


def problem_of(
    program: Program,
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    dtype: object,
    device: str,
    q_offset: int,
    training: bool,
    scores: Scores | None = None,
) -> Problem:
    """The problem of a call.

    q_shape, k_shape, v_shape: (B, Hq, N, D), (B, Hkv, M, D) and (B, Hkv, M, Dv).
    """
    batch, heads, q_len, head_dim = q_shape
    return Problem(
        program,
        batch,
        heads,
        kv_heads=k_shape[1],
        q_len=q_len,
        kv_len=k_shape[2],
        head_dim=head_dim,
        value_dim=v_shape[3],
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        q_offset=q_offset,
        training=training,
        scores=scores,
    )
