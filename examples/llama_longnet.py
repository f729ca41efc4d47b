"""Fine-tune a small Llama with LongNet attention on 16,384 bytes of Python at a time, with transformers' Trainer.

python examples/llama_longnet.py [--short]

Needs `pip install -e .[hf]` and accelerate. About a minute on two cores; --short takes a few steps on 2,048 bytes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import compiled_dilated as cd


class Bytes(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Pieces of Python's own sources, one token a byte."""

    def __init__(self, tokens: int, pieces: int) -> None:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)
        self.text, self.tokens, self.pieces = torch.frombuffer(bytearray(text), dtype=torch.uint8), tokens, pieces

    def __len__(self) -> int:
        return self.pieces

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.tokens % (len(self.text) - self.tokens)
        ids = self.text[start : start + self.tokens].long()
        return {"input_ids": ids, "labels": ids}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train; returns the losses and the table of attention layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few steps on 2,048 bytes")
    short = parser.parse_args(arguments).short
    tokens, steps = (2048, 4) if short else (16384, 12)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokens,
    )
    model = LlamaForCausalLM(config)
    # Segments of 512 whole, of 2048 every second, of 8192 every fourth token.
    model = cd.compile(model, attention=cd.longnet((512, 2048, 8192), (1, 2, 4), causal=True))

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
        trainer = Trainer(model, settings, train_dataset=Bytes(tokens, steps))
        trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {float(losses[0]):.2f} at first, {float(losses[-1]):.2f} after {steps} steps of {tokens:,} tokens")
    sites = cd.sites(model)
    print(sites)
    return {"losses": [float(loss) for loss in losses], "sites": sites}


if __name__ == "__main__":
    main()
