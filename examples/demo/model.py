"""The demo's language model over bytes, with LongNet attention.

bytes -> embeddings of the last 1 to 4 bytes
      -> [ + attention(norm) -> + swiglu(norm) ] x layers
      -> norm -> logits of the next byte

Suffixes of tensors: B batch, N tokens, E width of the model, H heads, D width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_dilated import Program, compile

BYTES = 256
_LONGEST_GRAM, _GRAM_SLOTS = 4, 32749  # a prime, so that the remainder depends on every byte


class Embedding(nn.Module):
    """Hashed embeddings of n-grams of bytes (arXiv 2412.09871).

    Embeddings of each byte and of its last 2, 3 and 4 bytes are added.

    (B, N) bytes to (B, N, width). Over a few million bytes of text, tables of n-grams lower the
    loss more than further layers.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(BYTES, width)
        self.grams = nn.ModuleList()
        for _ in range(_LONGEST_GRAM - 1):
            table = nn.Embedding(_GRAM_SLOTS, width)
            nn.init.zeros_(table.weight)
            self.grams.append(table)

    def forward(self, text_BN: Tensor) -> Tensor:
        out_BNE: Tensor = self.byte(text_BN)
        # The n-gram as a number, with the byte `distance` tokens earlier as its last digit.
        gram_BN = text_BN
        for distance, table in enumerate(self.grams, start=1):
            gram_BN = gram_BN * BYTES + F.pad(text_BN, (distance, 0))[:, : text_BN.shape[1]]
            out_BNE = out_BNE + table(gram_BN % _GRAM_SLOTS)
        return out_BNE


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm.

    Both are added to the stream (B, N, width).

    Without position embeddings: n-gram embeddings encode the order of neighbouring bytes.
    """

    def __init__(self, program: Program, width: int, heads: int) -> None:
        super().__init__()
        self.attend, self.heads = compile(program), heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        hidden = 64 * round(8 * width / 3 / 64)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        for layer in (self.qkv, self.up):
            nn.init.normal_(layer.weight, std=width**-0.5)
        for layer in (self.merge, self.down):  # at first, each block adds nothing
            nn.init.zeros_(layer.weight)

    def project(self, x_BNE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each (B, H, N, D)."""
        qkv = self.qkv(F.rms_norm(x_BNE, x_BNE.shape[-1:])).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:]), v

    def forward(self, x_BNE: Tensor) -> Tensor:
        out_BHND = self.attend(*self.project(x_BNE))
        x_BNE = x_BNE + self.merge(out_BHND.transpose(1, 2).flatten(2))
        gate, value = self.up(F.rms_norm(x_BNE, x_BNE.shape[-1:])).chunk(2, dim=-1)
        out_BNE: Tensor = x_BNE + self.down(F.silu(gate) * value)
        return out_BNE


class LanguageModel(nn.Module):
    """Logits of the next byte: (B, N) bytes to (B, N, 256)."""

    def __init__(self, program: Program, width: int = 128, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.embedding = Embedding(width)
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
        """q, k and v (B, H, N, D) of the first layer."""
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.project(self.embedding(text_BN))


def loss(model: nn.Module, text_BN: Tensor) -> Tensor:
    """Mean nats a byte of predicting text[:, 1:] from the preceding bytes."""
    logits = model(text_BN[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), text_BN[:, 1:].flatten())
