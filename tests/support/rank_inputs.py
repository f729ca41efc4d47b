"""Shards of a real rank, compared with the simulated ring."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import compiled_dilated as cd
from compiled_dilated import Program
from compiled_dilated.masks import Mask

Tensors = tuple[Tensor, Tensor, Tensor]

LONGNET = cd.longnet((32, 64), (1, 2), causal=True)


def inputs(
    tokens: int,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
) -> Tensors:
    """The complete q, k and v, equal in all processes."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(count: int, width: int) -> Tensor:
        shape = (batch, count, tokens, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return normal(heads, 16), normal(kv_heads, 16), normal(kv_heads, 8)


def leaves(tensors: Tensors, positions: Tensor | None = None) -> list[Tensor]:
    """Copies that get gradients, of some positions or all."""
    parts: Iterable[Tensor] = tensors
    if positions is not None:
        parts = [x[:, :, positions] for x in tensors]
    return [x.clone().requires_grad_() for x in parts]


def positions_of(
    group: dist.ProcessGroup, program: Program | Mask, tensors: Tensors, layout: str | None
) -> Tensor:
    """Positions of this rank's tokens."""
    return plan_of(group, program, tensors, layout).positions(group.rank())


def plan_of(
    group: dist.ProcessGroup, program: Program | Mask, tensors: Tensors, layout: str | None
) -> Any:
    """The plan of a ring of a group."""
    q, k, v = tensors
    return cd.plan(
        program, q.shape, kv_heads=k.shape[1], value_dim=v.shape[3], dtype=q.dtype,
        ranks=group.size(), layout=layout,
    )  # fmt: skip


def check(
    program: Program | Mask,
    tensors: Tensors,
    mesh: Any,
    layout: str | None,
    data: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Check that results equal those of the simulated ring.

    Results are out, lse, gradients and the ledger.
    """
    group = mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh
    plan = plan_of(group, program, tensors, layout)
    load, positions = plan.loads[group.rank()], plan.positions(group.rank())
    about = f"{program} layout {layout} {tensors[0].dtype} {tuple(tensors[0].shape)}"
    attend = cd.compile(program, mesh=mesh, layout=layout)
    simulated = cd.compile(program, ranks=group.size(), layout=layout)
    # Forward: the rows of this rank, to the last bit.
    shards, complete = leaves(tensors, positions), leaves(tensors)
    results = attend(*shards, data=data, return_lse=True, **options)
    expected = simulated(*complete, data=data, return_lse=True, **options)
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y[:, :, positions]), about
    assert attend.ring is not None
    ledger = attend.ring.ledger
    counts = (ledger.received_bytes, ledger.messages, ledger.steps)
    assert counts == (load.received_bytes, load.messages, load.steps), about
    # Backward.
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in expected
    ]
    own_weights = [x[:, :, positions] for x in weights]
    grads = torch.autograd.grad(results, shards, own_weights)
    expected_grads = torch.autograd.grad(expected, complete, weights)
    assert attend.ring.ledger.received_bytes == load.received_bytes, about
    for x, y in zip(grads, expected_grads, strict=True):
        assert torch.equal(x, y[:, :, positions]), f"a gradient of {about}"
