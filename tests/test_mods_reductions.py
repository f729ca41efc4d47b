"""score_mods and mask_mods that reduce rows of tables, and methods of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask, noop_mask

import compiled_dilated as cd
from compiled_dilated import masks
from tests.support.mods import (
    N,
    attend_in,
    flex,
    in_one_graph,
    reductions,
    same,
    same_as_reference,
    tensors,
)
from tests.support.turns import in_turn

pytestmark = pytest.mark.usefixtures("fresh")

WAYS = ("dense", "tiled", "auto", "ring")


@pytest.mark.parametrize(
    ("name", "way"), in_turn(list(reductions(torch.zeros(1, 1))), WAYS, count=2)
)
def test_reductions_over_rows_of_tables(name: str, way: str) -> None:
    inputs, rows = tensors(), torch.randn(N, 5, dtype=torch.float64, requires_grad=True)
    mod, attend = reductions(rows)[name], attend_in(way, masks.causal())

    def attention(*inputs: Tensor, **options: Any) -> Any:
        return attend(*inputs, return_lse=True, **options)

    same_as_reference(attention, masks.causal(), inputs, (rows,), score_mod=mod)
    with torch.no_grad():
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, N, N, device="cpu")
        expected = flex([x.detach() for x in inputs], mod, block_mask)
        same(attend(*inputs, score_mod=mod), expected, 1e-5)


OF_TORCHS_KIND: dict[str, Callable[..., Any]] = {
    "noop_mask": noop_mask,
    "and_masks": and_masks(),
    "stack and all": lambda b, h, i, j: torch.stack([i >= j, i - j < 9]).all(),
    "hides nothing": lambda b, h, i, j: i >= 0,
    "torch.tensor": lambda b, h, i, j: torch.tensor(True),
}


@pytest.mark.parametrize(("name", "way"), in_turn(list(OF_TORCHS_KIND), WAYS, count=2))
def test_mask_mods_that_call_tensor_methods(name: str, way: str) -> None:
    fn, inputs = OF_TORCHS_KIND[name], tensors()
    allowed = create_mask(fn, 1, 1, N, N, device="cpu")
    expected = torch.nn.functional.scaled_dot_product_attention(
        *inputs, attn_mask=allowed, enable_gqa=True
    )
    same(attend_in(way, masks.from_mod(fn))(*inputs), expected)


@pytest.mark.parametrize("name", [*list(OF_TORCHS_KIND)[:-1], "torch.tensor"])
def test_compiled_mask_mods_that_call_tensor_methods(name: str) -> None:
    mask, inputs = masks.from_mod(OF_TORCHS_KIND[name]), tensors()
    same(in_one_graph(cd.compile(mask))(*inputs), cd.reference(mask, *inputs))


def test_plans_of_functions_that_call_methods_of_tensors() -> None:
    mask = masks.from_mod(lambda b, h, i, j: (i - j).abs() < 100, within=masks.window(100))
    assert cd.plan(mask, (1, 2, 512, 16)).useful_pairs == 2 * sum(
        min(511, i + 99) - max(0, i - 99) + 1 for i in range(512)
    )
