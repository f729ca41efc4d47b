"""The parts of the lowerings: lattices as views, bands cut into tiles, head ranges, tile counts of the plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.heads import head_ranges
from compiled_dilated.lowerings import costs
from compiled_dilated.lowerings.bands import Band, cut, cut_causal
from compiled_dilated.lowerings.lattice import Lattice, Table, pieces

LATTICES = [
    Lattice(3, ((4, 10),), ((5, 2),)),
    Lattice(0, ((6, 4),), ((9, 1),)),
    Lattice(2, ((2, 32), (3, 4)), ((4, 8), (6, 1))),
    Lattice(1, ((1, 0),), ((7, 3),)),
]


@pytest.mark.parametrize("rows", LATTICES, ids=repr)
def test_a_lattice_reads_and_adds_its_positions(rows: Lattice) -> None:
    x = torch.randn(1, 2, rows.last + 6, 3, dtype=torch.float64)
    read = rows.read(x[:, :, 1:], shift=1)
    where = torch.from_numpy(rows.positions())
    torch.testing.assert_close(read, x[0][:, where].transpose(0, 1), rtol=0, atol=0)
    total, expected = torch.zeros_like(x), torch.zeros_like(x)
    part = torch.randn(rows.count, 2, rows.size, 3, dtype=torch.float64)
    rows.add(total[:, :, 1:], part, shift=1)
    expected[0].index_add_(1, where.reshape(-1), part.transpose(0, 1).flatten(1, 2))
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("rows", LATTICES, ids=repr)
def test_a_lattice_that_says_it_does_not_copy_is_a_view(rows: Lattice) -> None:
    x = torch.randn(1, 2, rows.last + 1, 3)
    assert (rows.read(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == (not rows.copies)


def test_a_table_reads_writes_and_adds() -> None:
    table = Table(np.array([[0, 2], [3, 1]], dtype=np.int32), 4, 7, np.random.default_rng(0).permutation(16).astype(np.int64), 5)
    x = torch.randn(1, 2, 21, 3)
    where = torch.from_numpy(table.positions())
    assert where.shape == (2, 7)
    part = table.read(x)
    torch.testing.assert_close(part, x[0][:, where].transpose(0, 1), rtol=0, atol=0)
    total = torch.zeros_like(x)
    table.add(total, part)
    table.write(total, part * 2)
    torch.testing.assert_close(total[0][:, where], 2 * x[0][:, where], rtol=0, atol=0)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 20))
def test_pieces_cover_every_tile_once(axes: list[int], most: int) -> None:
    seen = np.zeros(axes, dtype=int)
    for box in pieces(tuple(axes), most):
        part = seen[tuple(slice(*span) for span in box)]
        assert part.size <= max(most, 1)
        part += 1
    assert (seen == 1).all()


@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(-40, 40), st.none() | st.integers(0, 50), st.none() | st.integers(0, 50),
    st.integers(1, 20),
)  # fmt: skip
def test_runs_hold_every_allowed_pair(q_len: int, k_len: int, shift: int, left: int | None, right: int | None, tile: int) -> None:
    q, kv = np.arange(q_len)[:, None] + shift, np.arange(k_len)
    allowed = np.ones((q_len, k_len), dtype=bool)
    allowed &= True if left is None else kv >= q - left
    allowed &= True if right is None else kv <= q + right
    covered = np.zeros((q_len, k_len), dtype=int)
    for run in cut(Band(q_len, k_len, shift, left, right), tile):
        for i in range(run.count):
            at = i * run.stride
            span = (
                slice(run.q_start + at, run.q_start + at + run.q_rows),
                slice(run.k_start + at, run.k_start + at + run.k_rows),
            )
            covered[span] += 1
            assert not run.full or allowed[span].all()
    assert (covered[allowed] == 1).all()
    assert covered.max(initial=0) <= 1


@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 20))
def test_runs_of_windows_that_are_moved_inwards(size: int, radius: int, tile: int) -> None:
    mask = masks.neighborhood((size,), radius, edges="shift")
    allowed = mask.allows(0, 0, np.arange(size)[:, None], np.arange(size))
    covered = np.zeros((size, size), dtype=bool)
    for run in cut(Band(size, size, 0, radius, radius, clamped=True), tile):
        for at in range(0, run.count * run.stride, run.stride):
            queries = slice(run.q_start + at, run.q_start + at + run.q_rows)
            keys = slice(run.k_start + at, run.k_start + at + run.k_rows)
            covered[queries, keys] = True
            assert not run.full or allowed[queries, keys].all()
    assert (covered >= allowed).all()


def test_tiles_of_one_geometry_are_one_run() -> None:
    """Each tile is full-sized, or its window is cut at an end of the keys."""
    long = 2**40
    runs = cut(Band(long, long, 0, 256, 256), 64)
    assert len(runs) == 4 + 1 + 4
    assert sum(run.count * run.q_rows for run in runs) == long
    assert len(cut_causal(Band(long, long, 0, None, 0))) <= 512
    assert len(cut(Band(long, 2**20, 5, 64, 64), 64)) <= 5


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 40))
def test_causal_runs_are_exact(q_len: int, k_len: int, shift: int) -> None:
    allowed = np.arange(k_len) <= np.arange(q_len)[:, None] + shift
    covered = np.zeros((q_len, k_len), dtype=int)
    for run in cut_causal(Band(q_len, k_len, shift, None, 0)):
        block = np.ones((run.q_rows, run.k_rows), dtype=int)
        covered[run.q_start : run.q_start + run.q_rows, run.k_start : run.k_start + run.k_rows] += (
            np.tril(block) if run.causal else block
        )
    assert (covered == allowed).all()


@given(st.lists(st.integers(0, 23), min_size=1, max_size=24, unique=True).map(sorted), st.sampled_from([1, 2, 3, 4, 8]))
def test_head_ranges_follow_the_grouped_kernel(heads: list[int], group: int) -> None:
    seen = []
    for queries, keys in head_ranges(tuple(heads), group):
        shared, uneven = divmod(queries.count, keys.count)
        assert not uneven
        for i, head in enumerate(queries.indices()):
            seen.append(head)
            assert keys.indices()[i // shared] == head // group
    assert seen == heads


@pytest.mark.parametrize(
    ("program", "tokens", "computed_over_useful"),
    [
        (cd.longnet((2048, 4096, 8192), (1, 2, 4)), 65536, 1.0),
        (cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True), 65536, 1.0),
        (cd.local_window(256), 65536, 1.38),
        (cd.local_window(256, dilation=4), 65536, 2.5),
        (masks.causal() & (masks.window(256) | masks.sinks(4)), 65536, 2.2),
        (cd.hilbert_window((64, 64), 12), 4096, 2.2),
    ],
    ids=["longnet", "causal longnet", "window", "dilated window", "sinks", "hilbert"],
)
def test_work_counted_for_the_speed_table(program: cd.Program, tokens: int, computed_over_useful: float) -> None:
    """Speed is measured elsewhere; how much is computed beyond what is allowed is exact, and holds on any machine."""
    plan = cd.plan(program, (1, 8, tokens, 64))
    assert plan.useful_pairs is not None
    assert plan.useful_pairs <= plan.cost.pairs <= computed_over_useful * plan.useful_pairs
    assert plan.cost.peak_bytes <= 0.05 * plan.problem.tensor_bytes or tokens < 65536


def test_short_sequences_are_dense_and_say_so() -> None:
    for tokens in (512, 1024, 2048):
        plan = cd.plan(masks.causal(), (1, 8, tokens, 64))
        assert plan.lowering == "dense"
        assert "dense" in plan.explain()


def test_an_explicit_lowering_is_used_or_refused() -> None:
    for lowering in ("dense", "strided", "tiled"):
        assert cd.plan(masks.window(9), (1, 2, 300, 8), lowering=lowering).lowering == lowering
    with pytest.raises(
        ValueError, match=r"'strided' refuses for branch 0: .* is not made of regular blocks\. Use lowering='tiled'"
    ):
        cd.plan(masks.sinks(3) | masks.window(9), (1, 2, 300, 8), lowering="strided")
    with pytest.raises(ValueError, match="no backward of FlexAttention on a CPU"):
        cd.plan(masks.window(9), (1, 2, 300, 8), lowering="flex", training=True)
    with pytest.raises(ValueError, match="bias over 65536 x 65536 pairs"):
        cd.plan(masks.window(9), (1, 2, 65536, 8), lowering="dense")


LONGNET = cd.longnet((64, 128, 256), (1, 2, 4), causal=True)


@pytest.mark.parametrize(
    ("program", "heads", "kv_heads", "tokens", "calls"),
    [
        (LONGNET, 8, 8, 64, 3),  # one call a branch
        (LONGNET, 8, 8, 63, 5),  # the last class of a branch has a token less
        (LONGNET, 8, 2, 64, 3),
        (LONGNET, 4, 1, 61, 5),
        (cd.longnet((64, 128), (1, 2), offsets="grouped"), 8, 8, 64, 2),  # heads of a class stand together
        (masks.window(99, 99, 3), 4, 2, 62, 2),  # all heads see all classes, of 21, 21 and 20 tokens
        (masks.window(30, 30, 3), 4, 2, 62, 3),  # a class sees less than itself
    ],
    ids=str,
)
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_residue_classes_of_a_short_sequence_are_one_batch(
    program: cd.Program | masks.Mask,
    heads: int,
    kv_heads: int,
    tokens: int,
    calls: int,
    apart: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """apart: with a budget that is too small for them together."""
    q, k, v = (
        torch.randn(1, count, tokens, width, dtype=torch.float64, requires_grad=True)
        for count, width in ((heads, 16), (kv_heads, 16), (kv_heads, 12))
    )
    attend = cd.compile(program, lowering="strided")
    assert sum(len(proposal.work) for proposal in attend.plan(q, k, v).chosen) == calls
    if apart:
        monkeypatch.setattr(costs, "exceeds", lambda *arguments: True)
    got, want = attend(q, k, v, return_lse=True), cd.reference(program, q, k, v, return_lse=True)
    back = tuple(torch.randn_like(x) for x in want)
    for x, y in zip(
        (*got, *torch.autograd.grad(got, (q, k, v), back)), (*want, *torch.autograd.grad(want, (q, k, v), back)), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
