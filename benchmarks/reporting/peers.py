"""Other libraries: the calls of peers, and the programs they claim.

A peer that is not installed becomes a row that reports it. `build` imports the peer, so that a
process pays for one peer alone.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness.problems import Problem, flex, sdpa
from torch import Tensor, nn
from torch.nn import functional as F

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.programs import as_program
from compiled_dilated.text import read_program

# The segments and rates of every dilated way; shorter sequences have one segment.
SEGMENTS, RATES = (2048, 4096, 8192), (1, 2, 4)
# Of BigBird, for each block of queries.
_RANDOM_BLOCKS = 3

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
Built = tuple[Call, cd.Program]


@dataclass(frozen=True)
class Peer:
    """Another library's way to compute attention.

    package: the module without which the row is "not installed".
    build: maps (tokens, head_dim, **settings) to the call over (batch, heads, tokens, head_dim)
        and the program that the output is compared with.
    note: printed above the table.
    """

    package: str
    build: Callable[..., Built]
    note: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether its package can be imported."""
        try:
            return importlib.util.find_spec(self.package) is not None
        except ModuleNotFoundError:  # a parent package
            return False


def swapped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with heads and tokens swapped, as views."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _of_torch(
    way: Callable[[Problem], Call], tokens: int, head_dim: int, program: str = "full()"
) -> Built:
    """One of torch's own ways, for an expression of one branch.

    No pair of such an expression has a multiplicity.
    """
    (branch,) = read_program(program).branches
    problem = Problem(branch.mask, tokens, head_dim=head_dim)
    return way(problem), as_program(problem.program)


def _local_attention(tokens: int, head_dim: int, window: int) -> Built:
    """local-attention with exact_windowsize: a causal window of window + 1 keys."""
    from local_attention import LocalAttention

    module = LocalAttention(
        window_size=window,
        causal=True,
        look_backward=1,
        exact_windowsize=True,
        autopad=True,
        use_rotary_pos_emb=False,
    )
    return module, as_program(masks.causal() & masks.window(window))


def _ring_attention(tokens: int, head_dim: int) -> Built:
    """ring-attention-pytorch's flash attention for a CPU, on one rank, causal."""
    from ring_attention_pytorch import ring_flash_attn

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ring_flash_attn(*swapped(q, k, v), causal=True, bucket_size=512)
        return out.transpose(1, 2)

    return call, as_program(masks.causal())


def _first_port(tokens: int, head_dim: int) -> Built:
    """The first LongNet port from PyPI, whose heads are divided among the branches.

    SDPA replaces the kernel of xformers that it calls. The port divides each branch's output by its
    sum over the tokens, which is no attention.
    """
    _substitute_xformers()
    from dilated_attention_pytorch.dilated_attention import DilatedAttention

    # The port takes no segment that is longer than the sequence.
    segments = [min(segment, tokens) for segment in SEGMENTS]
    module = DilatedAttention(segments, list(RATES))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module(*swapped(q, k, v))
        return out.transpose(1, 2)

    return call, cd.longnet(SEGMENTS, RATES, heads="split", offsets="grouped")


def _substitute_xformers() -> None:
    """Register a module `xformers.ops` with the one function that the port calls.

    The port depends on xformers of 2023, whose kernels need a GPU and a torch of that time.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        q, k, v = swapped(query, key, value)
        is_causal = options.get("attn_bias") is not None
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    vars(ops).update(
        memory_efficient_attention=attention, AttentionOp=object, LowerTriangularMask=object
    )
    vars(package).update(ops=ops)
    sys.modules |= {"xformers": package, "xformers.ops": ops}


def _natten(tokens: int, head_dim: int, side: int, kernel: int) -> Built:
    """NATTEN's neighbourhood attention over a square grid, by its FlexAttention backend."""
    import natten

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grids = (x.unflatten(1, (side, side)) for x in swapped(q, k, v))
        out: Tensor = natten.na2d(*grids, kernel_size=kernel, backend="flex-fna")
        return out.flatten(1, 2).transpose(1, 2)

    grid = masks.neighborhood((side, side), kernel // 2, edges="shift")
    return call, as_program(grid)


def _longformer(tokens: int, head_dim: int, window: int) -> Built:
    """The self-attention of transformers' Longformer without global tokens.

    Its projections are replaced by q, k and v themselves.
    """
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=8 * head_dim,
        num_attention_heads=8,
        attention_window=[2 * window],
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, 0).eval()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for name, x in {"query": q, "key": k, "value": v}.items():
            setattr(layer, name, _Constant(x))
        hidden = torch.zeros(q.shape[0], tokens, 8 * head_dim)
        unmasked = torch.zeros(q.shape[0], tokens)
        out: Tensor = layer(
            hidden,
            attention_mask=unmasked,
            is_index_masked=unmasked > 0,
            is_index_global_attn=unmasked > 0,
            is_global_attn=False,
        )[0]
        return out.unflatten(2, (8, head_dim)).transpose(1, 2)

    return call, as_program(masks.window(window))


