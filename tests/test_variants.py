"""Every name in the benchmark reports makes a module that computes what the name means."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from tabulate import tabulate
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import Program, orders, variant, variants
from compiled_dilated.modules import Attention, Multihead, visible

LENGTHS, RATES = (16, 40), (1, 3)

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
    """The arguments that have to be given."""
    values = {"segment_lengths": LENGTHS, "dilation_rates": RATES, "embed_dim": 32, "num_heads": 4}
    return {name: values[name] for name, must in row.takes.items() if must}


def meant(row: variants.Variant, n: int, is_causal: bool = False) -> Program:
    """The program of a row, written out, and in no order."""
    if row.sparsities:
        return cd.block_sparse(
            {0.9: 0.1, 0.95: 0.05}[row.sparsities[0]], "local", tokens=n, causal=is_causal
        )
    return cd.longnet(LENGTHS, RATES, causal=is_causal)


class Truth(nn.Module):
    """The reference, called as the modules are."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(
        self, *inputs: Tensor, is_causal: bool, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        data = {} if key_padding_mask is None else {"padding": key_padding_mask}
        program = self.program if key_padding_mask is None else visible(self.program)
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
    truth: nn.Module = Truth(meant(row, n, is_causal))
    shape: tuple[int, ...] = (2, n, 4, 8)
    if isinstance(module, Multihead):
        inner, truth, shape = truth, copy.deepcopy(module), (2, n, 32)
        truth.attention = inner
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found, wanted = (
        each(*leaves, is_causal=is_causal, key_padding_mask=padding) for each in (module, truth)
    )
    if isinstance(module, Multihead):
        assert found[1] is None
        found, wanted = found[0], wanted[0]
    assert found.shape == wanted.shape == shape
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(found)
    found_grads, wanted_grads = (torch.autograd.grad(out, leaves, grad) for out in (found, wanted))
    torch.testing.assert_close(found_grads, wanted_grads, rtol=1e-10, atol=1e-10)


def test_the_table_has_every_system_of_the_reports() -> None:
    known = [name for row in variants.TABLE for name in row.names]
    assert len(variants.TABLE) == 15
    assert set(NAMES) <= set(known)
    assert max(Counter(known).values()) == 1
    assert {variants.find(name)[0].name for name in NAMES} == {row.name for row in variants.TABLE}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_made(name: str) -> None:
    row, stated = variants.find(name)
    module = variant(name, **needed(row))
    inner = module.attention if isinstance(module, Multihead) else module
    if isinstance(inner, variants.RingAttention):
        assert inner.ring_size == stated.get("ring_size", 1)
        assert (inner.name, inner.execution) == (row.name, row.execution)
        inner = inner.attention
    else:
        assert row.execution == "single"
    assert type(inner) is row.attention
    if "sparsity" in stated:
        assert inner.sparsity == stated["sparsity"]


@pytest.mark.parametrize("n", [37, 130])
@ROWS
def test_every_variant_is_the_reference(row: variants.Variant, n: int) -> None:
    assert_is_the_reference(row, variant(row.name, **needed(row)), n)


@ROWS
def test_causal_and_padded(row: variants.Variant) -> None:
    padding = torch.arange(84) >= torch.tensor([[84], [50]])
    assert_is_the_reference(
        row, variant(row.name, **needed(row)), 84, is_causal=True, padding=padding
    )


@pytest.mark.parametrize("lowering", ["dense", "tiled"])
@pytest.mark.parametrize("name", ["HilbertRingAttention", "BlockSparseRingAttention"])
def test_lowerings(name: str, lowering: str) -> None:
    row, _ = variants.find(name)
    assert_is_the_reference(
        row, variant(name, lowering=lowering, **needed(row)), 84, is_causal=True
    )


# Rings


@pytest.mark.parametrize("ring_size", [2, 4, 8, 16])
@pytest.mark.parametrize(
    "row", [row for row in variants.TABLE if row.execution == "ring"], ids=lambda row: row.name
)
def test_a_ring_of_many_is_the_reference(row: variants.Variant, ring_size: int) -> None:
    module = variant(row.name, ring_size=ring_size, **needed(row))
    ring = module.attention if isinstance(module, Multihead) else module
    assert isinstance(ring, variants.RingAttention)
    orderless = Program(
        tuple(
            replace(branch, order=orders.identity())
            for branch in ring.program(37, is_causal=True).branches
        )
    )
    assert orderless == meant(row, 37, is_causal=True)
    assert_is_the_reference(row, module, 37, is_causal=True)


