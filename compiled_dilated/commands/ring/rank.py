"""One process of `compiled-dilated ring launch`; torchrun starts it."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor

from ... import compiler, measure
from ...attend import Attend
from ...text import read_program
from ..arguments import numbers, print_json


def main(program: str, shape: str, kv_heads: str, layout: str, dtype: str, style: str) -> int:
    """Compare this rank's shard with the simulated ring.

    Returns the exit code: 0 if the bits of all ranks are equal.
    """
    dist.init_process_group("gloo")
    try:
        table, layout_name = _compared(
            program, numbers("--shape", shape), int(kv_heads), layout, getattr(torch, dtype)
        )
        is_first_rank = dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
    ok = all(bool(row["same_bits"]) for row in table)
    if is_first_rank and style == "json":
        print_json({"layout": layout_name, "ranks": table, "ok": ok})
    elif is_first_rank:
        print(f"{layout_name}, forward + backward over gloo")
        print(tabulate(table, headers="keys", floatfmt=".3f"))
        print("every bit as the simulated ring's" if ok else "NOT THE SAME as the simulated ring")
    return 0 if ok else 1


def _compared(
    program: str, q_shape: tuple[int, ...], kv_heads: int, layout: str, dtype: torch.dtype
) -> tuple[list[dict[str, object]], str]:
    """Compute this rank's shard; compare it with the simulated ring.

    Returns a row for each rank (tokens, seconds, bytes received, whether all bits are equal), and
    the layout's name.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    code = read_program(program)
    kv_shape = (q_shape[0], kv_heads or q_shape[1], *q_shape[2:])
    plan = compiler.plan(code, q_shape, kv_shape[1], dtype=dtype, ranks=ranks, layout=layout)
    positions = plan.positions(rank)
    # The same numbers on every rank, so that each can run the whole simulated ring.
    generator = torch.Generator().manual_seed(0)
    q, k, v, out_grad = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in (q_shape, kv_shape, kv_shape, q_shape)
    )
    shards = [x[:, :, positions].requires_grad_() for x in (q, k, v)]
    ring = compiler.compile(code, mesh=dist.group.WORLD, layout=layout)
    assert ring.ring is not None

    # The first step plans, and builds the native kernel.
    shard_grad = out_grad[:, :, positions]
    _step(ring, shards, shard_grad)
    dist.barrier()
    results: list[list[Tensor]] = []
    seconds = measure.timed(lambda: results.append(_step(ring, shards, shard_grad)))
    # Bytes are reported for a forward alone.
    with torch.no_grad():
        ring(*shards)
    received = ring.ring.ledger.received_bytes
    simulated = compiler.compile(code, ranks=ranks, layout=layout)
    expected = _step(simulated, [x.requires_grad_() for x in (q, k, v)], out_grad)
    pairs = zip(results[0], expected, strict=True)
    same_bits = all(torch.equal(shard, x[:, :, positions]) for shard, x in pairs)
    row = {
        "rank": rank, "tokens": len(positions), "seconds": seconds,
        "received_bytes": received, "same_bits": same_bits,
    }  # fmt: skip
    table: list[dict[str, object]] = [{}] * ranks
    dist.all_gather_object(table, row)
    return table, plan.schedule.layout.name


def _step(attend: Attend, inputs: list[Tensor], out_grad: Tensor) -> list[Tensor]:
    """The output of q, k and v, and their gradients."""
    out = attend(*inputs)
    return [out, *torch.autograd.grad(out, inputs, out_grad)]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
