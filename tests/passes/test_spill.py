"""Saved activations wait in files between forward and backward: the same bits, nothing held, nothing left behind."""

from __future__ import annotations

import copy
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch.fx import symbolic_trace

from passes.planning.inductor_hooks import inductor_configs
from passes.rewrites.spill import Spill, usage
from passes.rewrites.spill.operators import fetch, write, written
from tests.graphs import WIDTH, Block, Gelu, measured_peak

U = 1024 * WIDTH * 4


class Dropping(nn.Module):
    """Dropout, a mask of one byte, a residual, and a saved value that is a view of a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.wide(x).chunk(2, dim=-1)
        return x + self.out(nn.functional.dropout(left.sigmoid() * right, 0.5))


class Rectified(nn.Module):
    """Two saved masks that the trace has in backward, where they are used first."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = linear(x).relu().cumsum(1)
        return x


def compiled(model: nn.Module, *passes: Any, dynamic: bool = True) -> Callable[..., Any]:
    return torch.compile(
        model, backend=partial(compile_fx, config_patches=inductor_configs(passes)), dynamic=dynamic
    )


def step(function: Callable[..., Any], model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of the parameters."""
    with torch.enable_grad():
        return list(torch.autograd.grad(function(x).square().sum(), list(model.parameters())))


def held_after(run: Callable[[], Any]) -> int:
    """Bytes that torch's allocator holds for what `run` returns, by the profiler's memory events."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        kept = run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = sum(event.nbytes() for event in events if event.name() == "[memory]")
    del kept
    return held


@pytest.fixture(scope="module")
def block() -> tuple[nn.Module, Callable[..., Any], Callable[..., Any]]:
    """A transformer block, compiled without and with Spill."""
    torch.manual_seed(0)
    model = Block(Gelu())
    return model, compiled(model), compiled(model, Spill(least_bytes=2**15))


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    assert (usage().files, usage().file_bytes) == (0, 0)


@pytest.mark.parametrize("tokens", [1024, 333, 2])
def test_gradients_are_the_same_bits(block: Any, tokens: int) -> None:
    model, plain, spilled = block
    x = torch.randn(1, tokens, WIDTH)
    before = usage().written_bytes
    for one, other in zip(step(plain, model, x), step(spilled, model, x), strict=True):
        assert torch.equal(one, other)
    assert usage().written_bytes - before == 15 * x.nbytes


def test_gradients_are_those_of_float64(block: Any) -> None:
    model, _, spilled = block
    x = torch.randn(1, 77, WIDTH)
    double = copy.deepcopy(model).double()
    for one, other in zip(step(spilled, model, x), step(double, double, x.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_little_is_held_and_the_peak_falls(block: Any) -> None:
    model, plain, spilled = block
    x = torch.randn(1, 1024, WIDTH)
    held = {
        name: held_after(lambda each=each: each(x).sum())
        for name, each in (("plain", plain), ("spilled", spilled))
    }
    peak = {
        name: measured_peak(partial(step, each, model, x))
        for name, each in (("plain", plain), ("spilled", spilled))
    }
    assert held["plain"] > 15 * U
    assert held["spilled"] < 0.6 * U
    assert peak["spilled"] < peak["plain"]


def test_files_have_no_names_and_backward_gives_them_up(tmp_path: Path, block: Any) -> None:
    model, _, _ = block
    spilled = compiled(model, Spill(directory=str(tmp_path), least_bytes=2**15))
    loss = spilled(torch.randn(1, 1024, WIDTH)).sum()
    assert (usage().files, usage().file_bytes) == (9, 15 * U)
    assert list(tmp_path.iterdir()) == []
    loss.backward()
    assert usage().files == 0
    model.zero_grad()


def test_several_steps_may_be_under_way(block: Any) -> None:
    model, plain, spilled = block
    inputs = [torch.randn(1, tokens, WIDTH) for tokens in (512, 700)]
    losses = [spilled(x).square().sum() for x in inputs]
    for x, loss in reversed(list(zip(inputs, losses, strict=True))):
        for one, other in zip(
            step(plain, model, x), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            assert torch.equal(one, other)


def test_a_graph_dropped_or_failed_gives_its_files_up(block: Any) -> None:
    _, _, spilled = block
    loss = spilled(torch.randn(1, 512, WIDTH)).sum()
    assert usage().files == 9
    del loss
    assert usage().files == 0
    with pytest.raises(ZeroDivisionError):
        _ = spilled(torch.randn(1, 512, WIDTH)).sum() / (1 // 0)


def test_a_second_backward_is_refused(block: Any) -> None:
    """By torch where it gives the saved tensors to the backward; else by the handle, whose store is gone."""
    _, _, spilled = block
    for retain, message in (
        (True, "requires create_graph=False and retain_graph=False"),
        (False, "graph a second time"),
    ):
        loss = spilled(torch.randn(1, 512, WIDTH)).sum()
        with pytest.raises(RuntimeError, match=message):
            list(map(partial(loss.backward, None), [retain, retain]))
        del loss
    x = torch.randn(8)
    handle = written(write(x, ""), x)
    fetch(handle, None, x, x.shape, x.dtype, x.device)
    with pytest.raises(
        RuntimeError,
        match=r"was fetched by an earlier backward.*run the forward again, or compile without Spill",
    ):
        fetch(handle, None, x, x.shape, x.dtype, x.device)


def test_a_full_disk_is_told_and_leaves_nothing(block: Any) -> None:
    model, plain, spilled = block
    x = torch.randn(1, 512, WIDTH)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(
            OSError,
            match=r"131,072 bytes cannot be spilled to .* bytes are free: .*Pass another place",
        ):
            spilled(x)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert usage().files == 0
    assert torch.equal(step(plain, model, x)[0], step(spilled, model, x)[0])


def test_interrupted_at_any_moment_nothing_is_left(tmp_path: Path) -> None:
    code = f"""
import torch
from passes.rewrites.spill.operators import write, written
x, handles = torch.randn(2**18), []
for i in range(10**6):
    handles.append(written(write(x, {str(tmp_path)!r}), x))
    handles = handles[-50:]
    print(i, flush=True)
"""
    for sent, returned in (
        (signal.SIGINT, (1, 130, -signal.SIGINT)),
        (signal.SIGKILL, (-signal.SIGKILL,)),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        while process.stdout.readline().strip() != "60":
            assert process.poll() is None
        assert list(tmp_path.iterdir()) == []
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
        assert process.returncode in returned
        assert sent == signal.SIGKILL or "KeyboardInterrupt" in errors
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Dropping, Rectified])
def test_masks_and_parts_of_others_travel_too(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 256, WIDTH)
    grads = []
    for passes in ((), (Spill(least_bytes=2**10),)):
        torch._dynamo.reset()
        torch.manual_seed(1)
        before = usage().written_bytes
        grads.append(step(compiled(model, *passes), model, x))
    assert usage().written_bytes > before
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def layouts() -> Iterator[tuple[str, Tensor]]:
    base = torch.arange(6 * 10 * 8).reshape(6, 10, 8)
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float64,
        torch.bool,
        torch.int8,
        torch.complex64,
        torch.float8_e4m3fn,
    ):
        yield str(dtype), base.to(dtype)
    yield "transposed", base.transpose(0, 2)
    yield "part", base[:, 2:7, ::2]
    yield "expanded", base[:, :1].expand(6, 5, 8)
    yield "empty", base[:0]
    yield "number", base[0, 0, 0]
    yield "large part", torch.randn(3, 2**19)[:, 1:]


@pytest.mark.parametrize("x", [pytest.param(x, id=name) for name, x in layouts()])
def test_every_layout_comes_back(x: Tensor) -> None:
    handle = written(write(x, ""), x)
    assert handle.nbytes == 8
    back = fetch(handle, None, x, x.shape, x.dtype, x.device)
    assert back.is_contiguous()
    assert torch.equal(back.flatten().view(torch.uint8), x.flatten().view(torch.uint8))


def test_writing_does_not_hold_up_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """write returns while the thread is still at it; written waits for it."""
    go, threads, real = threading.Event(), [], os.pwrite

    def slow(file: int, data: Any, offset: int) -> int:
        threads.append(threading.current_thread().name)
        assert go.wait(10)
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    x = torch.randn(1000)
    handle = write(x, "")
    go.set()
    handle = written(handle, x)
    assert [each.startswith("spill") for each in threads] == [True]
    monkeypatch.undo()
    assert torch.equal(fetch(handle, None, x, x.shape, x.dtype, x.device), x)


def test_graphs_without_a_backward_are_left_alone() -> None:
    graph = symbolic_trace(lambda x: torch.sin(x)).graph
    text = str(graph)
    assert Spill()(graph) == []
    assert str(graph) == text


@pytest.mark.parametrize(
    "passes", [Spill(least_bytes=2**40), Spill(to="host", least_bytes=1)], ids=str
)
def test_nothing_large_enough_or_no_gpu_changes_nothing(passes: Spill) -> None:
    model, before = nn.Sequential(nn.Linear(8, 8), nn.GELU()), usage().written_bytes
    step(compiled(model, passes, dynamic=False), model, torch.randn(4, 8))
    assert usage().written_bytes == before


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Spill(to="tape"), "to must be 'disk' or 'host'; got 'tape'"),  # type: ignore[arg-type]
    (
        lambda: Spill(to="host", directory="/tmp"),
        "directory is for to='disk'; got '/tmp' with to='host'",
    ),
    (
        lambda: Spill(directory="/nowhere"),
        "directory must be one that can be written to; got '/nowhere'. Make it first",
    ),
    (lambda: Spill(least_bytes=0), "least_bytes must be at least 1; got 0"),
]


@pytest.mark.parametrize(("act", "message"), BAD)
def test_bad_options_are_named(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        act()


@pytest.mark.slow
def test_four_layers_hold_less_than_one_and_a_half_activations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(Gelu(128), 128) for _ in range(4)))
    x, held = torch.randn(1, 8192, 128), []
    for passes in ((), (Spill(),)):
        torch._dynamo.reset()
        function = compiled(model, *passes, dynamic=False)
        step(function, model, x)
        held.append(held_after(lambda function=function: function(x).sum()) / x.nbytes)
    assert held[0] > 36
    assert held[1] < 1.5
