"""Every name of the benchmark reports is a module.

It computes the reference of its program.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import compiled_dilated as cd
from compiled_dilated import Program, orders, variant, variants
from compiled_dilated.modules import Attention, Multihead, visible
from tests.support.attention import same, same_gradients

LENGTHS, RATES = (16, 40), (1, 3)
LONGNET = {"segment_lengths": LENGTHS, "dilation_rates": RATES}

# As the reports spell them.
NAMES = (
    "DilatedAttention",
    "MultiheadDilatedAttention",
    "ImprovedDilatedAttention",
    "ImprovedMultiheadDilatedAttention",
    "RingDilatedAttention",
    "RingMultiheadDilatedAttention",
    "BlockSparseRingDilatedAttention",
    "BlockSparseRingMultiheadDilatedAttention",
    "RingDilatedAttentionV2_r1",
    "RingDilatedAttentionV2_r4",
    "RingDilatedAttentionV2_r8",
    "RingDilatedAttentionV2_r16",
    "RingDilatedAttentionProduction_r1",
    "RingDilatedAttentionProduction_r8",
    "RingDilatedAttentionProduction_r16",
    "BlockSparse_LocalWindow_0.9",
    "BlockSparse_LocalWindow_0.95",
    "StandardRingAttention",
    "DistributedRingAttention",
    "HilbertRingAttention",
    "BlockSparseRingAttention",
    "RingDilatedV2_r1",
    "RingDilatedV2_r4",
    "RingDilatedV2_r8",
    "Production_r1",
    "Production_r4",
    "Production_r8",
    "Production_r16",
)

ROWS = pytest.mark.parametrize("row", variants.TABLE, ids=lambda row: row.name)


def needed(row: variants.Variant) -> dict[str, Any]:
    """The required arguments of a row."""
    values = {**LONGNET, "embed_dim": 32, "num_heads": 4}
    return {name: values[name] for name, is_required in row.takes.items() if is_required}


def program_of(row: variants.Variant, n: int, is_causal: bool = False) -> Program:
    """The program of a row for n tokens, in the original order."""
    if row.sparsities:
        density = {0.9: 0.1, 0.95: 0.05}[row.sparsities[0]]
        return cd.block_sparse(density, "local", tokens=n, causal=is_causal)
    return cd.longnet(LENGTHS, RATES, causal=is_causal)


class Reference(nn.Module):
    """The reference with the signature of the modules."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(
        self, *inputs: Tensor, is_causal: bool, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        data = {} if key_padding_mask is None else {"padding": key_padding_mask}
        program = self.program if key_padding_mask is None else visible(self.program)
        assert isinstance(program, Program)
        out = cd.reference(program, *(x.transpose(1, 2) for x in inputs), data=data)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)


def assert_is_the_reference(
    row: variants.Variant,
    module: nn.Module,
    n: int,
    is_causal: bool = False,
    padding: Tensor | None = None,
) -> None:
    """Forward and one backward, in float64."""
    module = module.double()
    reference: nn.Module = Reference(program_of(row, n, is_causal))
    shape: tuple[int, ...] = (2, n, 4, 8)
    if isinstance(module, Multihead):
        # The same projections around the reference.
        attention, reference, shape = reference, copy.deepcopy(module), (2, n, 32)
        reference.attention = attention
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    options = {"is_causal": is_causal, "key_padding_mask": padding}
    out, expected = module(*leaves, **options), reference(*leaves, **options)
    if isinstance(module, Multihead):
        assert out[1] is None
        out, expected = out[0], expected[0]
    assert out.shape == shape
    same(out, expected)
    same_gradients(out, expected, leaves, torch.randn_like(out))


def test_the_table_has_every_system_of_the_reports() -> None:
    names = list(itertools.chain.from_iterable(row.names for row in variants.TABLE))
    assert len(variants.TABLE) == 15
    assert set(NAMES) <= set(names)
    assert max(Counter(names).values()) == 1
    assert {variants.find(name)[0].name for name in NAMES} == {row.name for row in variants.TABLE}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_constructs_its_module(name: str) -> None:
    row, suffix = variants.find(name)
    module = variant(name, **needed(row))
    inner = module.attention if isinstance(module, Multihead) else module
    if isinstance(inner, variants.RingAttention):
        assert inner.ring_size == suffix.get("ring_size", 1)
        assert (inner.name, inner.execution) == (row.name, row.execution)
        inner = inner.attention
    else:
        assert row.execution == "single"
    assert type(inner) is row.attention
    if "sparsity" in suffix:
        assert inner.sparsity == suffix["sparsity"]


