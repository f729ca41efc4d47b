"""Modules behave as torch modules: copies, dtypes, compile, export, state dicts, repr."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from compiled_dilated import DilatedAttention, MultiheadDilatedAttention
from tests.support.forked import run_code
from tests.support.modules import LENGTHS, RATES, assert_same, right_padding


@pytest.fixture
def module() -> MultiheadDilatedAttention:
    """A small multihead module."""
    return MultiheadDilatedAttention(32, 4, RATES, LENGTHS, gamma_init=0.5)


def test_copies_and_pickles_compute_the_same(module: MultiheadDilatedAttention) -> None:
    x = torch.randn(2, 37, 32)
    expected = module(x, x, x)[0]
    loaded = MultiheadDilatedAttention(32, 4, RATES, LENGTHS)
    loaded.load_state_dict(module.state_dict())
    for duplicate in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(duplicate(x, x, x)[0], expected)


def test_pickle_runs_in_another_process(module: MultiheadDilatedAttention, tmp_path: Path) -> None:
    x = torch.randn(2, 37, 32)
    torch.save((module, x, module(x, x, x)[0]), tmp_path / "module.pt")
    code = (
        "import sys, torch; module, x, expected = torch.load(sys.argv[1], weights_only=False);"
        "torch.testing.assert_close(module(x, x, x)[0], expected)"
    )
    run = run_code(code, str(tmp_path / "module.pt"))
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moves_to_a_dtype(module: MultiheadDilatedAttention, dtype: torch.dtype) -> None:
    x = torch.randn(2, 37, 32)
    expected = module(x, x, x)[0]
    moved = module.half() if dtype == torch.float16 else module.to(dtype)
    out = moved(*[x.to(dtype)] * 3)[0]
    assert out.dtype == dtype
    limit = 1e-5 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(out.float(), expected, rtol=limit, atol=limit)


def test_autocast(module: MultiheadDilatedAttention) -> None:
    x = torch.randn(2, 37, 32)
    expected = module(x, x, x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, x, x)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(module: MultiheadDilatedAttention, mode: Any) -> None:
    x = torch.randn(2, 37, 32)
    with mode():
        out = module(x, x, x)[0]
    assert not out.requires_grad
    torch.testing.assert_close(out, module(x, x, x)[0])


def test_compiles_without_a_break(module: MultiheadDilatedAttention) -> None:
    """One graph for the first length, one for all others.

    Calls are with padding, causal, and with gradients.
    """
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("inductor")
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    for n in (37, 64, 101, 130):
        x = torch.randn(2, n, 32, requires_grad=True)
        padding = right_padding([n, n // 2], n)
        out, _ = compiled(x, x, x, is_causal=True, key_padding_mask=padding)
        expected, _ = module(x, x, x, is_causal=True, key_padding_mask=padding)
        assert_same(out, expected, [x, *module.parameters()], 2e-5)
    assert 1 <= graphs.frame_count <= 2


def test_exports_with_any_length(module: MultiheadDilatedAttention) -> None:
    x, padding = torch.randn(2, 37, 32), right_padding([37, 20], 37)
    tokens = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    shapes: dict[str, Any] = dict.fromkeys(("query", "key", "value", "key_padding_mask"), tokens)
    shapes["is_causal"] = None
    inputs = (x, x, x, False, padding)
    exported = torch.export.export(module, inputs, dynamic_shapes=shapes).module()
    for n in (37, 50):
        x, padding = torch.randn(3, n, 32), right_padding([n, n // 2, 3], n)
        expected = module(x, x, x, False, padding)
        torch.testing.assert_close(exported(x, x, x, False, padding), expected)


def test_prints_its_arguments() -> None:
    lengths_and_rates = "segment_lengths=(8,), dilation_rates=(2,)"
    assert repr(DilatedAttention((8,), (2,))) == f"DilatedAttention({lengths_and_rates})"
    attention = DilatedAttention((8,), (2,), 0.5, heads="split", lowering="dense")
    options = "softmax_scale=0.5, lowering='dense', heads='split'"
    assert repr(attention) == f"DilatedAttention({lengths_and_rates}, {options})"


def test_a_saved_state_is_plain_tensors(module: MultiheadDilatedAttention) -> None:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert set(torch.load(file, weights_only=True)) == set(module.state_dict())
