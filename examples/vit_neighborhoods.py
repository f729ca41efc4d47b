"""Train a vision transformer whose patches see their neighbours.

A class token sees all patches.

python examples/vit_neighborhoods.py [--short]

The task: images of random stripes, vertical or horizontal. Needs `pip install -e .[hf]`; half a
minute on two cores.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, ViTConfig, ViTForImageClassification

import compiled_dilated as cd
from compiled_dilated import masks

SIDE, PATCH, RADIUS = 96, 4, 3
GRID = (SIDE // PATCH, SIDE // PATCH)
# Token 0 is the class token, which sees all tokens and is seen by all; the patches follow it.
PROGRAM = masks.neighborhood(GRID, RADIUS, offset=1) | masks.global_tokens(1)


def stripes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of noisy stripes, and whether the stripes are vertical.

    Shapes (count, 3, 96, 96) and (count,).
    """
    vertical = torch.randint(2, (count,), generator=generator)
    phases = torch.arange(SIDE) * 0.7 + 6 * torch.rand(count, 1, generator=generator)
    waves = torch.sin(phases)
    images = torch.where(vertical[:, None, None] == 1, waves[:, None, :], waves[:, :, None])
    noise = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return images[:, None] + noise, vertical


def model_of() -> ViTForImageClassification:
    """A random ViT of two layers over 24 x 24 patches."""
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
    return ViTForImageClassification(config)


def dense(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention by the dense float64 reference, with transformers' signature."""
    out = cd.reference(PROGRAM, query, key, value, scale=scaling)
    return out.transpose(1, 2).to(query.dtype), None


def largest_difference(model: ViTForImageClassification, images: Tensor) -> float:
    """The largest difference of logits from those of the dense reference."""
    AttentionInterface.register("dense", dense)
    reference = model_of()
    reference.load_state_dict(model.state_dict())
    reference.set_attn_implementation("dense")
    with torch.no_grad():
        difference = model(pixel_values=images).logits - reference(pixel_values=images).logits
    return float(difference.abs().max())


def main(arguments: list[str] | None = None) -> float:
    """Train; returns the share of new images that are classified right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few steps")
    steps = 15 if parser.parse_args(arguments).short else 60

    torch.manual_seed(0)
    model = cd.compile(model_of(), attention=PROGRAM)
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
        answers = model(pixel_values=images).logits.argmax(-1)
    right = float((answers == labels).float().mean())
    patches, neighbours = GRID[0] * GRID[1], (2 * RADIUS + 1) ** 2
    print(f"{right:.0%} of new images classified right (half would be by chance)")
    print(f"a patch sees at most {neighbours} of {patches} patches, and the class token")
    difference = largest_difference(model, images[:4])
    print(f"logits differ from the dense float64 reference by {difference:.1e} at most")
    print(cd.sites(model))
    if difference > 1e-4:
        raise SystemExit("the logits are wrong")
    return right


if __name__ == "__main__":
    main()
