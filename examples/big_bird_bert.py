"""Train a BERT with BigBird's attention to fill in masked bytes.

The bytes are Python's own sources.

python examples/big_bird_bert.py [--short]

BigBird (arXiv 2007.14062): each block of 64 tokens sees its neighbours, 3 random blocks and the
first 64 tokens, which see all tokens. A text has 4,096 tokens, one a byte. Other encoders of
transformers are compiled the same way. Needs `pip install -e .[hf]`; half a minute on two cores.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, BertConfig, BertForMaskedLM

import compiled_dilated as cd

MASK_TOKEN, VOCABULARY, MASKED_SHARE = 256, 257, 0.15


def pieces_of_python(tokens: int) -> Tensor:
    """Python's own sources, one token a byte, (pieces, tokens)."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = bytearray(b"".join(file.read_bytes() for file in files))
    # Bytes behind the last full piece are left out.
    used = len(text) // tokens * tokens
    return torch.frombuffer(text, dtype=torch.uint8)[:used].long().view(-1, tokens)


def model_of(tokens: int) -> BertForMaskedLM:
    """A BERT of two layers over bytes, with random weights."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def largest_difference(model: BertForMaskedLM, program: cd.Program, ids: Tensor) -> float:
    """The largest difference of the model's logits from the reference's."""

    def dense(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        out = cd.reference(program, query, key, value, scale=scaling)
        return out.transpose(1, 2).to(query.dtype), None

    AttentionInterface.register("dense", dense)
    reference = model_of(model.config.max_position_embeddings)
    reference.load_state_dict(model.state_dict())
    reference.set_attn_implementation("dense")
    with torch.no_grad():
        difference = model(ids).logits - reference(ids).logits
    return float(difference.abs().max())


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; returns the losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few steps on 1,024 bytes")
    short = parser.parse_args(arguments).short
    tokens, steps = (1024, 5) if short else (4096, 20)

    torch.manual_seed(0)
    # Random blocks are drawn once, for this length; shorter texts use those within their length.
    program = cd.big_bird(window=64, global_tokens=64, random=3, block=64, tokens=tokens)
    model = cd.compile(model_of(tokens), attention=program)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    pieces, losses = pieces_of_python(tokens), []
    for step in range(steps):
        ids = pieces[step % len(pieces)][None]
        is_masked = torch.rand(ids.shape) < MASKED_SHARE
        # -100: no loss for a byte that is not masked.
        labels = ids.masked_fill(~is_masked, -100)
        loss = model(ids.masked_fill(is_masked, MASK_TOKEN), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        print(f"step {step + 1} of {steps}: loss {losses[-1]:.2f}", flush=True)

    difference = largest_difference(model, program, pieces[0][None, :1024])
    print(f"loss of masked bytes {losses[0]:.2f} at first, {losses[-1]:.2f} after {steps} steps")
    print(f"logits of 1,024 tokens differ from the float64 reference by {difference:.1e} at most")
    print(cd.sites(model))
    if difference > 1e-4 or losses[-1] >= losses[0]:
        raise SystemExit("the logits are wrong, or the loss did not fall")
    return losses


if __name__ == "__main__":
    main()
