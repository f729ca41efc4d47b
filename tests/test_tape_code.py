"""The numbers of tapes: agreement with the kernel, tampering, what cannot be translated."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled_dilated.mods import trace_score_mod
from compiled_dilated.native import expressions, tape
from compiled_dilated.native.build import SOURCES
from compiled_dilated.native.expressions import OPERATIONS, TYPES, Untranslatable
from compiled_dilated.native.tape import encode
from tests.functions import SCORE_MODS, Parameters
from tests.support.tape import HEADS, N, Native


def test_operations_are_those_of_the_kernel() -> None:
    header = (SOURCES / "functions.h").read_text()
    listed = re.search(r"enum class Operation : int \{(.*?)\};", header, re.S)
    assert listed is not None
    assert dict(re.findall(r"(\w+) = (\d+),", listed[1])) == {
        name: str(number) for name, number in OPERATIONS.items()
    }
    for name, members in (("Register", expressions.Register), ("TapeKind", tape.Kind)):
        found = re.search(rf"enum class {name} : int \{{(.*?)\}}", header, re.S)
        assert found is not None
        assert [word.strip().upper() for word in found[1].split(",")] == [
            member.name for member in members
        ]
    types = re.search(r"enum class Type : int \{(.*?)\}", (SOURCES / "problem.h").read_text(), re.S)
    assert types is not None
    assert len(types[1].split(",")) == len(TYPES)


@settings(max_examples=300)
@given(st.data())
def test_tampered_tapes_never_crash(native: Native, data: st.DataObject) -> None:
    """It raises, or computes something."""
    parameters = Parameters.of(HEADS, N, torch.float32)
    name = data.draw(
        st.sampled_from(("T5 buckets", "torch.where", "products of rows", "table[h, i - j]"))
    )
    graph, operands = trace_score_mod(SCORE_MODS[name](parameters), torch.float32)
    code = list(encode(graph, operands))
    strange = st.one_of(st.integers(-3, 70), st.sampled_from((2**31, -(2**31), 2**62, -(2**63))))
    for _ in range(data.draw(st.integers(1, 4))):
        code[data.draw(st.integers(0, len(code) - 1))] = data.draw(strange)
    code = code[: data.draw(st.integers(0, len(code)))] if data.draw(st.booleans()) else code
    q = torch.arange(16, dtype=torch.int32)
    scores, grads, sums = (
        torch.zeros(16, 16),
        torch.ones(16, 16),
        [torch.zeros(x.shape) for x in operands],
    )
    places = (ctypes.c_void_p * len(sums))(*(x.data_ptr() for x in sums))
    for run, more in (
        ("run_score_f32", (scores, 16)),
        ("run_backward_f32", (scores, grads, 16, places)),
    ):
        try:
            native(run, code, operands, *native.tile(q, q), *more)
        except RuntimeError as error:
            assert str(error)  # noqa: PT017


LONG, SQUARE, COMPLEX = (
    torch.zeros(1, 4096),
    torch.zeros(64, 64),
    torch.zeros(N, dtype=torch.complex64),
)
UNTRANSLATABLE: dict[str, tuple[Callable[..., Any], str]] = {
    "an operator": (lambda s, b, h, i, j: torch.special.i0(s), "the tape has no aten.i0"),
    "a long reduction": (lambda s, b, h, i, j: s + LONG[i].sum(), "reduces 4,096 numbers"),
    "too many operations": (
        lambda s, b, h, i, j: s + (SQUARE @ SQUARE[i]).dot(SQUARE[j]),
        "more than 4096",
    ),
    "complex numbers": (lambda s, b, h, i, j: s + COMPLEX[i].abs(), "complex"),
}


@pytest.mark.parametrize("name", UNTRANSLATABLE)
def test_untranslatable_mods_raise_with_the_reason(name: str) -> None:
    mod, says = UNTRANSLATABLE[name]
    with pytest.raises(Untranslatable, match=says):
        encode(*trace_score_mod(mod, torch.float32))


def test_tape_sources_need_no_torch() -> None:
    """Neither includes anything of torch."""
    for path in Path(SOURCES).glob("function*"):
        assert "torch/" not in path.read_text()
