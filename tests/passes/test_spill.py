"""Spilled activations: the same gradients, less memory, no files left over."""

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
    """Saved values of several kinds.

    One is a mask of one byte, one a view of a part of another value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.wide(x).chunk(2, dim=-1)
        return x + self.out(nn.functional.dropout(left.sigmoid() * right, 0.5))


class Rectified(nn.Module):
    """Saved masks that the trace first uses in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = linear(x).relu().cumsum(1)
        return x


def compiled(model: nn.Module, *passes: Any, dynamic: bool = True) -> Callable[..., Any]:
    backend = partial(compile_fx, config_patches=inductor_configs(passes))
    return torch.compile(model, backend=backend, dynamic=dynamic)


def step(function: Callable[..., Any], model: nn.Module, x: Tensor) -> list[Tensor]:
    """Run a training step. Returns the parameters' gradients."""
    with torch.enable_grad():
        return list(torch.autograd.grad(function(x).square().sum(), list(model.parameters())))


def retained_bytes(run: Callable[[], Any]) -> int:
    """Bytes of a call that live as long as its result.

    They come from the profiler's events.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    size = sum(event.nbytes() for event in events if event.name() == "[memory]")
    del result  # not freed while the profiler ran
    return int(size)


def assert_same_bits(results: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def block() -> tuple[nn.Module, Callable[..., Any], Callable[..., Any]]:
    """A transformer block: eager, compiled, and compiled with Spill."""
    torch.manual_seed(0)
    model = Block(Gelu())
    return model, compiled(model), compiled(model, Spill(least_bytes=2**15))


@pytest.fixture(autouse=True)
def no_files_stay() -> Iterator[None]:
    """Every test ends without files."""
    yield
    assert (usage().files, usage().file_bytes) == (0, 0)


@pytest.mark.parametrize("tokens", [1024, 333, 2])
def test_gradients_are_the_same_bits(block: Any, tokens: int) -> None:
    model, plain, spilled = block
    x = torch.randn(1, tokens, WIDTH)
    before = usage().written_bytes
    assert_same_bits(step(spilled, model, x), step(plain, model, x))
    assert usage().written_bytes - before == 15 * x.nbytes


def test_gradients_are_those_of_float64(block: Any) -> None:
    model, _, spilled = block
    x = torch.randn(1, 77, WIDTH)
    exact = copy.deepcopy(model).double()
    grads = [grad.double() for grad in step(spilled, model, x)]
    torch.testing.assert_close(grads, step(exact, exact, x.double()), rtol=1e-4, atol=1e-4)


def test_little_memory_is_retained_and_the_peak_falls(block: Any) -> None:
    model, plain, spilled = block
    x = torch.randn(1, 1024, WIDTH)
    assert retained_bytes(lambda: plain(x).sum()) > 15 * U
    assert retained_bytes(lambda: spilled(x).sum()) < 0.6 * U
    plain_peak = measured_peak(partial(step, plain, model, x))
    assert measured_peak(partial(step, spilled, model, x)) < plain_peak


def test_files_have_no_names_and_backward_frees_them(tmp_path: Path, block: Any) -> None:
    model, _, _ = block
    spilled = compiled(model, Spill(directory=str(tmp_path), least_bytes=2**15))
    loss = spilled(torch.randn(1, 1024, WIDTH)).sum()
    assert (usage().files, usage().file_bytes) == (9, 15 * U)
    assert list(tmp_path.iterdir()) == []
    loss.backward()
    assert usage().files == 0
    model.zero_grad()


def test_steps_may_overlap(block: Any) -> None:
    model, plain, spilled = block
    inputs = [torch.randn(1, tokens, WIDTH) for tokens in (512, 700)]
    losses = [spilled(x).square().sum() for x in inputs]
    parameters = list(model.parameters())
    for x, loss in reversed(list(zip(inputs, losses, strict=True))):
        assert_same_bits(list(torch.autograd.grad(loss, parameters)), step(plain, model, x))


def test_a_graph_dropped_or_failed_frees_its_files(block: Any) -> None:
    _, _, spilled = block
    loss = spilled(torch.randn(1, 512, WIDTH)).sum()
    assert usage().files == 9
    del loss
    assert usage().files == 0
    with pytest.raises(ZeroDivisionError):
        _ = spilled(torch.randn(1, 512, WIDTH)).sum() / (1 // 0)


def test_a_second_backward_is_refused(block: Any) -> None:
    """Refused by torch if the backward owns the saved tensors.

    Otherwise by the handle, whose store is freed.
    """
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
    message = r"fetched by an earlier backward.*run the forward again, or compile without Spill"
    with pytest.raises(RuntimeError, match=message):
        fetch(handle, None, x, x.shape, x.dtype, x.device)


def test_a_full_disk_raises_and_leaves_no_file(block: Any) -> None:
    model, plain, spilled = block
    x = torch.randn(1, 512, WIDTH)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        message = r"131,072 bytes cannot be spilled to .* bytes are free: .*Pass another place"
        with pytest.raises(OSError, match=message):
            spilled(x)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert usage().files == 0
    assert torch.equal(step(plain, model, x)[0], step(spilled, model, x)[0])


@pytest.mark.parametrize(
    ("sent", "returned"),
    [
        pytest.param(signal.SIGINT, (1, 130, -signal.SIGINT), marks=pytest.mark.slow),
        (signal.SIGKILL, (-signal.SIGKILL,)),
    ],
)
def test_an_interrupted_process_leaves_no_file(
    tmp_path: Path, sent: signal.Signals, returned: tuple[int, ...]
) -> None:
    code = f"""
