"""One process of `compiled-dilated ring launch`; torchrun starts it."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from ... import compiler, measure
from ...text import read_program
from ..arguments import numbers, print_json


def main(program: str, shape: str, kv_heads: str, layout: str, dtype: str, style: str) -> int:
    """Compute this rank's share, and compare it with the simulated ring; 0 if all ranks agree to the bit."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    code, sizes = read_program(program), numbers("--shape", shape)
    kind = getattr(torch, dtype)
    kv_shape = (sizes[0], int(kv_heads) or sizes[1], *sizes[2:])
    plan = compiler.plan(code, sizes, kv_shape[1], dtype=kind, ranks=ranks, layout=layout)
    mine = plan.positions(rank)
    random = torch.Generator().manual_seed(0)
    whole = [torch.randn(each, generator=random).to(kind) for each in (sizes, kv_shape, kv_shape, sizes)]
    shards = [x[:, :, mine].requires_grad_() for x in whole[:3]]
    ring = compiler.compile(code, mesh=dist.group.WORLD, layout=layout)
    assert ring.ring is not None

    def step() -> tuple[torch.Tensor, ...]:
        out = ring(*shards)
        return out, *torch.autograd.grad(out, shards, whole[3][:, :, mine])

    step()  # plans
    dist.barrier()
    results: list[tuple[torch.Tensor, ...]] = []
    seconds = measure.timed(lambda: results.append(step()))
    with torch.no_grad():
        ring(*shards)
    received = ring.ring.ledger.received_bytes
    simulated = compiler.compile(code, ranks=ranks, layout=layout)
    inputs = [x.requires_grad_() for x in whole[:3]]
    out = simulated(*inputs)
    wanted = (out, *torch.autograd.grad(out, inputs, whole[3]))
    same = all(torch.equal(a, b[:, :, mine]) for a, b in zip(results[0], wanted, strict=True))
    table: list[dict[str, object]] = [{}] * ranks
    row = {"rank": rank, "tokens": len(mine), "seconds": seconds, "received_bytes": received, "same_bits": same}
    dist.all_gather_object(table, row)
    if rank == 0:
        ok = all(bool(each["same_bits"]) for each in table)
        if style == "json":
            print_json({"layout": plan.schedule.layout.name, "ranks": table, "ok": ok})
        else:
            from tabulate import tabulate

            print(f"{plan.schedule.layout.name}, forward + backward over gloo")
            print(tabulate(table, headers="keys", floatfmt=".3f"))
            print("every bit as the simulated ring's" if ok else "NOT THE SAME as the simulated ring")
    dist.destroy_process_group()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
