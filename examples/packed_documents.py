"""Pack documents of different lengths into one row.

There is no padding, and the loss is the same as separately.

python examples/packed_documents.py [--short]

Positions that start again at 0 mark the beginning of a document; tokens of different documents do
not see each other. The documents are functions of Python's own sources, the model is a Llama whose
layers see a window of 256. Needs `pip install -e .[hf]`; half a minute on two cores.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import compiled_dilated as cd
from compiled_dilated import masks

PROGRAM = masks.causal() & masks.window(256)


def documents(count: int) -> list[Tensor]:
    """Functions of Python's own sources, one token a byte."""
    sources = []
    for module in (textwrap, ast):
        for _, function in inspect.getmembers(module, inspect.isfunction):
            sources.append(inspect.getsource(function))
    return [torch.tensor(list(source.encode())) for source in sources[:count]]


def model_of(longest: int) -> LlamaForCausalLM:
    """A Llama of two layers over bytes, with random weights."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=longest,
    )
    return LlamaForCausalLM(config)


def loss_of_separate(model: LlamaForCausalLM, texts: list[Tensor]) -> Tensor:
    """The summed loss of next bytes, one call for each document."""
    losses = []
    for text in texts:
        logits = model(text[None], use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits[:-1], text[1:], reduction="sum"))
    return torch.stack(losses).sum()


def loss_of_packed(model: LlamaForCausalLM, texts: list[Tensor]) -> Tensor:
    """The summed loss of next bytes, one call for all documents."""
    row = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    logits = model(row, position_ids=positions, use_cache=False).logits[0]
    # The last token of a document does not predict the first of the next one.
    targets = torch.cat([torch.cat([text[1:], text.new_tensor([-100])]) for text in texts])
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def step(
    model: LlamaForCausalLM, texts: list[Tensor], loss_of: Callable[..., Tensor]
) -> tuple[float, Tensor, float]:
    """Loss per byte, gradients as one vector, and seconds of a step."""
    model.zero_grad()
    start = time.perf_counter()
    loss = loss_of(model, texts) / sum(len(text) - 1 for text in texts)
    loss.backward()
    seconds = time.perf_counter() - start
    gradients = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    return float(loss.detach()), gradients, seconds


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Compare; returns the two losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="5 documents")
    texts = documents(5 if parser.parse_args(arguments).short else 24)
    lengths = [len(text) for text in texts]
    torch.manual_seed(0)
    model = cd.compile(model_of(max(lengths)), attention=PROGRAM)

    loss_of_packed(model, texts[:1])  # the first call of a process compiles
    separate, gradients, separate_seconds = step(model, texts, loss_of_separate)
    packed, packed_gradients, packed_seconds = step(model, texts, loss_of_packed)
    padded = len(texts) * max(lengths)
    print(f"{len(texts)} documents of {min(lengths):,} to {max(lengths):,} bytes")
    print(f"packed row: {sum(lengths):,} tokens; a padded batch would have {padded:,}")
    print(f"loss per byte: {separate:.6f} separately, {packed:.6f} packed")
    difference = float((gradients - packed_gradients).norm() / gradients.norm())
    print(f"gradients differ by {difference:.1e} of their norm")
    print(f"a step took {separate_seconds:.2f} s separately, {packed_seconds:.2f} s packed")
    if abs(separate - packed) > 1e-5 or difference > 1e-5:
        raise SystemExit("the packed row gives another loss than separate documents")
    return separate, packed


if __name__ == "__main__":
    main()
