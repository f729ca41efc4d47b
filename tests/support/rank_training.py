"""Scenarios of real ranks: training over shards.

Its losses are those of one process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import compiled_dilated as cd
from compiled_dilated import masks
from tests.support.rank_failures import at_remote_steps
from tests.support.rank_inputs import LONGNET, inputs, leaves, positions_of

STEPS = 50


class Model(nn.Module):
    """One block of attention between two projections: a small language model."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.qkv, self.head = nn.Embedding(17, 32), nn.Linear(32, 96), nn.Linear(32, 17)
        self.attend = attend

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        q, k, v = (
            part.unflatten(2, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2)
        )
        logits: Tensor = self.head(x + self.attend(q, k, v).transpose(1, 2).flatten(2))
        return logits


def losses(
    model: Model,
    ids: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup | None,
    checkpoint: Path | None = None,
) -> list[float]:
    """The losses of `STEPS` steps.

    A loss is a mean over the tokens of all ranks.

    group: None for one process.
    checkpoint: a file that is written after every step, from which training continues.
    """
    model = model.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    total = targets.numel() * (1 if group is None else group.size())
    out: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        out = saved["losses"]
    for _ in range(len(out), STEPS):
        optimizer.zero_grad()
        logits = model(ids).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum") / total
        loss.backward()
        loss = loss.detach()
        if group is not None:
            for x in (loss, *(parameter.grad for parameter in model.parameters())):
                dist.all_reduce(x, group=group)
        optimizer.step()
        out.append(loss.item())
        if checkpoint is not None and (group is None or group.rank() == 0):
            save(checkpoint, model, optimizer, out)
    return out


def save(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    """Replace a checkpoint in one step.

    A kill at any time leaves the old one or the new one.
    """
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
    new = checkpoint.with_suffix(".new")
    torch.save(state, new)
    new.replace(checkpoint)


def training(group: dist.ProcessGroup, checkpoint: Path | None = None) -> None:
    """A sequence over all ranks trains as it does in one process."""
    program, tokens, layout = cd.longnet((16, 64), (1, 2), causal=True), 64, "contiguous"
    text = torch.randint(17, (2, tokens + 1), generator=torch.Generator().manual_seed(7))
    ids, targets = text[:, :-1], text[:, 1:]
    plan = cd.plan(program, (2, 4, tokens, 8), ranks=group.size(), layout=layout)
    own = plan.positions(group.rank())
    attend = cd.compile(program, mesh=group, layout=layout)
    ring_losses = losses(Model(attend), ids[:, own], targets[:, own], group, checkpoint)
    assert attend.ring is not None
    # The first rank of a causal program receives nothing.
    assert group.rank() == 0 or attend.ring.ledger.received_bytes > 0
    expected = losses(Model(cd.compile(program)), ids, targets, None)
    torch.testing.assert_close(torch.tensor(ring_losses), torch.tensor(expected), rtol=1e-6, atol=0)
    assert expected[-1] < 0.5 * expected[0]


def restarted(group: dist.ProcessGroup) -> None:
    """The last rank is killed in a forward.

    torchrun restarts all, and training continues.
    """
    checkpoint = Path(os.environ["CHECKPOINT"])
    if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) == 0:
        at_remote_steps(group, lambda: os.kill(os.getpid(), signal.SIGKILL), after=STEPS // 2)
    else:
        print(f"goes on after {len(torch.load(checkpoint)['losses'])} steps", flush=True)
    training(group, checkpoint)


class Block(nn.Module):
    """Attention between two projections."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend, self.qkv, self.out = attend, nn.Linear(16, 3 * 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)).clone()


def fully_sharded(group: dist.ProcessGroup) -> None:
    """FSDP2 and a ring over the same ranks train like one process.

    Parameters and the sequence are sharded.
    """
    mesh, tokens, layout = init_device_mesh("cpu", (group.size(),)), 128, "zigzag"
    torch.manual_seed(0)
    single = Block(cd.compile(LONGNET))
    sharded = Block(cd.compile(LONGNET, mesh=mesh, layout=layout))
    sharded.load_state_dict(single.state_dict())
    fully_shard(sharded, mesh=mesh)
    x, y = torch.randn(2, 1, tokens, 16)
    plan = cd.plan(LONGNET, (1, 4, tokens, 4), ranks=group.size(), layout=layout)
    own = plan.positions(group.rank())
    optimizers = [torch.optim.SGD(block.parameters(), 0.5) for block in (single, sharded)]
    for _ in range(5):
        single_loss = (single(x) - y).square().mean()
        sharded_loss = (sharded(x[:, own]) - y[:, own]).square().mean()
        for optimizer, loss in zip(optimizers, (single_loss, sharded_loss), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        mean = sharded_loss.detach().clone()
        dist.all_reduce(mean)
        mean /= group.size()
        torch.testing.assert_close(mean, single_loss.detach(), rtol=1e-5, atol=1e-6)


def learned_operands(group: dist.ProcessGroup) -> None:
    """Gradients of a table that a score_mod captures.

    A rank has the share of its queries.
    """
    tokens, layout = 75, "zigzag"
    complete = inputs(tokens)
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(tokens, tokens, dtype=torch.float64, generator=generator).requires_grad_()
    program = masks.causal() & masks.window(30)

    def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return score + table[q, kv]

    shards = leaves(complete, positions_of(group, program, complete, layout))
    out = cd.compile(program, mesh=group, layout=layout)(*shards, score_mod=biased)
    assert isinstance(out, torch.Tensor)
    (share,) = torch.autograd.grad(out.square().sum(), [table])
    dist.all_reduce(share, group=group)
    expected = cd.reference(program, *complete, score_mod=biased)
    assert isinstance(expected, torch.Tensor)
    (grad,) = torch.autograd.grad(expected.square().sum(), [table])
    torch.testing.assert_close(share, grad, rtol=1e-10, atol=1e-10)
