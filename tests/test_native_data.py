"""Native kernels: masks by data, and functions of batch entry and head."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.masks import Mask
from compiled_dilated.programs import Program
from tests.support.native import Problem, assert_near, keep, normal, reference_results, work_of

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)


def ids(kind: str, batch: int, n: int) -> Tensor:
    """Document ids (batch, n)."""
    generator = torch.Generator().manual_seed(n)
    places = torch.arange(n).expand(batch, n)
    numbers = torch.randint(0, 9, (batch, n), generator=generator)
    least, most = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    of_kind: dict[str, Callable[[], Tensor]] = {
        "sorted": lambda: places // 37,
        "unsorted": lambda: numbers,
        "wide": lambda: (numbers << 32) + 5,
        "wide, equal low bits": lambda: (numbers << 32) * torch.where(places % 2 == 0, 1, -1),
        "ends of 64 bits": lambda: torch.where(numbers < 4, least, most - numbers % 2),
        "ends of 32 bits": lambda: torch.where(numbers < 4, -(2**31), 2**31 - 1 - numbers % 2),
        "negative": lambda: -places // 50 - numbers % 2,
        "int32": lambda: (-places // 29).int(),
        "int16": lambda: (places // 29 - 4).short(),
        "int8": lambda: (numbers * 20 - 100).to(torch.int8),
        "uint8": lambda: (numbers * 30).to(torch.uint8),
        "bool": lambda: numbers > 4,
        "all one": lambda: places * 0 + 7,
        "all different": lambda: places.flip(1),
    }
    return of_kind[kind]()


def check_data(
    mask: Program | Mask,
    data: dict[str, Tensor],
    batch: int,
    n: int,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Compare forward and backward with the reference.

    `data` may be longer than the sequence.
    """
    q, grad_out = (normal(batch, 2, n, 8, dtype=dtype, seed=seed) for seed in (1, 2))
    k, v = (normal(batch, 1, n, 8, dtype=dtype, seed=seed) for seed in (3, 4))
    work, grad_lse = work_of(mask, 2), normal(batch, 2, n, seed=5)
    tensors = [data[name] for name in work.names]
    problem = Problem(work, q, k, v, grad_out, grad_lse, tensors)
    assert_near(problem.results(), reference_results(mask, problem, data), repr(mask))


KINDS = (
    "sorted", "unsorted", "wide", "wide, equal low bits", "ends of 64 bits", "ends of 32 bits",
    "negative", "int32", "int16", "int8", "uint8", "bool", "all one", "all different",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_document_ids(kind: str) -> None:
    for batch, mask in (
        (3, masks.documents(ids="of")),
        (1, masks.documents(ids="of") & masks.causal()),
        (3, ~masks.documents(ids="of")),
    ):
        check_data(mask, {"of": ids(kind, batch, 211)}, 3, 211)


def test_data_of_any_layout_and_longer_than_the_sequence() -> None:
    n = 150
    documents, padding = ids("unsorted", 3, n + 61), torch.rand(3, n + 61) < 0.3
    mask = masks.documents(ids="of") & masks.padding()
    for change in (
        keep,
        lambda x: x.T.contiguous().T,
        lambda x: x[:1].expand(3, -1),
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x[:, :1].expand(x.shape),
    ):
        check_data(mask, {"of": change(documents), "padding": change(padding)}, 3, n)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_padding_and_global_tokens_by_data(share: float) -> None:
    n, batch = 211, 1 if share == 0.5 else 3
    flags = torch.rand(batch, n, generator=torch.Generator().manual_seed(3)) < share
    for mask in (
        masks.padding("of"),
        ~masks.padding("of") & masks.window(30),
        masks.padding("of") & masks.causal(),
        masks.global_tokens(data="of"),
        masks.global_tokens(data="of") & masks.causal(),
        masks.window(9) | masks.global_tokens(data="of"),
        ~masks.global_tokens(data="of"),
    ):
        check_data(mask, {"of": flags}, 3, n)


EVERY_THIRD, RUN = tuple(range(0, 211, 3)), tuple(range(40, 90))


@pytest.mark.parametrize(
    "positions", [(), (0,), (210,), (0, 1, 2, 100, 210), (500, 1000), EVERY_THIRD, RUN]
)
def test_global_positions(positions: tuple[int, ...]) -> None:
    for mask in (
        masks.global_tokens(positions=positions),
        masks.window(9) | masks.global_tokens(positions=positions),
        ~masks.global_tokens(positions=positions),
    ):
        check_data(mask, {}, 3, 211)


def test_new_data_follows_the_same_plan() -> None:
    mask = masks.documents(ids="of") & masks.padding() & masks.causal()
    attend = cd.compile(mask, lowering="native")
    q, k, v = (normal(2, 2, 90, 8, seed=seed) for seed in (1, 2, 3))
    plan = attend.plan(q, k, v)
    for kind in KINDS:
        data = {"of": ids(kind, 2, 90), "padding": ids("unsorted", 2, 90) < 3}
        expected: Any = cd.reference(mask, q, k, v, data=data)
        assert_near([attend(q, k, v, data=data)], [expected], kind)
        assert attend.plan(q, k, v) is plan
    assert attend.plan(q, k, v).lowering == "native"


@pytest.mark.parametrize("count", [1, 2])
def test_functions_of_the_entry_and_the_head(count: int, threads: Callable[[int], None]) -> None:
    """Heads and entries of equal masks alone reuse blocks."""
    threads(count)

    def of_entry(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return abs(q - kv) <= b * 40

    def of_head(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return abs(q - kv) <= h * 40

    def of_both(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q - kv >= 30 * b) & (q - kv < 60 * h)

    q, k, v = normal(3, 4, 257, 8), normal(3, 2, 257, 8, seed=1), normal(3, 2, 257, 8, seed=2)
    for function in (of_entry, of_head, of_both):
        mask = masks.from_mod(function)
        results = cd.compile(mask, lowering="native")(q, k, v, return_lse=True)
        expected = cd.reference(mask, q, k, v, return_lse=True)
        assert_near(list(results), list(expected), function.__name__)
