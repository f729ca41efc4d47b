"""Bounds of masks of data.

They are masks of positions, by which plans count pairs.
"""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.masks import Mask
from compiled_dilated.masks.bounds import lower_bound, upper_bound

N = 40
ALLOWED = torch.rand(N, generator=torch.Generator().manual_seed(0)) > 0.5


def captures_a_tensor(
    b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor
) -> torch.Tensor:
    return ALLOWED[kv] & (q >= kv)


LEAVES = [
    masks.causal(),
    masks.window(5),
    masks.segments(8),
    masks.documents(ids="ids"),
    masks.padding("hidden"),
    masks.from_mod(captures_a_tensor, masks.window(9)),
    masks.from_mod(captures_a_tensor, masks.documents(ids="ids")),
]
EXPRESSIONS = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        inner.map(lambda mask: ~mask),
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
    ),
    max_leaves=5,
)


def allowed(mask: Mask, data: dict[str, torch.Tensor]) -> torch.Tensor:
    zero, positions = torch.tensor(0), torch.arange(N)
    seen = torch.as_tensor(mask.allows(zero, zero, positions[:, None], positions, data))
    return seen.expand(N, N)


@given(EXPRESSIONS, st.integers(0, 2**16))
def test_a_mask_lies_between_its_bounds(mask: Mask, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = {
        "ids": torch.randint(0, 4, (1, N), generator=generator),
        "hidden": torch.rand(1, N, generator=generator) > 0.5,
    }
    least, most = lower_bound(mask), upper_bound(mask)
    assert not least.names
    assert not most.names
    seen = allowed(mask, data)
    assert not (allowed(least, {}) & ~seen).any()
    assert not (seen & ~allowed(most, {})).any()


@pytest.mark.parametrize("mask", [masks.causal(), masks.window(3) & ~masks.segments(4)], ids=str)
def test_a_mask_of_positions_is_its_own_bound(mask: Mask) -> None:
    assert upper_bound(mask) == lower_bound(mask) == mask


@pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)
@pytest.mark.parametrize(
    ("mask", "bound"),
    [
        (masks.causal() & masks.window(15) & masks.documents(ids="ids"), masks.window(15, 0)),
        (masks.segments(64) & ~masks.documents(ids="ids"), masks.segments(64)),
        (masks.window(15) & masks.padding(), masks.window(15)),
        (masks.documents(ids="ids"), masks.full()),
    ],
    ids=str,
)
def test_a_plan_counts_pairs_of_data_by_their_bound(mask: Mask, bound: Mask) -> None:
    shape = (2, 3, 1000, 16)
    plans = [cd.plan(program, shape, lowering="native") for program in (mask, bound)]
    counts = [plan.cost.pairs for plan in plans]
    assert counts[0] == counts[1]
    assert "at most" in plans[0].explain()
