"""Fine-tune a small Llama with LongNet attention by the Trainer.

Its texts have 16,384 bytes.

python examples/llama_longnet.py [--short]

Needs `pip install -e .[hf]` and accelerate. The weights are random here; replace `model_of(...)`
by `LlamaForCausalLM.from_pretrained(name)` to fine-tune a trained model. About a minute on two
cores; --short takes a few steps on 2,048 bytes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import compiled_dilated as cd

# LongNet: all tokens of segments of 512, every second of 2048, every fourth of 8192.
PROGRAM = cd.longnet((512, 2048, 8192), (1, 2, 4), causal=True)


class Bytes(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Pieces of Python's own sources, one token a byte."""

    def __init__(self, tokens: int, pieces: int) -> None:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        text = bytearray(b"".join(file.read_bytes() for file in files))
        self.text = torch.frombuffer(text, dtype=torch.uint8)
        self.tokens, self.pieces = tokens, pieces

    def __len__(self) -> int:
        return self.pieces

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.tokens % (len(self.text) - self.tokens)
        ids = self.text[start : start + self.tokens].long()
        return {"input_ids": ids, "labels": ids}


def model_of(tokens: int) -> LlamaForCausalLM:
    """A Llama of two layers over bytes, with random weights."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokens,
    )
    return LlamaForCausalLM(config)


def dense(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention by the dense float64 reference, with transformers' signature."""
    out = cd.reference(PROGRAM, query, key, value, scale=scaling)
    return out.transpose(1, 2).to(query.dtype), None


def largest_difference(model: LlamaForCausalLM, ids: Tensor) -> float:
    """The largest difference of logits from those of the dense reference."""
    AttentionInterface.register("dense", dense)
    reference = model_of(model.config.max_position_embeddings)
    reference.load_state_dict(model.state_dict())
    reference.set_attn_implementation("dense")
    with torch.no_grad():
        logits = model(ids.to(model.device), use_cache=False).logits.cpu()
        expected = reference(ids, use_cache=False).logits
    return float((logits - expected).abs().max())


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train; returns losses, the largest difference and the table of layers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few steps on 2,048 bytes")
    short = parser.parse_args(arguments).short
    tokens, steps = (2048, 4) if short else (16384, 12)

    torch.manual_seed(0)
    model = cd.compile(model_of(tokens), attention=PROGRAM)
    data = Bytes(tokens, steps)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=3e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, settings, train_dataset=data)
        trainer.train()

    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    after = f"after {steps} steps of {tokens:,} tokens"
    print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} {after}")
    difference = largest_difference(model, data[0]["input_ids"][None, :1024])
    print(f"logits of 1,024 tokens differ from the float64 reference by {difference:.1e} at most")
    sites = cd.sites(model)
    print(sites)
    if difference > 1e-4 or losses[-1] >= losses[0]:
        raise SystemExit("the logits are wrong, or the loss did not fall")
    return {"losses": losses, "difference": difference, "sites": sites}


if __name__ == "__main__":
    main()
