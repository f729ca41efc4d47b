"""Train a classifier with Longformer's attention.

The attention is a window, and global tokens as data of a call.

python examples/longformer_documents.py [--short]

Longformer (arXiv 2004.05150): each token sees a window; a few global tokens see all tokens and are
seen by all. Each text has its own global tokens, given by a bool tensor (batch, tokens): here a
class token and the lines that begin a function or a class. The model decides from which of four
modules of Python a text is. Half a minute on two cores.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import masks

MODULES = ("argparse", "decimal", "difflib", "tarfile")
PROGRAM = masks.window(32) | masks.global_tokens(data="is_global")
CLASS_TOKEN, VOCABULARY = 256, 257
BEGINNINGS = re.compile(rb"^ *(def|class) ", re.MULTILINE)


def text_of(module: str) -> bytes:
    """The source of a module of Python, its name blanked out."""
    name = "_pydecimal" if module == "decimal" else module
    source = inspect.getsource(importlib.import_module(name)).encode()
    return source.replace(module.encode(), b"_" * len(module))


def batch_of(
    texts: list[bytes], tokens: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random pieces of texts.

    Returns ids and global flags, (size, tokens), and the numbers of their modules, (size,).
    """
    labels = torch.randint(len(texts), (size,), generator=generator)
    ids = torch.full((size, tokens), CLASS_TOKEN)
    is_global = torch.zeros(size, tokens, dtype=torch.bool)
    is_global[:, 0] = True
    for row, label in enumerate(labels.tolist()):
        latest = len(texts[label]) - tokens
        start = int(torch.randint(latest, (1,), generator=generator))
        piece = texts[label][start : start + tokens - 1]
        ids[row, 1:] = torch.tensor(list(piece))
        for beginning in BEGINNINGS.finditer(piece):
            is_global[row, 1 + beginning.start(1)] = True
    return ids, is_global, labels


class Layer(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend = cd.compile(PROGRAM)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, is_global: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        # (batch, tokens, heads, width) to (batch, heads, tokens, width).
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        attended = self.attend(q, k, v, data={"is_global": is_global})
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class Classifier(nn.Module):
    """Scores of modules for bytes, read at the class token."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.mixing = nn.Conv1d(width, width, 5, padding=2)  # neighbouring bytes: parts of words
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, len(MODULES))

    def forward(self, ids: Tensor, is_global: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + F.gelu(self.mixing(x.transpose(1, 2))).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, is_global)
        return self.head(x[:, 0])


def largest_difference(is_global: Tensor) -> float:
    """The largest difference of attention from the dense float64 reference."""
    q, k, v = torch.randn(3, is_global.shape[0], 4, is_global.shape[1], 16)
    data = {"is_global": is_global}
    out = cd.compile(PROGRAM)(q, k, v, data=data)
    return float((out - cd.reference(PROGRAM, q, k, v, data=data)).abs().max())


def main(arguments: list[str] | None = None) -> float:
    """Train; returns the share of new texts that are classified right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few steps on 512 bytes")
    short = parser.parse_args(arguments).short
    tokens, steps, size = (512, 8, 8) if short else (2048, 60, 8)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    texts = [text_of(module) for module in MODULES]
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        ids, is_global, labels = batch_of(texts, tokens, size, generator)
        loss = F.cross_entropy(model(ids, is_global), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 4 == 0:
            print(f"step {step} of {steps}: loss {float(loss.detach()):.3f}", flush=True)

    ids, is_global, labels = batch_of(texts, tokens, 32, generator)
    with torch.no_grad():
        right = float((model(ids, is_global).argmax(-1) == labels).float().mean())
    counts = is_global.sum(1).tolist()
    print(f"global tokens of a text: {min(counts)} to {max(counts)} of {tokens:,}")
    print(f"{right:.0%} of new texts classified right (a quarter would be by chance)")
    difference = largest_difference(is_global[:2, :512])
    print(f"attention differs from the dense float64 reference by {difference:.1e} at most")
    if difference > 1e-5:
        raise SystemExit("attention is wrong")
    return right


if __name__ == "__main__":
    main()
