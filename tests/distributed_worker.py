"""One rank of a ring of real processes: `python -m tests.distributed_worker WHERE SCENARIO...`, or the same under torchrun.

WHERE the processes meet is a URL for init_process_group; RANK and WORLD_SIZE stand in the environment. A scenario checks and
raises; what it prints is for the test that started it.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import compiled_dilated as cd
from compiled_dilated import Program, masks
from compiled_dilated.masks import Mask
from compiled_dilated.ring.workers import Forward
from tests.cases import both_data

# How long a rank waits for one that stands still, and how soon, on a busy machine, all else is noticed.
PATIENCE_S = 4.0
PROMPT_S = 30.0

Tensors = tuple[Tensor, Tensor, Tensor]


def inputs(
    tokens: int,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
) -> Tensors:
    """The whole q, k and v, the same in every process."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(some_heads: int, dim: int) -> Tensor:
        return torch.randn(
            batch, some_heads, tokens, dim, generator=generator, dtype=torch.float64
        ).to(dtype)

    return normal(heads, 16), normal(kv_heads, 16), normal(kv_heads, 8)


def leaves(tensors: Tensors, at: Tensor | None = None) -> list[Tensor]:
    return [(x if at is None else x[:, :, at]).clone().requires_grad_() for x in tensors]


