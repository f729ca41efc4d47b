"""Train with parameters sharded by FSDP2 and sequences by a ring.

Parameters are sharded over some processes, the sequence over others.

python examples/fsdp_ring.py [--short]               starts 4 processes of gloo on this machine
torchrun --nproc-per-node 4 examples/fsdp_ring.py    or under torchrun, here or on many machines

A mesh of 2 x 2 processes: those of a row ("ring") share each sequence, those of a column ("shards")
the parameters and the batch. The losses are those of one process that has everything.
Data are Python's own sources, one token a byte; half a minute on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import compiled_dilated as cd

PROGRAM = cd.longnet((64, 256), (1, 4), causal=True)
BATCH, HEADS, WIDTH, RING, SHARDS = 2, 4, 64, 2, 2


class Layer(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        attended = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class Model(nn.Module):
    """The mean loss of predicting the next byte."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256)
        self.layers = nn.ModuleList(Layer(attend) for _ in range(2))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def text_of(tokens: int) -> tuple[Tensor, Tensor]:
    """Token ids and the next tokens, both (BATCH, tokens)."""
    source = Path(argparse.__file__).read_bytes()[: BATCH * (tokens + 1)]
    ids = torch.tensor(list(source)).view(BATCH, tokens + 1)
    return ids[:, :-1], ids[:, 1:]


def losses_of(model: nn.Module, ids: Tensor, targets: Tensor, steps: int) -> Tensor:
    """The mean loss of this process's tokens, for each training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def train(tokens: int, steps: int) -> None:
    """Train as one process; the first compares with training alone."""
    mesh = init_device_mesh("cpu", (RING, SHARDS), mesh_dim_names=("ring", "shards"))
    ring, shards = mesh["ring"], mesh["shards"]
    ids, targets = text_of(tokens)

    torch.manual_seed(0)
    alone = Model(cd.compile(PROGRAM))
    model = Model(cd.compile(PROGRAM, mesh=ring, layout="zigzag"))
    model.load_state_dict(alone.state_dict())
    # Parameters are sharded over "shards", replicated over "ring"; gradients are averaged over all.
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # The sequences of this process's shard, and of these the tokens of its rank.
    shape = (BATCH // SHARDS, HEADS, tokens, WIDTH // HEADS)
    plan = cd.plan(PROGRAM, shape, ranks=RING, layout="zigzag")
    rows = slice(shards.get_local_rank(), None, SHARDS)
    positions = plan.positions(ring.get_local_rank())
    own_ids, own_targets = (x[rows][:, positions] for x in (ids, targets))
    losses = losses_of(model, own_ids, own_targets, steps)
    dist.all_reduce(losses)
    losses /= RING * SHARDS

    if dist.get_rank() > 0:
        return
    # The first process trains alone on all tokens, and compares.
    expected = losses_of(alone, ids, targets, steps)
    for step in range(steps):
        distributed = f"{float(losses[step]):.6f} of {RING * SHARDS} processes"
        print(f"step {step + 1}: loss {distributed}, {float(expected[step]):.6f} of one")
    parameters = sum(weight.numel() for weight in alone.parameters())
    local = sum(weight.to_local().numel() for weight in model.parameters())
    tokens_share = f"{len(positions)} of {tokens} tokens"
    print(f"a process has {local:,} of {parameters:,} parameters and {tokens_share}")
    difference = float((losses - expected).abs().max())
    print(f"losses differ by {difference:.1e} at most")
    if difference > 1e-4 or expected[-1] >= expected[0]:
        raise SystemExit("the losses are wrong, or did not fall")


def main(arguments: list[str] | None = None) -> int:
    """Start the processes, or be one of them; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="3 steps on 256 tokens")
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        torchrun = f"torch.distributed.run --standalone --nproc-per-node {RING * SHARDS}"
        command = [sys.executable, "-m", *torchrun.split(), __file__]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        return subprocess.run(command + ["--short"] * options.short, env=environment).returncode

    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    if dist.get_world_size() != RING * SHARDS:
        raise SystemExit(f"needs {RING * SHARDS} processes; got {dist.get_world_size()}")
    torch.set_num_threads(1)
    train(*((256, 3) if options.short else (2048, 10)))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
