"""Native kernels: tampered code raises an error or gives a result."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.native.encode import encode
from compiled_dilated.programs import as_program
from tests.support.forked import run_code
from tests.support.native import normal, ops
from tests.support.native_tampering import TAMPERING

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)


def test_tampered_code_is_an_error_or_a_result() -> None:
    process = run_code(TAMPERING, "0", "100")
    assert process.stdout.endswith("alive\n"), (
        f"ended with {process.returncode}: {process.stderr[-2000:]}"
    )
    print(process.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_thousands_of_tampered_codes_are_errors_or_results(seed: int) -> None:
    process = run_code(TAMPERING, str(seed), "4000")
    assert process.stdout.endswith("alive\n"), (
        f"ended with {process.returncode}: {process.stderr[-2000:]}"
    )


DEEP = """
import torch
q = torch.randn(1, 1, 20, 4)
import compiled_dilated
count = 400_000
nodes = [number for place in range(count) for number in (3, 1, place)]
code = [2, -1, 1, 0, 1, 1, 0, 0, 1, count, 1, 1, count + 1, 0, 0, *nodes, 0]
try:
    torch.ops.compiled_dilated.native(q, q, q, None, None, code, 1.0, 0, None, False)
except RuntimeError as error:
    print(error)
print("alive")
"""


def test_deeply_nested_code_is_an_error_or_a_result() -> None:
    """Deep nests of masks overflow no stack."""
    process = run_code(DEEP)
    assert process.stdout.endswith("alive\n"), (
        f"ended with {process.returncode}: {process.stderr[-2000:]}"
    )
    assert "more than 1000 deep" in process.stdout


def test_malformed_code_raises() -> None:
    q, k, v = (normal(1, 1, 4, 4, dtype=torch.float32) for _ in range(3))
    good = encode(as_program(masks.causal()), 1)
    shortened, backwards = (good[:-1], (1,), ()), tuple(reversed(good))
    changed = (*good[:2], 3, *good[3:]), (good[0] + 1, *good[1:]), (10**15,) * 40
    for code in (*shortened, backwards, *changed):
        with pytest.raises(RuntimeError):
            ops.native(q, k, v, None, None, code, 1.0, 0, None, False)


# The code of check_inputs: the least and greatest size of three names, whether queries are tokens'
# last, the place; then an input's dtype, whether it is contiguous, its dims and sizes.
CHECKED = (1, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1, -1)


@pytest.mark.parametrize(
    ("place", "number"),
    [(8, 99), (8, -1), (10, -1), (10, 2**62), (11, -4), (11, -1000), (11, -(2**63))],
)
def test_tampered_checks_of_inputs_raise(place: int, number: int) -> None:
    x = torch.ones(5)
    torch.ops.compiled_dilated.check_inputs([x], CHECKED)
    code = list(CHECKED)
    code[place] = number
    with pytest.raises(RuntimeError, match="check_inputs: the code"):
        torch.ops.compiled_dilated.check_inputs([x], code)


@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("offset", [2**30 + 1, 2**62, 2**63 - 1])
def test_an_offset_past_every_position_raises(offset: int, q_len: int) -> None:
    q, k = normal(1, 1, q_len, 4), normal(1, 1, 8, 4)
    attend = cd.compile(masks.causal())
    with pytest.raises(RuntimeError, match="positions up to 2\\*\\*30"):
        attend(q, k, k, q_offset=torch.tensor([offset]))
    code = encode(as_program(masks.causal()), 1)
    with pytest.raises(RuntimeError, match="positions up to 2\\*\\*30"):
        ops.native(q, k, k, None, None, code, 1.0, offset, None, False)