def check(
    program: Program | Mask,
    whole: Tensors,
    mesh: Any,
    layout: str | None,
    data: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Out, lse, gradients and the ledger of this rank are those of the simulated ring, to the last bit."""
    group = mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    q, k, v = whole
    plan = cd.plan(
        program, q.shape, kv_heads=k.shape[1], value_dim=v.shape[3], dtype=q.dtype, ranks=ranks, layout=layout
    )  # fmt: skip
    mine = plan.positions(rank)
    attend, simulated = (
        cd.compile(program, mesh=mesh, layout=layout),
        cd.compile(program, ranks=ranks, layout=layout),
    )
    shards, everything = leaves(whole, mine), leaves(whole)
    got = attend(*shards, data=data, return_lse=True, **options)
    want = simulated(*everything, data=data, return_lse=True, **options)
    about = f"{program} layout {layout} {q.dtype} {tuple(q.shape)}"
    assert attend.ring is not None
    assert attend.ring.ledger.received_bytes == plan.loads[rank].received_bytes, about
    assert attend.ring.ledger.messages == plan.loads[rank].messages, about
    assert attend.ring.ledger.steps == plan.loads[rank].steps, about
    assert all(torch.equal(x, y[:, :, mine]) for x, y in zip(got, want, strict=True)), about
    generator = torch.Generator().manual_seed(1)
    back = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in want
    ]
    grads = torch.autograd.grad(got, shards, [x[:, :, mine] for x in back])
    assert attend.ring.ledger.received_bytes == plan.loads[rank].received_bytes, about
    for x, y in zip(grads, torch.autograd.grad(want, everything, back), strict=True):
        assert torch.equal(x, y[:, :, mine]), f"a gradient of {about}"


def distances(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return score - 0.1 * abs(q - kv) * (h + 1)


LONGNET = cd.longnet((32, 64), (1, 2), causal=True)


def same_bits(group: dist.ProcessGroup) -> None:
    """Programs, layouts and lengths that the ranks do not divide; grouped heads, data, score_mod and low precision."""
    mesh = init_device_mesh("cpu", (group.size(),))
    for layout in ("auto", "contiguous", "zigzag", "striped"):
        check(LONGNET, inputs(131), mesh, layout)
    check(masks.causal(), inputs(131), mesh, "zigzag")
    for layout in ("contiguous", "striped"):  # distances that differ from rank to rank
        check(masks.window(20) | masks.sinks(3), inputs(131), mesh, layout)
    check(LONGNET, inputs(131), group, "residue")
    check(cd.hilbert_window((9, 13), 2), inputs(117), group, "hilbert")
    check(
        cd.longnet((16, 48), (1, 3), heads="split"),
        inputs(101, heads=6, kv_heads=6, batch=1),
        group,
        "auto",
    )
    check(LONGNET, inputs(131, torch.bfloat16), group, "zigzag")
    check(masks.full(), inputs(64, torch.float32, kv_heads=1), group, None)
    check(masks.congruent(2, 1), inputs(50), group, "contiguous")
    packed = masks.documents(ids="documents") & masks.padding() & masks.causal()
    check(packed, inputs(90), group, "striped", both_data(2, 90))
    check(masks.causal(), inputs(75), group, "zigzag", score_mod=distances)
    nothing = masks.full() & ~masks.full()
    check(nothing, inputs(20), group, "contiguous")
    for tokens in (1, group.size() - 1):  # ranks without tokens take part
        check(masks.causal(), inputs(tokens), group, "contiguous")


def compiled(group: dist.ProcessGroup) -> None:
    """Inside torch.compile without a break, forward and backward; two calls give the same bits."""
    whole, layout = inputs(131), "zigzag"
    mine = cd.plan(
        LONGNET, whole[0].shape, kv_heads=2, value_dim=8, ranks=group.size(), layout=layout
    ).positions(group.rank())
    attend = cd.compile(LONGNET, mesh=group, layout=layout)
    fast = torch.compile(lambda *x: attend(*x) * 2, fullgraph=True, backend="aot_eager")
    results = []
    calls: tuple[Callable[..., Tensor], ...] = (fast, fast, lambda *x: attend(*x) * 2)
    for call in calls:
        shards = leaves(whole, mine)
        out = call(*shards)
        results.append((out, *torch.autograd.grad(out.square().sum(), shards)))
    for each in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(each, results[0], strict=True))


def variant(group: dist.ProcessGroup) -> None:
    """DistributedRingAttention: contiguous shards of (B, N, H, D)."""
    settings = {"segment_lengths": (16, 40), "dilation_rates": (1, 3)}
    module = cd.variant("DistributedRingAttention", ring_size=group.size(), **settings)
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(2, 84, 4, 8, generator=generator, dtype=torch.float64)
    mine = whole.tensor_split(group.size(), dim=1)[group.rank()].clone().requires_grad_()
    everything = whole.clone().requires_grad_()
    got = module(mine, mine, mine, is_causal=True)
    want = cd.variant("DistributedRingAttention", **settings)(
        everything, everything, everything, is_causal=True
    )
    (grad,) = torch.autograd.grad(got.square().sum(), mine)
    (whole_grad,) = torch.autograd.grad(want.square().sum(), everything)
    for x, y in ((got, want), (grad, whole_grad)):
        torch.testing.assert_close(
            x, y.tensor_split(group.size(), dim=1)[group.rank()], rtol=1e-10, atol=1e-10
        )


def two_rings(group: dist.ProcessGroup) -> None:
    """Rows of a mesh are rings of their own, whose ranks are counted within the row."""
    mesh = init_device_mesh("cpu", (2, group.size() // 2), mesh_dim_names=("data", "sequence"))
    check(LONGNET, inputs(70 + 10 * mesh.get_local_rank("data")), mesh["sequence"], "zigzag")


class Model(nn.Module):
    """One block of attention between two projections, as a language model of a few parameters."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.qkv, self.head = nn.Embedding(17, 32), nn.Linear(32, 96), nn.Linear(32, 17)
        self.attend = attend

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        q, k, v = (
            each.unflatten(2, (4, 8)).transpose(1, 2) for each in self.qkv(x).chunk(3, dim=2)
        )
        logits: Tensor = self.head(x + self.attend(q, k, v).transpose(1, 2).flatten(2))
        return logits


STEPS = 50


def losses(
    model: Model,
    ids: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup | None,
    checkpoint: Path | None = None,
) -> list[float]:
    """Of `STEPS` steps; the loss is a mean over all tokens, those of other ranks too.

    checkpoint: a file that is written after every step, and where it is there already, gone on from.
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
        loss = (
            nn.functional.cross_entropy(
                model(ids).flatten(0, 1), targets.flatten(), reduction="sum"
            )
            / total
        )
        loss.backward()
        loss = loss.detach()
        if group is not None:
            for x in (loss, *(parameter.grad for parameter in model.parameters())):
                dist.all_reduce(x, group=group)
        optimizer.step()
        out.append(loss.item())
        if checkpoint is not None and (group is None or group.rank() == 0):
            written = checkpoint.with_suffix(".new")
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": out},
                written,
            )
            written.replace(checkpoint)
    return out


def training(group: dist.ProcessGroup, checkpoint: Path | None = None) -> None:
    """A sequence over all ranks trains as it does in one process."""
    program, tokens, layout = cd.longnet((16, 64), (1, 2), causal=True), 64, "contiguous"
    text = torch.randint(17, (2, tokens + 1), generator=torch.Generator().manual_seed(7))
    ids, targets = text[:, :-1], text[:, 1:]
    mine = cd.plan(program, (2, 4, tokens, 8), ranks=group.size(), layout=layout).positions(
        group.rank()
    )
    ring = cd.compile(program, mesh=group, layout=layout)
    got = losses(Model(ring), ids[:, mine], targets[:, mine], group, checkpoint)
    assert ring.ring is not None
    assert (
        group.rank() == 0 or ring.ring.ledger.received_bytes > 0
    )  # nobody stands before the first rank
    want = losses(Model(cd.compile(program)), ids, targets, None)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-6, atol=0)
    assert want[-1] < 0.5 * want[0]


def restarted(group: dist.ProcessGroup) -> None:
    """The last rank is killed inside a forward; torchrun starts all again, and the training goes on as if it had not been."""
    lives = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    checkpoint = Path(os.environ["CHECKPOINT"])
    if lives == 0:
        at_steps_of_others(group, lambda: os.kill(os.getpid(), signal.SIGKILL), after=STEPS // 2)
    else:
        print(f"goes on after {len(torch.load(checkpoint)['losses'])} steps", flush=True)
    training(group, checkpoint)


def refuses(message: str, call: Callable[[], object]) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert time.monotonic() - start < PROMPT_S


class Block(nn.Module):
    """Attention between two projections."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend, self.into, self.out = attend, nn.Linear(16, 3 * 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)).clone()


def fully_sharded(group: dist.ProcessGroup) -> None:
    """Beside FSDP2: parameters and the sequence sharded over the same ranks train like one process."""
    mesh, tokens, layout = init_device_mesh("cpu", (group.size(),)), 128, "zigzag"
    torch.manual_seed(0)
    alone, ring = Block(cd.compile(LONGNET)), Block(cd.compile(LONGNET, mesh=mesh, layout=layout))
    ring.load_state_dict(alone.state_dict())
    fully_shard(ring, mesh=mesh)
    x, y = torch.randn(2, 1, tokens, 16)
    mine = cd.plan(LONGNET, (1, 4, tokens, 4), ranks=group.size(), layout=layout).positions(
        group.rank()
    )
    optimizers = [torch.optim.SGD(each.parameters(), 0.5) for each in (alone, ring)]
    for _ in range(5):
        losses = (alone(x) - y).square().mean(), (ring(x[:, mine]) - y[:, mine]).square().mean()
        for optimizer, each in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            each.backward()
            optimizer.step()
        total = losses[1].detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total / group.size(), losses[0].detach(), rtol=1e-5, atol=1e-6)