def _big_bird(tokens: int, head_dim: int, block: int) -> Built:
    """The block-sparse attention of transformers' BigBird in eval mode, three random blocks."""
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    config = BigBirdConfig(
        hidden_size=8 * head_dim,
        num_attention_heads=8,
        block_size=block,
        num_random_blocks=_RANDOM_BLOCKS,
        max_position_embeddings=tokens,
    )
    layer = BigBirdBlockSparseAttention(config).eval()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for name, x in {"query": q, "key": k, "value": v}.items():
            setattr(layer, name, _Constant(x))
        # The masks that BigBirdModel builds for a text without padding.
        ones = torch.ones(q.shape[0], tokens)
        blocks = ones.unflatten(1, (-1, block))
        shifted = [blocks[:, 1:-3], blocks[:, 2:-2], blocks[:, 3:-1]]
        band = torch.einsum("blq,blk->blqk", blocks[:, 2:-2], torch.cat(shifted, dim=2))
        out: Tensor = layer(
            torch.zeros(q.shape[0], tokens, 8 * head_dim),
            band_mask=band[:, None],
            from_mask=ones[:, None, :, None],
            to_mask=ones[:, None, None, :],
            from_blocked_mask=blocks,
            to_blocked_mask=blocks,
        )[0]
        return out.unflatten(2, (8, head_dim)).transpose(1, 2)

    return call, read_program(big_bird_text(tokens, block))


def big_bird_text(tokens: int, block: int) -> str:
    """The expression of transformers' BigBird in eval mode.

    It is a window of three blocks; the first and the last block are global. In eval mode every
    random block is the first block, so that queries that are not global see its keys once more for
    each random block.
    """
    positions = (*range(block), *range(tokens - block, tokens))
    window = f"Branch(block_window({block}, 1) | global_tokens(positions={positions}))"
    not_first, not_last = f"~segments({block})", f"block_window({block}, {tokens // block - 2})"
    random = f"Branch(sinks({block}) & {not_first} & {not_last})"
    return f"Program(({', '.join([window] + [random] * _RANDOM_BLOCKS)}))"


def _absent(tokens: int, head_dim: int) -> Built:
    """torchscale's dilated attention, which no release on PyPI has."""
    raise ImportError("no release of torchscale on PyPI has dilated_attention")


class _Constant(nn.Module):
    """A projection that returns one tensor, as (B, N, E).

    The tensor is (batch, heads, tokens, head_dim).
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x.transpose(1, 2).flatten(2)

    def forward(self, hidden: Tensor) -> Tensor:
        """The tensor, whatever the input."""
        return self.x


PEERS: dict[str, Peer] = {
    "SDPA": Peer("torch", partial(_of_torch, sdpa)),
    "FlexAttention": Peer("torch", partial(_of_torch, flex), "forward alone on a CPU"),
    "local-attention": Peer("local_attention", _local_attention),
    "ring-attention-pytorch": Peer("ring_attention_pytorch", _ring_attention, "one rank"),
    "first LongNet port": Peer(
        "dilated_attention_pytorch", _first_port, "SDPA in place of xformers"
    ),
    "NATTEN": Peer("natten", _natten, "its FlexAttention backend, eager, with a mask of each call"),
    "Longformer of transformers": Peer("transformers", _longformer, "no global tokens"),
    "BigBird of transformers": Peer("transformers", _big_bird, "eval mode"),
    "torchscale": Peer("torchscale.component.dilated_attention", _absent, "absent from PyPI's 0.3"),
}
