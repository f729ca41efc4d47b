"""One rank of a ring of real processes, which checks scenarios.

A failed check raises.

    python -m tests.distributed_worker URL SCENARIO...      or the same under torchrun

URL: where the processes meet, for init_process_group. RANK and WORLD_SIZE are in the environment.
Printed lines are for the test that started the process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import compiled_dilated as cd
from compiled_dilated import masks
from tests.cases import both_data
from tests.support.rank_failures import killed, stalled, unplugged
from tests.support.rank_inputs import LONGNET, check, inputs, leaves, positions_of
from tests.support.rank_mistakes import mistakes, refusals
from tests.support.rank_training import fully_sharded, learned_operands, restarted, training


def by_distance(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return score - 0.1 * abs(q - kv) * (h + 1)


def same_bits(group: dist.ProcessGroup) -> None:
    """Check that a ring has the bits of the simulated ring.

    Programs, layouts, uneven lengths, data and score_mods are compared.
    """
    mesh = init_device_mesh("cpu", (group.size(),))
    # Layouts.
    for layout in ("auto", "contiguous", "zigzag", "striped"):
        check(LONGNET, inputs(131), mesh, layout)
    check(masks.causal(), inputs(131), mesh, "zigzag")
    for layout in ("contiguous", "striped"):  # distances that differ from rank to rank
        check(masks.window(20) | masks.sinks(3), inputs(131), mesh, layout)
    check(LONGNET, inputs(131), group, "residue")
    check(cd.hilbert_window((9, 13), 2), inputs(117), group, "hilbert")
    # Heads and dtypes.
    split = cd.longnet((16, 48), (1, 3), heads="split")
    check(split, inputs(101, heads=6, kv_heads=6, batch=1), group, "auto")
    check(LONGNET, inputs(131, torch.bfloat16), group, "zigzag")
    check(masks.full(), inputs(64, torch.float32, kv_heads=1), group, None)
    check(masks.congruent(2, 1), inputs(50), group, "contiguous")
    # Data and a score_mod.
    packed = masks.documents(ids="documents") & masks.padding() & masks.causal()
    check(packed, inputs(90), group, "striped", both_data(2, 90))
    check(masks.causal(), inputs(75), group, "zigzag", score_mod=by_distance)
    # No pairs, and ranks without tokens.
    check(masks.full() & ~masks.full(), inputs(20), group, "contiguous")
    for tokens in (1, group.size() - 1):
        check(masks.causal(), inputs(tokens), group, "contiguous")


def compiled(group: dist.ProcessGroup) -> None:
    """Check that a compiled call has the bits of an eager one.

    Forward and backward are captured without a graph break.
    """
    complete, layout = inputs(131), "zigzag"
    own = positions_of(group, LONGNET, complete, layout)
    attend = cd.compile(LONGNET, mesh=group, layout=layout)

    def doubled(*x: Tensor) -> Tensor:
        return attend(*x) * 2

    fast = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    results = []
    calls: tuple[Callable[..., Tensor], ...] = (doubled, fast, fast)
    for call in calls:
        shards = leaves(complete, own)
        out = call(*shards)
        results.append((out, *torch.autograd.grad(out.square().sum(), shards)))
    eager, *compiled_results = results
    for result in compiled_results:
        assert all(torch.equal(x, y) for x, y in zip(result, eager, strict=True))


def variant(group: dist.ProcessGroup) -> None:
    """DistributedRingAttention: contiguous shards of (B, N, H, D)."""
    settings = {"segment_lengths": (16, 40), "dilation_rates": (1, 3)}
    ring = cd.variant("DistributedRingAttention", ring_size=group.size(), **settings)
    single = cd.variant("DistributedRingAttention", **settings)
    generator = torch.Generator().manual_seed(3)
    complete = torch.randn(2, 84, 4, 8, generator=generator, dtype=torch.float64).requires_grad_()

    def own(x: Tensor) -> Tensor:
        return x.tensor_split(group.size(), dim=1)[group.rank()]

    shard = own(complete).detach().clone().requires_grad_()
    out = ring(shard, shard, shard, is_causal=True)
    expected = single(complete, complete, complete, is_causal=True)
    (grad,) = torch.autograd.grad(out.square().sum(), shard)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), complete)
    for x, y in ((out, expected), (grad, expected_grad)):
        torch.testing.assert_close(x, own(y), rtol=1e-10, atol=1e-10)


def two_rings(group: dist.ProcessGroup) -> None:
    """Check the rows of a mesh as two rings.

    Ranks are counted within the row.
    """
    mesh = init_device_mesh("cpu", (2, group.size() // 2), mesh_dim_names=("data", "sequence"))
    check(LONGNET, inputs(70 + 10 * mesh.get_local_rank("data")), mesh["sequence"], "zigzag")


SCENARIOS: dict[str, Callable[[dist.ProcessGroup], None]] = {
    scenario.__name__: scenario
    for scenario in (
        *(same_bits, compiled, variant, two_rings),
        *(training, restarted, fully_sharded, learned_operands),
        *(refusals, mistakes),
        *(killed, stalled, unplugged),
    )
}


def main(url: str, *scenarios: str) -> None:
    torch.set_num_threads(1)
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=size, timeout=timeout)
    assert dist.group.WORLD is not None
    for scenario in scenarios:
        SCENARIOS[scenario](dist.group.WORLD)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