def refusals(group: dist.ProcessGroup) -> None:
    """Ranks that do not mean the same part before data moves, all of them; then the group still works."""
    last = group.rank() == group.size() - 1

    def shards(rows: int = 20, dtype: torch.dtype = torch.float64, **options: int) -> Tensors:
        return tuple(x[:, :, :rows] for x in inputs(40, dtype, **options))  # type: ignore[return-value]

    causal = cd.compile(masks.causal(), mesh=group, layout="contiguous")
    differ = "the ranks of a ring must compute the same; ranks "
    kind = "in the program, the layout or a function"
    other = cd.compile(masks.window(3) if last else masks.causal(), mesh=group)
    refuses(f"differ from rank {group.rank()} {kind}", lambda: other(*shards()))
    laid_out = cd.compile(masks.causal(), mesh=group, layout="zigzag" if last else "striped")
    refuses(kind, lambda: laid_out(*shards()))
    refuses("in dtype: ", lambda: causal(*shards(dtype=torch.float32 if last else torch.float64)))
    refuses("in the scale: ", lambda: causal(*shards(), scale=0.5 if last else 0.25))
    bias = torch.full((40, 40), float(last))
    refuses(
        "in what the score_mod captures: ",
        lambda: causal(*shards(), score_mod=lambda s, b, h, i, j: s + bias[i, j]),
    )
    factor = 1.0 + last
    refuses(kind, lambda: causal(*shards(), score_mod=lambda s, b, h, i, j: s * factor))
    refuses(differ, lambda: causal(*shards(heads=8 if last else 4)))
    refuses("in key heads: ", lambda: causal(*shards(kv_heads=4 if last else 2)))
    refuses("in batch: ", lambda: causal(*shards(batch=1 if last else 2)))
    # One rank too many rows, and all refuse: ceil(64 / 3) is 22, which the first rank alone was to hold.
    wrong = "rank 0 of 3 must hold 22 of the 64 tokens under the layout contiguous; got 20. Take the rows that "
    refuses(wrong, lambda: causal(*shards(24 if last else 20)))
    check(LONGNET, inputs(131), group, "auto")


