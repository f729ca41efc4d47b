"""A vision transformer whose patches see their neighbours on the grid, and a class token that sees and is seen by all.

python examples/vit_neighborhoods.py [--short]

Needs `pip install -e .[hf]`. Trains on random stripes, upright or level; half a minute on two cores.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import compiled_dilated as cd
from compiled_dilated import masks

SIDE, PATCH = 96, 4
GRID = (SIDE // PATCH, SIDE // PATCH)


def stripes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 96, 96) of noisy stripes, and whether they stand upright."""
    upright = torch.randint(2, (count,), generator=generator)
    places = torch.arange(SIDE) * 0.7 + 6 * torch.rand(count, 1, generator=generator)
    waves = torch.sin(places)
    images = torch.where(upright[:, None, None] == 1, waves[:, None, :], waves[:, :, None])
    noise = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return images[:, None] + noise, upright


def main(arguments: list[str] | None = None) -> float:
    """Train; returns the share of new images that are told right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few steps")
    steps = 15 if parser.parse_args(arguments).short else 60

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = ViTForImageClassification(config)
    # Token 0 is the class token; the grid of patches starts behind it.
    program = masks.neighborhood(GRID, 3, offset=1) | masks.global_tokens(1)
    model = cd.compile(model, attention=program)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        images, labels = stripes(16, generator)
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step} of {steps}: loss {float(loss.detach()):.3f}", flush=True)

    images, labels = stripes(64, generator)
    with torch.no_grad():
        right = float((model(pixel_values=images).logits.argmax(-1) == labels).float().mean())
    print(f"{right:.0%} of new images told right; each patch sees at most 49 of {GRID[0] * GRID[1]}")
    print(cd.sites(model))
    return right


if __name__ == "__main__":
    main()
