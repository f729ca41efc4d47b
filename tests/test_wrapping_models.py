"""A wrapped model stays itself.

Calls, copies, pickles, repeated wrapping, many models and lengths.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.wrapping import graphs
from compiled_dilated.wrapping.flex import device_check
from tests.support.wrapped import (
    SEEN,
    WIDTH,
    Bare,
    Net,
    Q,
    X,
    aot_eager,
    assert_close,
    wrapped,
)

WINDOW = masks.causal() & masks.window(9)
MASKS: dict[str, Callable[[int], Tensor | None]] = {
    "causal": lambda n: None,
    "mask": lambda n: SEEN[:, :, :1, :1].expand(2, 1, n, n),
}


@pytest.mark.parametrize("mask_of", MASKS.values(), ids=MASKS)
def test_ten_lengths_are_two_graphs(mask_of: Callable[[int], Tensor | None]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model, plain = wrapped(Net(), backend=counter)
    for length in (50, 33, 61, 77, 100, 123, 64, 128, 40, 200):
        x, mask = torch.randn(2, length, WIDTH), mask_of(length)
        with torch.no_grad():
            assert_close(model(x, mask), plain(x, mask))
    assert 1 <= counter.frame_count <= 2


def test_compile_returns_the_model_itself() -> None:
    net = Net()
    names = list(net.state_dict())
    torch._dynamo.reset()
    model = cd.compile(net, attention=cd.longnet((16, 32), (1, 2), causal=True))
    assert model is net
    assert list(net.state_dict()) == names
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(X)
    torch.testing.assert_close(rounded.float(), model(X), rtol=0.05, atol=0.05)


def test_many_models_do_not_share_a_limit_of_graphs() -> None:
    torch._dynamo.reset()
    expected = cd.compile(masks.window(3))(Q[0], Q[0], Q[0])
    for _ in range(11):
        model = graphs.wrap(Bare(), masks.window(3), None, aot_eager)
        assert_close(model(Q[0]), expected)


class Modes(nn.Module):
    """A graph for every mode."""

    def forward(self, q: Tensor, mode: str) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q) + len(mode)


def test_past_the_limit_of_graphs_a_call_raises() -> None:
    """It would run without the program."""
    model, _ = wrapped(Modes(), masks.window(3))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):  # noqa: PT012
        for number in range(20):
            model(Q[0], "m" * number)


def test_copies_and_pickles_stay_wrapped(tmp_path: Path) -> None:
    model, _ = wrapped(Net(), WINDOW)
    expected = model(X)
    copied: Any = copy.deepcopy(model)
    torch.save(model, tmp_path / "model")
    for again in (copied, torch.load(tmp_path / "model", weights_only=False)):
        assert torch.equal(again(X), expected)
        with torch.no_grad():
            again.blocks[0].out.weight.zero_()
        assert not torch.equal(again(X), expected)
    assert torch.equal(model(X), expected)
    assert torch.equal(model.forward(X), expected)


def test_a_model_may_be_wrapped_again_but_not_a_part() -> None:
    model, plain = wrapped(Net(), WINDOW)
    first = model(X)
    graphs.wrap(model, None, None, aot_eager)
    assert_close(model(X), plain(X))
    graphs.wrap(model, WINDOW, None, aot_eager)
    assert torch.equal(model(X), first)
    with pytest.raises(ValueError, match="0 of Sequential is wrapped already"):
        graphs.wrap(nn.Sequential(model), None, None, aot_eager)


# Torch's check of devices ----------------------------------------------------------------------


def test_torchs_check_of_devices_is_replaced_only_while_a_model_is_traced() -> None:
    original = torch_flex._validate_device
    seen = []

    def backend(graph: object, inputs: object) -> object:
        run = aot_eager(graph, inputs)

        def observed(*args: object) -> object:
            seen.append(torch_flex._validate_device)
            return run(*args)

        return observed

    model, _ = wrapped(Bare(), backend=backend)
    for _ in range(2):
        model(Q[0])
        assert torch_flex._validate_device is original
    assert seen == [original, original]


def test_torchs_check_of_devices_is_restored_after_a_failed_trace() -> None:
    original = torch_flex._validate_device

    class Broken(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return F.scaled_dot_product_attention(q, q, q)

    model, _ = wrapped(Broken())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(Q[0])
    assert torch_flex._validate_device is original


def test_a_failed_trace_leaves_the_check_of_another_thread() -> None:
    original = torch_flex._validate_device
    device_check.replace()
    thread = threading.Thread(target=device_check.replace)
    thread.start()
    thread.join()
    device_check.restore()
    assert torch_flex._validate_device is not original

    def replace_and_restore() -> None:
        device_check.replace()
        device_check.restore()

    thread = threading.Thread(target=replace_and_restore)
    thread.start()
    thread.join()
    assert torch_flex._validate_device is original
