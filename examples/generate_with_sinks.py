"""Generate long text with a Llama whose layers see a window and the first tokens alone: StreamingLLM, arXiv 2309.17453.

python examples/generate_with_sinks.py [--short]

Needs `pip install -e .[hf]`. Random weights: it shows that tokens are those of one forward over the whole text, and how fast
they come.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import compiled_dilated as cd
from compiled_dilated import masks


def main(arguments: list[str] | None = None) -> bool:
    """Generate; returns whether every token is the one that a forward over the whole text gives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="300 tokens of context")
    prompt, new = (300, 30) if parser.parse_args(arguments).short else (16_384, 200)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=prompt + new,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model = cd.compile(model, attention=masks.causal() & (masks.window(128) | masks.sinks(4)))

    tokens = torch.randint(1, 256, (1, prompt))
    start = time.perf_counter()
    text = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False)
    seconds = time.perf_counter() - start
    print(f"{new} tokens behind {prompt:,} in {seconds:.1f} s, the prompt's own work among them")

    with torch.no_grad():
        whole = model(text[:, :-1], use_cache=False).logits[:, prompt - 1 :].argmax(-1)
    same = bool((whole == text[:, prompt:]).all())
    print(f"one forward over all {text.shape[1]:,} tokens gives {'the same' if same else 'other'} tokens")
    print(cd.sites(model))
    return same


if __name__ == "__main__":
    main()