@pytest.mark.parametrize("n", [37, 130])
@ROWS
def test_every_variant_is_the_reference(row: variants.Variant, n: int) -> None:
    assert_is_the_reference(row, variant(row.name, **needed(row)), n)


@ROWS
def test_causal_and_padded(row: variants.Variant) -> None:
    padding = torch.arange(84) >= torch.tensor([[84], [50]])
    module = variant(row.name, **needed(row))
    assert_is_the_reference(row, module, 84, is_causal=True, padding=padding)


@pytest.mark.parametrize("lowering", ["dense", "tiled"])
@pytest.mark.parametrize("name", ["HilbertRingAttention", "BlockSparseRingAttention"])
def test_lowerings(name: str, lowering: str) -> None:
    row, _ = variants.find(name)
    module = variant(name, lowering=lowering, **needed(row))
    assert_is_the_reference(row, module, 84, is_causal=True)


# Rings


@pytest.mark.parametrize("ring_size", [2, 4, 8, 16])
@pytest.mark.parametrize(
    "row", [row for row in variants.TABLE if row.execution == "ring"], ids=lambda row: row.name
)
def test_a_ring_of_many_is_the_reference(row: variants.Variant, ring_size: int) -> None:
    module = variant(row.name, ring_size=ring_size, **needed(row))
    ring = module.attention if isinstance(module, Multihead) else module
    assert isinstance(ring, variants.RingAttention)
    branches = ring.program(37, is_causal=True).branches
    in_original_order = tuple(replace(branch, order=orders.identity()) for branch in branches)
    assert Program(in_original_order) == program_of(row, 37, is_causal=True)
    assert_is_the_reference(row, module, 37, is_causal=True)


def test_a_ring_of_four_with_padding() -> None:
    padding = torch.arange(84) >= torch.tensor([[84], [50]])
    row, _ = variants.find("RingDilatedAttentionV2")
    module = variant("RingDilatedAttentionV2_r4", **needed(row))
    assert_is_the_reference(row, module, 84, padding=padding)


def test_a_distributed_ring_needs_a_process_group() -> None:
    module = variant("DistributedRingAttention", ring_size=2, **LONGNET)
    x = torch.randn(1, 37, 4, 8)
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group\(\) first"):
        module(x, x, x)


@pytest.mark.parametrize(
    ("name", "ring_size"),
    [
        ("RingDilatedAttentionV2_r16", 16),
        ("Production_r4", 4),
        ("RingDilatedAttention_r262144", 262144),
    ],
)
def test_suffix_is_the_ring_size(name: str, ring_size: int) -> None:
    module, row = variant(name, ring_size=ring_size, **LONGNET), variants.find(name)[0]
    first_lines = f"RingAttention(\n  '{row.name}', execution='ring', ring_size={ring_size}\n"
    assert repr(module).startswith(first_lines)


# Hilbert order


@pytest.mark.parametrize(
    ("tokens", "grid"),
    [
        (1, None),
        (2, None),
        (4, (2, 2)),
        (16, (4, 4)),
        (37, None),
        (64, (8, 8)),
        (130, (10, 13)),
        (8192, (64, 128)),
        (2 * 37, None),
    ],
)
def test_hilbert_grid(tokens: int, grid: tuple[int, int] | None) -> None:
    assert variants.hilbert_grid(tokens) == grid
    program = variants.HilbertDilatedAttention(LENGTHS, RATES).program(tokens)
    order = orders.identity() if grid is None else orders.hilbert(*grid)
    assert {branch.order for branch in program.branches} == {order}


@pytest.mark.parametrize("lowering", ["auto", "tiled"])
def test_causal_does_not_leak_in_hilbert_order(lowering: str) -> None:
    attention = variants.HilbertDilatedAttention(LENGTHS, RATES, lowering=lowering)
    x = torch.randn(1, 64, 4, 8)
    changed = x.clone()
    changed[:, 40] += 1
    before = attention(x, x, x, is_causal=True)
    after = attention(changed, changed, changed, is_causal=True)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


