"""The numbers of tapes: agreement with the kernel, tampering, untranslatable functions."""

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
from torch import Tensor

from compiled_dilated.mods import trace_score_mod
from compiled_dilated.native import expressions, tape
from compiled_dilated.native.build import SOURCES
from compiled_dilated.native.expressions import OPERATIONS, TYPES, Untranslatable
from compiled_dilated.native.tape import encode
from tests.functions import SCORE_MODS, Parameters
from tests.support.tape import HEADS, N, Native


def test_operations_are_those_of_the_kernel() -> None:
    header = (SOURCES / "functions.h").read_text()
    operations = re.search(r"enum class Operation : int \{(.*?)\};", header, re.S)
    assert operations is not None
    numbers = {name: str(number) for name, number in OPERATIONS.items()}
    assert dict(re.findall(r"(\w+) = (\d+),", operations[1])) == numbers
    for name, members in (("Register", expressions.Register), ("TapeKind", tape.Kind)):
        enum = re.search(rf"enum class {name} : int \{{(.*?)\}}", header, re.S)
        assert enum is not None
        names = [word.strip().upper() for word in enum[1].split(",")]
        assert names == [member.name for member in members]
    types = re.search(r"enum class Type : int \{(.*?)\}", (SOURCES / "problem.h").read_text(), re.S)
    assert types is not None
    assert len(types[1].split(",")) == len(TYPES)


@settings(max_examples=120)
@given(st.data())
def test_tampered_tapes_never_crash(native: Native, data: st.DataObject) -> None:
    """They raise, or compute something."""
    parameters = Parameters.of(HEADS, N, torch.float32)
    names = ("T5 buckets", "torch.where", "products of rows", "table[h, i - j]")
    name = data.draw(st.sampled_from(names))
    graph, operands = trace_score_mod(SCORE_MODS[name](parameters), torch.float32)
    code = list(encode(graph, operands))
    strange = st.one_of(st.integers(-3, 70), st.sampled_from((2**31, -(2**31), 2**62, -(2**63))))
    for _ in range(data.draw(st.integers(1, 4))):
        code[data.draw(st.integers(0, len(code) - 1))] = data.draw(strange)
    code = code[: data.draw(st.integers(0, len(code)))] if data.draw(st.booleans()) else code
    q = torch.arange(16, dtype=torch.int32)
    scores, grads = torch.zeros(16, 16), torch.ones(16, 16)
    sums = [torch.zeros(x.shape) for x in operands]
    places = (ctypes.c_void_p * len(sums))(*(x.data_ptr() for x in sums))
    calls = {"run_score_f32": (scores, 16), "run_backward_f32": (scores, grads, 16, places)}
    for run, arguments in calls.items():
        try:
            native(run, code, operands, *native.tile(q, q), *arguments)
        except RuntimeError as error:
            assert str(error)  # noqa: PT017


LONG, SQUARE = torch.zeros(1, 4096), torch.zeros(64, 64)
COMPLEX = torch.zeros(N, dtype=torch.complex64)


def products_of_matrices(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + (SQUARE @ SQUARE[i]).dot(SQUARE[j])


UNTRANSLATABLE: dict[str, tuple[Callable[..., Any], str]] = {
    "an operator": (lambda s, b, h, i, j: torch.special.i0(s), "the tape has no aten.i0"),
    "a long reduction": (lambda s, b, h, i, j: s + LONG[i].sum(), "reduces 4,096 numbers"),
    "too many operations": (products_of_matrices, "more than 4096"),
    "complex numbers": (lambda s, b, h, i, j: s + COMPLEX[i].abs(), "complex"),
}


@pytest.mark.parametrize("name", UNTRANSLATABLE)
def test_untranslatable_mods_raise_with_the_reason(name: str) -> None:
    mod, message = UNTRANSLATABLE[name]
    with pytest.raises(Untranslatable, match=message):
        encode(*trace_score_mod(mod, torch.float32))


def test_tape_sources_need_no_torch() -> None:
    """The sources of tapes include nothing of torch."""
    for path in Path(SOURCES).glob("function*"):
        assert "torch/" not in path.read_text()
