"""Generate text with a Llama of windows and attention sinks.

Its layers see a window and the first tokens alone.

python examples/generate_with_sinks.py [--short]

The first tokens ("attention sinks") keep a model with a window stable far beyond the window:
StreamingLLM, arXiv 2309.17453. The prompt is 16,384 bytes of Python's own sources. The weights are
random and the text is noise: the example measures the time of a token, and checks that generated
tokens equal those of one forward over the full text. Needs `pip install -e .[hf]`; a quarter of a
minute on two cores.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import compiled_dilated as cd
from compiled_dilated import masks

# Of the tokens before it a query sees the last 128 and the first 4.
PROGRAM = masks.causal() & (masks.window(128) | masks.sinks(4))


def prompt_of(tokens: int) -> Tensor:
    """The first bytes of Python's own sources as tokens, (1, tokens)."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = bytearray(b"".join(file.read_bytes() for file in files)[:tokens])
    return torch.frombuffer(text, dtype=torch.uint8).long()[None]


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
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def main(arguments: list[str] | None = None) -> bool:
    """Generate; returns whether all tokens are those of one forward."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="300 tokens of context")
    context, new = (300, 30) if parser.parse_args(arguments).short else (16_384, 200)

    torch.manual_seed(0)
    model = cd.compile(model_of(context + new), attention=PROGRAM)
    prompt = prompt_of(context)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    # The time of the prompt alone is subtracted from that of prompt and tokens.
    start = time.perf_counter()
    model.generate(prompt, **options, max_new_tokens=1)
    prefilled = time.perf_counter()
    text = model.generate(prompt, **options, max_new_tokens=new)
    end = time.perf_counter()
    prefill, decode = prefilled - start, (end - prefilled) - (prefilled - start)
    print(f"prompt of {context:,} tokens: {prefill:.2f} s, with the preparations of a first call")
    print(f"{new} tokens behind it: {1e3 * max(decode, 0.0) / (new - 1):.1f} ms a token")

    # One forward without a cache: its likeliest tokens are the generated ones.
    with torch.no_grad():
        logits = model(text[:, :-1], use_cache=False).logits
    expected = logits[:, context - 1 :].argmax(-1)
    is_same = bool((expected == text[:, context:]).all())
    verdict = "the same tokens" if is_same else "OTHER tokens"
    print(f"one forward over all {text.shape[1]:,} tokens gives {verdict}")
    print(cd.sites(model))
    if not is_same:
        raise SystemExit("generated tokens differ from those of one forward")
    return is_same


if __name__ == "__main__":
    main()
