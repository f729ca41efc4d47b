"""The demo's language model: bytes in, bytes out, attention by a LongNet program.

bytes -> embedding -> [ + attention(conv(norm)) -> + swiglu(norm) ] x layers -> norm -> logits over the next byte
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attend import compile
from ..programs import Program

BYTES = 256
_CONV_WIDTH = 4


class Block(nn.Module):
    """Attention and a gated MLP, each on a normalised input and added to the stream (B, N, width).

    Queries, keys and values come from a short causal convolution: it says where a byte stands among its neighbours, which
    attention over a set does not know, and lets a single layer look up what followed the last occurrence of a few bytes.
    """

    def __init__(self, program: Program, width: int, heads: int) -> None:
        super().__init__()
        self.attend, self.heads = compile(program), heads
        self.conv = nn.Conv1d(width, width, _CONV_WIDTH, groups=width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        hidden = 64 * round(8 * width / 3 / 64)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        with torch.no_grad():
            self.conv.weight.zero_()[:, :, -1] = 1.0  # at first, each byte as it is
            for layer in (self.qkv, self.up):
                nn.init.normal_(layer.weight, std=width**-0.5)
            for layer in (self.merge, self.down):  # at first, each block adds nothing
                nn.init.zeros_(layer.weight)

    def project(self, x_BNE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each (B, H, N, D)."""
        near_BEN = F.pad(F.rms_norm(x_BNE, x_BNE.shape[-1:]).transpose(1, 2), (_CONV_WIDTH - 1, 0))
        qkv = self.qkv(self.conv(near_BEN).transpose(1, 2)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:]), v

    def forward(self, x_BNE: Tensor) -> Tensor:
        out_BHND = self.attend(*self.project(x_BNE))
        x_BNE = x_BNE + self.merge(out_BHND.transpose(1, 2).flatten(2))
        gate, value = self.up(F.rms_norm(x_BNE, x_BNE.shape[-1:])).chunk(2, dim=-1)
        out_BNE: Tensor = x_BNE + self.down(F.silu(gate) * value)
        return out_BNE


class LanguageModel(nn.Module):
    """Logits over the byte after each byte: (B, N) of integers to (B, N, 256)."""

    def __init__(self, program: Program, width: int = 128, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList(Block(program, width, heads) for _ in range(layers))
        self.logits = nn.Linear(width, BYTES, bias=False)
        nn.init.zeros_(self.logits.weight)  # at first, every byte is as likely as any other

    def forward(self, text_BN: Tensor) -> Tensor:
        x_BNE = self.embedding(text_BN)
        for block in self.blocks:
            x_BNE = block(x_BNE)
        logits: Tensor = self.logits(F.rms_norm(x_BNE, x_BNE.shape[-1:]))
        return logits

    @torch.no_grad()
    def first_projection(self, text_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the first layer, each (B, H, N, D): attention's input on real text."""
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.project(self.embedding(text_BN))


def loss(model: nn.Module, text_BN: Tensor) -> Tensor:
    """Mean nats a byte of predicting text[:, 1:] from what comes before."""
    logits = model(text_BN[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), text_BN[:, 1:].flatten())