import torch
from passes.rewrites.spill.operators import write, written
x, handles = torch.randn(2**18), []
for i in range(10**6):
    handles.append(written(write(x, {str(tmp_path)!r}), x))
    handles = handles[-50:]
    print(i, flush=True)
"""
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


@pytest.mark.parametrize("make", [Dropping, pytest.param(Rectified, marks=pytest.mark.slow)])
def test_masks_and_views_are_spilled_too(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 256, WIDTH)
    grads: list[list[Tensor]] = []
    for passes in ((), (Spill(least_bytes=2**10),)):
        torch._dynamo.reset()
        torch.manual_seed(1)
        before = usage().written_bytes
        grads.append(step(compiled(model, *passes), model, x))
    assert usage().written_bytes > before
    assert_same_bits(*grads)


FLOATS = (torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn)


def layouts() -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of several dtypes and layouts, with names."""
    base = torch.arange(6 * 10 * 8).reshape(6, 10, 8)
    for dtype in (*FLOATS, torch.bool, torch.int8, torch.complex64):
        yield str(dtype), base.to(dtype)
    yield "transposed", base.transpose(0, 2)
    yield "part", base[:, 2:7, ::2]
    yield "expanded", base[:, :1].expand(6, 5, 8)
    yield "empty", base[:0]
    yield "number", base[0, 0, 0]
    yield "large part", torch.randn(3, 2**19)[:, 1:]


@pytest.mark.parametrize("x", [pytest.param(x, id=name) for name, x in layouts()])
def test_every_layout_is_fetched_as_written(x: Tensor) -> None:
    handle = written(write(x, ""), x)
    assert handle.nbytes == 8
    back = fetch(handle, None, x, x.shape, x.dtype, x.device)
    assert back.is_contiguous()
    assert torch.equal(back.flatten().view(torch.uint8), x.flatten().view(torch.uint8))


def test_writing_does_not_block_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """write returns before its thread has written; written waits for it."""
    go, real = threading.Event(), os.pwrite
    threads: list[str] = []

    def slow(file: int, data: Any, offset: int) -> int:
        threads.append(threading.current_thread().name)
        assert go.wait(10)
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    x = torch.randn(1000)
    handle = write(x, "")
    go.set()
    handle = written(handle, x)
    assert [name.startswith("spill") for name in threads] == [True]
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
def test_small_values_stay_in_memory_and_host_is_for_gpus_only(passes: Spill) -> None:
    model, before = nn.Sequential(nn.Linear(8, 8), nn.GELU()), usage().written_bytes
    step(compiled(model, passes, dynamic=False), model, torch.randn(4, 8))
    assert usage().written_bytes == before


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Spill(to="tape"), "to must be 'disk' or 'host'; got 'tape'"),  # type: ignore[arg-type]
    (
        lambda: Spill(to="host", directory="folder"),
        "directory is for to='disk'; got 'folder' with to='host'",
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
def test_four_layers_retain_less_than_one_and_a_half_activations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(Gelu(128), 128) for _ in range(4)))
    x = torch.randn(1, 8192, 128)

    def retained(*passes: Spill) -> float:
        torch._dynamo.reset()
        function = compiled(model, *passes, dynamic=False)
        step(function, model, x)
        return retained_bytes(lambda: function(x).sum()) / x.nbytes

    assert retained() > 36
    assert retained(Spill()) < 1.5
