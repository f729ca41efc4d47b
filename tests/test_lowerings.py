"""Parts of the lowerings.

Tokens of tiles, head ranges, pairs that plans count, and refusals.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.heads import head_ranges
from compiled_dilated.lowerings.tiling import costs
from compiled_dilated.lowerings.tiling.lattice import Lattice, Table
from compiled_dilated.native import build
from tests.comparing import assert_close, results_and_gradients

LATTICES = [
    Lattice(3, 4, 10, 5, 2),
    Lattice(0, 6, 9, 9, 1),
    Lattice(2, 3, 8, 2, 4),
    Lattice(1, 1, 0, 7, 3),
]
PERMUTATION = np.random.default_rng(0).permutation(16).astype(np.int64)
TABLES = [
    Table(np.array([[0, 2], [3, 1]], dtype=np.int32), 4, 7, PERMUTATION, 5),
    Table(np.array([[1], [0], [3]], dtype=np.int32), 3, 3),
]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rows", [*LATTICES, *TABLES], ids=repr)
def test_tiles_read_merge_and_add_their_positions(rows: Lattice | Table, batch: int) -> None:
    positions = torch.from_numpy(rows.positions())
    x = torch.randn(batch, 2, int(positions.max()) + 5, 3, dtype=torch.float64)
    # Reading gathers the positions, of a part of the sequence as well.
    tiles = rows.read(x)
    first = int(positions.min())
    assert torch.equal(rows.read(x[:, :, first:], shift=first), tiles)
    assert torch.equal(tiles, x[:, :, positions].transpose(1, 2).flatten(0, 1))
    # Adding sums into them.
    part, part_lse = torch.randn_like(tiles), torch.randn(tiles.shape[:3], dtype=torch.float64)
    flat = part.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    total, expected = torch.zeros_like(x), torch.zeros_like(x)
    rows.add(total, part)
    expected.index_add_(2, positions.reshape(-1), flat)
    torch.testing.assert_close(total, expected)
    # Merging into an empty result copies the part.
    out, lse = torch.zeros_like(x), torch.full(x.shape[:3], -torch.inf, dtype=torch.float64)
    rows.merge(out, lse, part, part_lse)
    torch.testing.assert_close(out, expected)
    assert (lse > -torch.inf).sum() == part_lse.numel()


@pytest.mark.parametrize("rows", LATTICES, ids=repr)
def test_a_lattice_of_one_sequence_is_read_as_a_view(rows: Lattice) -> None:
    x = torch.randn(1, 2, int(rows.positions().max()) + 1, 3)
    assert rows.read(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("rows", [*LATTICES, *TABLES], ids=repr)
def test_selected_tiles_are_a_partition(rows: Lattice | Table) -> None:
    for most in (1, 2, 5):
        pieces = [
            rows.select(start, start + most).positions() for start in range(0, rows.count, most)
        ]
        assert (np.concatenate(pieces) == rows.positions()).all()


@given(
    st.lists(st.integers(0, 23), min_size=1, max_size=24, unique=True).map(sorted),
    st.sampled_from([1, 2, 3, 4, 8]),
)
def test_head_ranges_follow_the_grouped_kernel(heads: list[int], group: int) -> None:
    covered = []
    for queries, keys in head_ranges(tuple(heads), group):
        shared, uneven = divmod(queries.count, keys.count)
        assert not uneven
        for i, head in enumerate(queries.indices()):
            covered.append(head)
            assert keys.indices()[i // shared] == head // group
    assert covered == heads


@pytest.mark.parametrize(
    ("program", "tokens", "computed_over_useful"),
    [
        (cd.longnet((2048, 4096, 8192), (1, 2, 4)), 65536, 1.0),
        (cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True), 65536, 1.03),
        (cd.local_window(256), 65536, 1.38),
        (cd.local_window(256, dilation=4), 65536, 2.5),
        (masks.causal() & (masks.window(256) | masks.sinks(4)), 65536, 2.2),
        (cd.hilbert_window((64, 64), 12), 4096, 2.2),
    ],
    ids=["longnet", "causal longnet", "window", "dilated window", "sinks", "hilbert"],
)
def test_computed_pairs_are_close_to_useful_ones(
    program: cd.Program, tokens: int, computed_over_useful: float
) -> None:
    """Counts, not times: they are equal on every machine."""
    if build.available() is not None:
        pytest.skip(f"no native kernel here: {build.available()}")
    plan = cd.plan(program, (1, 8, tokens, 64))
    assert plan.useful_pairs is not None
    assert plan.useful_pairs <= plan.cost.pairs <= computed_over_useful * plan.useful_pairs
    assert plan.cost.peak_bytes <= 0.05 * plan.problem.tensor_bytes or tokens < 65536


def test_a_gpu_computes_segments_and_residue_classes_by_slices() -> None:
    longnet = cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True)
    plan = cd.plan(longnet, (2, 8, 65536, 64), device="cuda")
    assert plan.lowering == "strided"
    assert plan.useful_pairs == plan.cost.pairs
    assert plan.cost.peak_bytes <= costs.budget(plan.problem)
    assert cd.plan(cd.local_window(256), (1, 8, 65536, 64), device="cuda").lowering == "flex"


def test_an_explicit_lowering_is_used_or_refused() -> None:
    shape = (1, 2, 300, 8)
    for lowering in ("dense", "strided", "tiled"):
        assert cd.plan(masks.segments(9), shape, lowering=lowering).lowering == lowering
    irregular = (
        r"'strided' refuses for branch 0: .* is not made of regular blocks\. Use lowering='tiled'"
    )
    with pytest.raises(ValueError, match=irregular):
        cd.plan(masks.sinks(3) | masks.window(9), shape, lowering="strided")
    with pytest.raises(ValueError, match="no backward of FlexAttention on a CPU"):
        cd.plan(masks.window(9), shape, lowering="flex", training=True)
    with pytest.raises(ValueError, match="bias over 65536 x 65536 pairs"):
        cd.plan(masks.window(9), (1, 2, 65536, 8), lowering="dense")


@pytest.mark.parametrize("lowering", ["dense", "strided", "tiled"])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_budget_of_one_tile_gives_the_same_numbers(
    batch: int, kv_heads: int, lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch entry, one tile and one key head at a time."""
    monkeypatch.setattr(costs, "_SHARE", 0.0)
    monkeypatch.setattr(costs, "_LEAST_BYTES", 1)
    program = cd.longnet((64, 100), (1, 3), causal=True)
    inputs = [
        torch.randn(batch, heads, 130, width, dtype=torch.float64, requires_grad=True)
        for heads, width in ((8, 16), (kv_heads, 16), (kv_heads, 12))
    ]
    attend = cd.compile(program, lowering=lowering)
    expected = results_and_gradients(partial(cd.reference, program), inputs)
    assert_close(results_and_gradients(attend, inputs), expected)


def test_a_mask_mod_is_evaluated_for_positions_of_the_sequence_only() -> None:
    """Tensors that it captures may be as long as the sequence."""
    ids = torch.arange(45) // 7
    mask = masks.from_mod(lambda b, h, q, kv: (ids[q] == ids[kv]) & (kv <= q))
    q, k, v = (torch.randn(1, 2, 45, 8, dtype=torch.float64) for _ in range(3))
    for lowering in ("dense", "tiled"):
        out = cd.compile(mask, lowering=lowering)(q, k, v)
        torch.testing.assert_close(out, cd.reference(mask, q, k, v), rtol=1e-10, atol=1e-10)
