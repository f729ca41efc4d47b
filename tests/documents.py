"""Names that code blocks use without a definition, by page."""

from __future__ import annotations

SHARED = """
import torch
import compiled_dilated as cd
from compiled_dilated import masks

torch.manual_seed(0)
"""

_MODEL = """
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


model, other_model = Attention(), Attention()
example_inputs = (torch.randn(1, 64, 32),)
"""

_MESH = """
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh

store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
device_mesh = init_device_mesh("cpu", (1,))
"""

_FILES = """
import numpy

for name in "qkv":
    numpy.save(f"{name}.npy", torch.randn(1, 2, 512, 16).numpy())
"""

_CALL = """
q, k, v = torch.randn(3, 1, 8, 256, 16)
attend = cd.compile(masks.causal())
"""

_PACKAGE = """
q, k, v = torch.randn(3, 1, 2, 64, 16)
program, n = masks.causal(), 48
"""

_TRANSFORMERS = """
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

name = "tiny-llama"
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
model = LlamaForCausalLM(config)
model.save_pretrained(name)
input_ids = torch.arange(12)[None]
mask, ids = torch.ones_like(input_ids), input_ids // 5
"""

PRELUDES = {
    "README.md": _MODEL + _MESH,
    "functions.md": _CALL,
    "memory.md": _MODEL,
    "models.md": _TRANSFORMERS,
    "packages.md": _PACKAGE,
    "ring.md": _MESH + _FILES + "program, q_shape, rank = masks.causal(), (1, 8, 4096, 64), 3\n",
}

# Code that runs behind a page's: calls of what it defines.
POSTLUDES = {"README.md": "model(*example_inputs)\n"}

# Each block of these pages exports a package, which takes a compiler ten seconds; README does too.
SLOW = {"packages.md"}