def test_a_ring_of_four_with_padding() -> None:
    padding = torch.arange(84) >= torch.tensor([[84], [50]])
    row, _ = variants.find("RingDilatedAttentionV2")
    assert_is_the_reference(
        row, variant("RingDilatedAttentionV2_r4", **needed(row)), 84, padding=padding
    )


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
    module, row = (
        variant(name, segment_lengths=LENGTHS, dilation_rates=RATES, ring_size=ring_size),
        variants.find(name)[0],
    )
    assert repr(module).startswith(
        f"RingAttention(\n  '{row.name}', execution='ring', ring_size={ring_size}\n"
    )


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
    assert {branch.order for branch in program.branches} == {
        orders.identity() if grid is None else orders.hilbert(*grid)
    }


@pytest.mark.parametrize("lowering", ["auto", "tiled"])
def test_causal_does_not_leak_in_hilbert_order(lowering: str) -> None:
    attention = variants.HilbertDilatedAttention(LENGTHS, RATES, lowering=lowering)
    x = torch.randn(1, 64, 4, 8)
    changed = x.clone()
    changed[:, 40] += 1
    before, after = (attention(each, each, each, is_causal=True) for each in (x, changed))
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
    kept = branch.mask.allows(0, 0, q[:, None], q[None]).double().mean().item()
    assert kept == pytest.approx(
        density, abs=1 / n
    )  # one token of window is up to 2 / n of the pairs


@pytest.mark.parametrize(("kind", "block"), [("global_local", 4), ("dilated", 16)])
def test_other_kinds(kind: str, block: int) -> None:
    attention = variant("BlockSparseRingAttention", kind=kind, block=block)
    x = torch.randn(1, 200, 2, 8, dtype=torch.float64)
    expected = Truth(cd.block_sparse(0.1, kind, block, tokens=200))(x, x, x, is_causal=False)
    torch.testing.assert_close(attention(x, x, x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["HilbertRingAttention", "BlockSparse_LocalWindow"])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_short(name: str, n: int) -> None:
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
            for each in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert torch.equal(each(x, x, x), module(x, x, x))
                assert repr(each) == repr(module)


@pytest.mark.parametrize(
    "name", ["HilbertRingAttention", "BlockSparseRingMultiheadDilatedAttention"]
)
def test_a_program_per_length_is_no_graph_per_length(name: str) -> None:
    """Two layers, compiled one by one, share one graph for the first length and one for all others."""
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

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
            torch.testing.assert_close(
                torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x)
            )
    assert graphs.frame_count == 2


# The table


def test_rows_print() -> None:
    rows = variants.rows()
    assert [row["name"] for row in rows] == [row.name for row in variants.TABLE]
    assert all(isinstance(value, str) for row in rows for value in row.values())
    assert all(row["program"] and row["execution"] and row["there"] and row["here"] for row in rows)
    printed = tabulate(rows, headers="keys")
    assert "1, 32, 256, 4096, 32768, 131072, 262144" in printed
    assert "0.9, 0.95" in printed
    with pytest.raises(FrozenInstanceError):
        variants.TABLE[0].name = "other"  # type: ignore[misc]


@ROWS
def test_attentions_are_modules_on_tokens_first(row: variants.Variant) -> None:
    assert issubclass(row.attention, Attention)
    assert row.multihead == ("Multihead" in row.name)
    assert (
        row.execution == {True: "ring", False: "single"}["Ring" in row.name]
        or row.name == "DistributedRingAttention"
    )


# Bad input