def learned_operands(group: dist.ProcessGroup) -> None:
    """Of a table that a score_mod captures each rank has the gradient of its own queries; together they are the whole."""
    tokens, layout = 75, "zigzag"
    whole = inputs(tokens)
    table = torch.randn(
        tokens, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    ).requires_grad_()
    program = masks.causal() & masks.window(30)

    def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return score + table[q, kv]

    own = cd.plan(
        program, whole[0].shape, kv_heads=2, value_dim=8, ranks=group.size(), layout=layout
    ).positions(group.rank())
    out = cd.compile(program, mesh=group, layout=layout)(*leaves(whole, own), score_mod=biased)
    (share,) = torch.autograd.grad(out.square().sum(), [table])
    dist.all_reduce(share, group=group)
    truth = cd.reference(program, *whole, score_mod=biased)
    (grad,) = torch.autograd.grad(truth.square().sum(), [table])
    torch.testing.assert_close(share, grad, rtol=1e-10, atol=1e-10)


def mistakes(group: dist.ProcessGroup) -> None:
    """Random calls with a mistake on one rank or on all: all raise the same words before data moves, and none waits."""
    tokens = 10 * group.size()
    whole = inputs(tokens)
    program = masks.causal() & masks.documents(ids="ids") & masks.padding()
    data = both_data(2, tokens)
    data = {"ids": data["documents"], "padding": data["padding"]}
    attend = cd.compile(program, mesh=group, layout="contiguous")
    own = cd.plan(
        program, whole[0].shape, kv_heads=2, value_dim=8, ranks=group.size(), layout="contiguous"
    ).positions(group.rank())
    right: dict[str, Any] = dict(zip("qkv", leaves(whole, own), strict=True)) | {"data": data}
    q, k = right["q"], right["k"]
    wrong: list[dict[str, Any]] = [
        {"q": q[0]},
        {"q": 3},
        {"q": q[..., :7]},
        {"q": q.float()},
        {"k": k[:, :1]},
        {"k": k[:, :, :-1]},
        {"k": k[:1]},
        {"data": None},
        {"data": {"ids": data["ids"]}},
        {"data": data | {"ids": data["ids"].float()}},
        {"data": data | {"ids": data["ids"][:, own]}},
        {"data": data | {"ids": data["ids"] + 1}},
        {"data": data | {"padding": data["padding"].logical_not()}},
        {"scale": math.nan},
        {"scale": 0.77},
        {"q_offset": 2},
        {"q_offset": -1},
        {"return_lse": "no"},
        {"sink_logits": torch.zeros(3)},
        {"score_mod": 3},
        {"score_mod": lambda s, b, h, i, j: s if i > j else -s},
        {"score_mod": lambda s, b, h, i, j: s * 2},
        {"is_causal": True},
    ]
    generator = torch.Generator().manual_seed(group.size())
    for number, change in enumerate(wrong):
        culprit = int(torch.randint(group.size(), (), generator=generator))
        options = right | (change if group.rank() == culprit else {})
        tensors = [options.pop(name) for name in "qkv"]
        with pytest.raises((TypeError, ValueError)) as raised:
            attend(*tensors, **options)
        said: list[str] = [""] * group.size()
        dist.all_gather_object(said, str(raised.value), group=group)
        alike = {
            text.split("cannot compute: ")[-1] for text in said if "differ from rank" not in text
        }
        assert len(alike) <= 1, (number, said)
        out = attend(*[right[name] for name in "qkv"], data=data)  # the group still works
        torch.testing.assert_close(
            out, cd.reference(program, *whole, data=data)[:, :, own], rtol=1e-10, atol=1e-10
        )