# Block-sparse


@pytest.mark.parametrize(
    ("sparsity", "density"), [(0.9, 0.1), (0.95, 0.05), (0.5, 0.5), (0.0, 1.0)]
)
def test_sparsity_is_the_share_of_pairs_left_out(sparsity: float, density: float) -> None:
    n = 500
    program = variants.BlockSparseAttention(sparsity).program(n)
    assert program == cd.block_sparse(density, "local", tokens=n)
    (branch,) = program.branches
    q = torch.arange(n)
    share = branch.mask.allows(0, 0, q[:, None], q[None]).double().mean().item()
    # One token of window is up to 2 / n of the pairs.
    assert share == pytest.approx(density, abs=1 / n)


@pytest.mark.parametrize(("kind", "block"), [("global_local", 4), ("dilated", 16)])
def test_other_kinds_are_the_reference(kind: str, block: int) -> None:
    attention = variant("BlockSparseRingAttention", kind=kind, block=block)
    x = torch.randn(1, 200, 2, 8, dtype=torch.float64)
    expected = Reference(cd.block_sparse(0.1, kind, block, tokens=200))(x, x, x, is_causal=False)
    same(attention(x, x, x), expected)


@pytest.mark.parametrize("name", ["HilbertRingAttention", "BlockSparse_LocalWindow"])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_short_sequences(name: str, n: int) -> None:
    x = torch.randn(2, n, 2, 8)
    out = variant(name, **needed(variants.find(name)[0]))(x, x, x, is_causal=True)
    assert out.shape == x.shape
    torch.testing.assert_close(out[:, :1], x[:, :1])


# As torch modules


def test_copies_and_pickles_compute_the_same() -> None:
    x = torch.randn(1, 36, 4, 8)
    for row in variants.TABLE:
        if not row.multihead:
            module = variant(row.name, **needed(row))
            for duplicate in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert torch.equal(duplicate(x, x, x), module(x, x, x))
                assert repr(duplicate) == repr(module)


@pytest.mark.parametrize(
    "name", ["HilbertRingAttention", "BlockSparseRingMultiheadDilatedAttention"]
)
def test_programs_per_length_share_two_graphs(name: str) -> None:
    """Two layers, compiled one by one, have two graphs each.

    One is for the first length, one for all others.
    """
    torch._dynamo.reset()
    row, _ = variants.find(name)
    layers = [variant(name, **needed(row)) for _ in range(2)]
    graphs = CompileCounterWithBackend("aot_eager")
    for layer in layers:
        layer.compile(fullgraph=True, backend=graphs)
    for n in (36, 64, 101, 130, 36):
        x = torch.randn((2, n, 32) if row.multihead else (2, n, 4, 8), requires_grad=True)
        for layer in layers:
            out, expected = layer(x, x, x), layer.forward(x, x, x)
            if row.multihead:
                out, expected = out[0], expected[0]
            torch.testing.assert_close(out, expected)
            grads = torch.autograd.grad(out.sum(), x)
            torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), x))
    assert graphs.frame_count == 2


# The table


def test_rows_print() -> None:
    rows = variants.rows()
    assert [row["name"] for row in rows] == [row.name for row in variants.TABLE]
    for row in rows:
        assert all(isinstance(value, str) for value in row.values())
        assert all((row["program"], row["execution"], row["there"], row["here"]))
    printed = tabulate(rows, headers="keys")
    assert "1, 32, 256, 4096, 32768, 131072, 262144" in printed
    assert "0.9, 0.95" in printed
    with pytest.raises(FrozenInstanceError):
        variants.TABLE[0].name = "other"  # type: ignore[misc]


@ROWS
def test_attentions_are_modules_on_tokens_first(row: variants.Variant) -> None:
    assert issubclass(row.attention, Attention)
    assert row.multihead == ("Multihead" in row.name)
    execution = "ring" if "Ring" in row.name else "single"
    if row.name == "DistributedRingAttention":
        execution = "distributed ring"
    assert row.execution == execution