LONGNET = {"segment_lengths": LENGTHS, "dilation_rates": RATES}


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        (
            "RingDilatedAttentionV3",
            LONGNET,
            ValueError,
            "no variant is named 'RingDilatedAttentionV3'; close to it are RingDilatedAttentionV2",
        ),
        (
            "MultiHeadDilatedAttention",
            LONGNET,
            ValueError,
            "close to it are MultiheadDilatedAttention",
        ),
        (
            "xyz",
            {},
            ValueError,
            "no variant is named 'xyz'; there are DilatedAttention, MultiheadDilatedAttention",
        ),
        ("DilatedAttention_r4", LONGNET, ValueError, "no variant is named 'DilatedAttention_r4'"),
        (
            "RingDilatedAttention_0.9",
            LONGNET,
            ValueError,
            "no variant is named 'RingDilatedAttention_0.9'",
        ),
        (None, LONGNET, TypeError, "the name of a variant must be a string; got NoneType"),
        (
            "DilatedAttention",
            {},
            TypeError,
            "'DilatedAttention' needs segment_lengths, dilation_rates",
        ),
        (
            "DilatedAttention",
            LONGNET | {"ring_size": 2},
            TypeError,
            "'DilatedAttention' takes no ring_size. Its arguments are",
        ),
        ("StandardRingAttention", LONGNET | {"sparsity": 0.9}, TypeError, "takes no sparsity"),
        (
            "BlockSparseRingAttention",
            LONGNET,
            TypeError,
            "takes no segment_lengths, dilation_rates. Its arguments are sparsity",
        ),
        (
            "MultiheadDilatedAttention",
            LONGNET | {"heads": 4},
            TypeError,
            "needs embed_dim, num_heads",
        ),
        (
            "MultiheadDilatedAttention",
            LONGNET | {"attention_dropout": 0.0},
            TypeError,
            "takes no attention_dropout and needs embed_dim",
        ),
        (
            "Production_r4",
            LONGNET | {"ring_size": 2},
            ValueError,
            "'Production_r4' says ring_size=4; got ring_size=2. Use the name",
        ),
        (
            "BlockSparse_LocalWindow_0.9",
            {"sparsity": 0.8},
            ValueError,
            "says sparsity=0.9; got sparsity=0.8",
        ),
        (
            "RingDilatedAttention",
            LONGNET | {"ring_size": 0},
            ValueError,
            "ring_size must be at least 1; got 0",
        ),
        ("RingDilatedAttention_r0", LONGNET, ValueError, "ring_size must be at least 1; got 0"),
        (
            "RingDilatedAttention",
            LONGNET | {"ring_size": 1.5},
            TypeError,
            "ring_size must be an integer",
        ),
        ("HilbertRingAttention", LONGNET | {"heads": "few"}, ValueError, "heads must be one of"),
        (
            "HilbertRingAttention",
            {"segment_lengths": (8,), "dilation_rates": ()},
            ValueError,
            "dilation_rates is empty",
        ),
        (
            "HilbertRingAttention",
            LONGNET | {"lowering": "fast"},
            ValueError,
            "lowering must be one of",
        ),
        (
            "RingDilatedAttention",
            LONGNET | {"attention_dropout": 0.1},
            ValueError,
            "attention_dropout=0.1 cannot be honoured",
        ),
        (
            "BlockSparse_LocalWindow",
            {"sparsity": 1.0},
            ValueError,
            "sparsity must be a number in .*got 1.0",
        ),
        (
            "BlockSparse_LocalWindow",
            {"sparsity": "90%"},
            ValueError,
            "sparsity must be a number in",
        ),
        (
            "BlockSparse_LocalWindow",
            {"kind": "tiles"},
            ValueError,
            "kind must be one of 'local', 'global_local', 'dilated'",
        ),
        (
            "BlockSparse_LocalWindow",
            {"kind": "dilated", "sparsity": 0.4},
            ValueError,
            "keeps one block in a whole number",
        ),
        ("BlockSparse_LocalWindow", {"block": 0}, ValueError, "block must be at least 1"),
        (
            "BlockSparseRingMultiheadDilatedAttention",
            {"embed_dim": 30, "num_heads": 4},
            ValueError,
            "embed_dim must be a multiple of num_heads",
        ),
    ],
)
def test_bad_arguments(
    name: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        variant(name, **arguments)


def test_one_sequence_where_the_program_is_of_one_length() -> None:
    q, k = torch.randn(1, 8, 2, 8), torch.randn(1, 9, 2, 8)
    with pytest.raises(ValueError, match="over one sequence; got 8 query and 9 key tokens"):
        variant("BlockSparse_LocalWindow")(q, k, k)