def at_steps_of_others(
    group: dist.ProcessGroup, what: Callable[[], object], after: int = 0
) -> None:
    """Let the last rank do `what` whenever it is about to compute with another's keys, but for the first `after` times."""
    if group.rank() != group.size() - 1:
        return
    compute, times = Forward.compute, 0

    def computed(self: Forward, step: Any, *received: Any) -> None:
        nonlocal times
        times += step.source != self.rank
        if step.source != self.rank and times > after:
            what()
        compute(self, step, *received)

    Forward.compute = computed  # type: ignore[assignment, method-assign]


def doomed(group: dist.ProcessGroup, what: Callable[[], object]) -> None:
    """The last rank does `what` after its own keys; all others get one clear error, soon, and it too if it still can."""
    at_steps_of_others(group, what)
    dist.barrier()
    patient = dist.new_group(timeout=timedelta(seconds=PATIENCE_S))
    attend = cd.compile(masks.full(), mesh=patient, layout="contiguous")
    whole = inputs(20 * group.size())
    mine = [x.tensor_split(group.size(), dim=2)[group.rank()] for x in whole]
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"^the ring broke: this rank .*; start all ranks again"
    ) as raised:
        _ = [
            attend(*mine) for _ in range(3)
        ]  # who has sent its keys may be missed in the next call alone
    elapsed = time.monotonic() - start
    assert "\n" not in str(raised.value)
    assert elapsed < PROMPT_S
    print(f"broke after {elapsed:.1f} s", flush=True)
    os._exit(0)  # a peer that stands still would keep the group from closing


def killed(group: dist.ProcessGroup) -> None:
    doomed(group, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stalled(group: dist.ProcessGroup) -> None:
    doomed(group, lambda: time.sleep(600))


def unplugged(group: dist.ProcessGroup) -> None:
    """The network of the last rank goes down: no socket tells, so each rank waits as long as its group is patient."""
    cut = ["ip", "link", "set", "dev", os.environ["GLOO_SOCKET_IFNAME"], "down"]
    doomed(group, lambda: subprocess.run(cut, check=True))


def main(where: str, *scenarios: str) -> None:
    torch.set_num_threads(1)
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    dist.init_process_group(
        "gloo", init_method=where, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    assert dist.group.WORLD is not None
    for scenario in scenarios:
        globals()[scenario](dist.group.WORLD)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
