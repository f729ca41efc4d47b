"""Bad input to passes: one error that names the argument.

It is raised before work starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import passes
from passes import Chunk, LinearCrossEntropy, Remat, Reorder, Spill, StreamQKV, arena, arguments
from passes.analysis import costs, footprint, liveness, peak
from passes.analysis.liveness import Lifetimes
from passes.arena import Buffer, Executor, Placement
from passes.planning import budgets
from passes.rewrites.stream_qkv import attention
from tests.graphs import Gelu

mm = torch.ops.aten.mm.default
X = torch.empty(4, 64)
HUGE = 10**400
REFUSED = "example_inputs must be inputs that the model can compute with"


@cache
def graph() -> GraphModule:
    return make_fx(lambda x: x.sin().cos(), tracing_mode="fake")(torch.ones(4, 8))


def lifetimes() -> Lifetimes:
    return liveness.lifetimes(graph())


def estimate(inputs: Any, model: Any = None, **options: Any) -> Any:
    model = Gelu() if model is None else model
    return passes.estimate(model, inputs, **({"train": False, "passes": [()]} | options))


def compiled(**options: Any) -> Any:
    return passes.compile(options.pop("model", Gelu()), **({"passes": []} | options))


def validate(*offsets: Any, **fields: Any) -> None:
    """Validate a placement of one buffer of two bytes."""
    placement = Placement(offsets, **({"height": 2, "lower_bound": 2} | fields))
    arena.validate([Buffer(0, 1, 2)], placement)


# Each act with the beginning of its message, which names the argument.
TYPES: list[tuple[Callable[[], Any], str]] = [
    (lambda: compiled(model="model"),
     "model must be a torch.nn.Module or a function; got str 'model'. Make or load"),
    (lambda: compiled(model=Gelu),
     "model must be a torch.nn.Module or a function; got the class Gelu"),
    (lambda: compiled(dynamic="yes"), "dynamic must be True, False or None; got str 'yes'"),
    (lambda: compiled(fullgraph=1), "fullgraph must be True or False; got int 1"),
    (lambda: compiled(passes=Chunk()),
     "passes must be a tuple or a list of passes; got Chunk(rows=None"),
    (lambda: compiled(passes="Chunk"),
     "passes must be a tuple or a list of passes; got 'Chunk'. For one, write [...] around it"),
    (lambda: compiled(extra=Chunk()), "extra must be a tuple or a list of passes; got Chunk("),
    (lambda: compiled(memory_budget=True),
     "memory_budget must be an int of bytes or a string as '6GiB'; got bool True"),
    (lambda: compiled(memory_budget=math.inf),
     "memory_budget must be an int of bytes or a string as '6GiB'; got float inf"),
    (lambda: compiled(memory_budget=math.nan),
     "memory_budget must be an int of bytes or a string as '6GiB'; got float nan"),
    (lambda: estimate(X, model="model"),
     "model must be a torch.nn.Module or a function; got str 'model'"),
    (lambda: estimate(X),
     "example_inputs must be a tuple or a list of inputs of the model; got a tensor of shape (4,"),
    (lambda: estimate(None),
     "example_inputs must be a tuple or a list of inputs of the model; got None"),
    (lambda: estimate({"x": X}),
     "example_inputs must be a tuple or a list of inputs of the model; got {'x': tensor("),
    (lambda: estimate([X.to_sparse()]),
     "example_inputs[0] must be a dense tensor; got one of layout torch.sparse_coo"),
    (lambda: estimate([torch.nested.nested_tensor([X])]),
     "example_inputs[0] must be a dense tensor; got a nested one"),
    (lambda: estimate([X], train="no"), "train must be True or False; got str 'no'"),
    (lambda: estimate([X], dynamic="no"), "dynamic must be True, False or None; got str 'no'"),
    (lambda: estimate([X], passes=[Chunk()]),
     "passes[0] must be a tuple or a list of passes; got Chunk("),
    (lambda: estimate([X], passes=Chunk()),
     "passes must be a tuple or a list of candidates, each a tuple or a list of passes"),
    (lambda: passes.pipeline("1GiB", [Chunk()]),
     "passes[0] must be a tuple or a list of passes; got Chunk("),
    (lambda: passes.pipeline("1GiB", machine=3), "machine must be a Machine; got int 3"),
    (lambda: passes.inductor_configs(Chunk()),
     "passes must be a tuple or a list of passes; got Chunk("),
    (lambda: passes.inductor_configs([3]),
     "passes[0] must be a pass, with stage (a passes.Stage), keeps_bits"),
    (lambda: passes.inductor_configs([], on_run=3), "on_run must be a function; got int 3"),
    (lambda: Chunk(rows="3"), "rows must be a whole number; got str '3'"),
    (lambda: Chunk(rows=2.5), "rows must be a whole number; got float 2.5"),
    (lambda: Chunk(rows=True), "rows must be a whole number; got bool True"),
    (lambda: StreamQKV(chunk_bytes=math.nan), "chunk_bytes must be a whole number; got float nan"),
    (lambda: LinearCrossEntropy(own="no"), "own must be True, False or None; got str 'no'"),
    (lambda: Reorder(width="64"), "width must be a whole number; got str '64'"),
    (lambda: Spill(least_bytes=True), "least_bytes must be a whole number; got bool True"),
    (lambda: Spill(directory=Path("folder")),
     "directory must be a str, which the graph can contain; got PosixPath"),
    (lambda: Spill(directory=0), "directory must be a str, which the graph can contain; got 0"),
    (lambda: liveness.lifetimes(graph(), sizes=4),
     "sizes must be a mapping of symbols' names to ints"),
    (lambda: liveness.lifetimes(graph(), sizes={"s7": 1.5}),
     "sizes['s7'] must be a whole number; got float 1.5"),
    (lambda: liveness.lifetimes(graph(), donated="x_1"),
     "donated must be a list or a set of nodes' names; got 'x_1'. For one"),
    (lambda: footprint.of_graph(graph().graph), "module must be a GraphModule; got Graph"),
    (lambda: footprint.of_graph(graph(), donated="x_1"),
     "donated must be a list or a set of nodes' names; got 'x_1'"),
    (lambda: footprint.of_graph(graph(), sizes=3),
     "sizes must be a mapping of symbols' names to ints"),
    (lambda: footprint.of_step(graph(), None), "backward must be a GraphModule; got NoneType None"),
    (lambda: footprint.workspace(mm, 3), "bytes_of must be a function; got int 3"),
    (lambda: costs.register(mm, 3), "work must be a function; got int 3"),
    (lambda: costs.of_graph("graph"), "graph must be a Graph; got str 'graph'"),
    (lambda: peak.find(graph()), "lifetimes must be a Lifetimes; got"),
    (lambda: peak.timeline("steps"), "lifetimes must be a Lifetimes; got str 'steps'"),
    (lambda: peak.timeline(lifetimes(), rows="3"), "rows must be a whole number; got str '3'"),
    (lambda: peak.timeline(lifetimes(), width=2.5), "width must be a whole number; got float 2.5"),
    (lambda: peak.draw(lifetimes(), 3), "path must be a path; got int 3"),
    (lambda: arena.solve(None), "buffers must be a tuple or a list of arena.Buffer; got None"),
    (lambda: arena.solve(Buffer(0, 1, 2)),
     "buffers must be a tuple or a list of arena.Buffer; got Buffer(lower=0"),
    (lambda: arena.solve(Buffer(0, 1, 2) for _ in range(2)),
     "buffers must be a tuple or a list of arena.Buffer; got <generator"),
    (lambda: arena.validate(None, Placement((), 0, 0)),
     "buffers must be a tuple or a list of arena.Buffer; got None"),
    (lambda: arena.validate([3], Placement((0,), 2, 2)), "buffers[0] must be a Buffer; got int 3"),
    (lambda: arena.validate([Buffer(0, 1, 2)], (0,)),
     "placement must be a Placement; got tuple (0,)"),
    (lambda: validate("a"), "placement.offsets[0] must be a whole number; got str 'a'"),
    (lambda: validate(True), "placement.offsets[0] must be a whole number; got bool True"),
    (lambda: validate(0, height=math.nan), "placement.height must be a whole number; got float"),
    (lambda: Executor(graph(), X),
     "example_inputs must be a tuple or a list of inputs of the model; got a tensor"),
    (lambda: Executor(graph(), ["a"]), "input x_1 must be a tensor; got str 'a'"),
    (lambda: attention(mm, read=3, reach=print, part=print), "read must be a function; got int 3"),
]  # fmt: skip
VALUES: list[tuple[Callable[[], Any], str]] = [
    (lambda: compiled(memory_budget="9" * 400 + "B"),
     "memory_budget must be less than 8,388,608 TiB; got '999"),
    (lambda: compiled(memory_budget="9" * 5000 + "B"),
     "memory_budget must be less than 8,388,608 TiB; got '999"),
    (lambda: compiled(memory_budget=HUGE),
     "memory_budget must be less than 8,388,608 TiB; got an int of 1329 bits"),
    (lambda: compiled(memory_budget=10**5000),
     "memory_budget must be less than 8,388,608 TiB; got an int of 16610 bits"),
    (lambda: compiled(memory_budget=-HUGE),
     "memory_budget must be at least 1 byte; got an int of 1329 bits"),
    (lambda: compiled(memory_budget="inf GiB"), "memory_budget must be a number and one of B, KiB"),
    (lambda: compiled(memory_budget="\u0663GiB"),
     "memory_budget must be a number and one of B, KiB"),
    (lambda: estimate([]),
     "example_inputs must be what the model takes, (x: 'Tensor') -> 'Tensor'; got 0 inputs: "),
    (lambda: estimate([X, X]),
     "example_inputs must be what the model takes, (x: 'Tensor') -> 'Tensor'; got 2 inputs: "),
    (lambda: estimate([X[:, 1:]]),
     f"{REFUSED}; got a tensor of shape (4, 63): a and b must have same reduction dim"),
    (lambda: estimate(["a"]), f"{REFUSED}; got 'a': linear(): argument 'input'"),
    (lambda: estimate([X], passes=[]), "passes must have at least one candidate; got none"),
    (lambda: Chunk(rows=HUGE), "rows must be at most 2**63 - 1; got an int of 1329 bits"),
    (lambda: Reorder(width=0), "width must be at least 1; got 0"),
    (lambda: Spill(least_bytes=HUGE), "least_bytes must be at most 2**63 - 1; got an int"),
    (lambda: liveness.lifetimes(graph(), sizes={"s7": -4}),
     "sizes['s7'] must be at least 0; got -4"),
    (lambda: liveness.lifetimes(graph(), sizes={"s7": 4}),
     "sizes must name symbols of the graph; got 's7'. It has none"),
    (lambda: costs.Machine(flops=0), "flops must be a finite number, above 0; got 0"),
    (lambda: costs.Machine(memory_bytes="fast"),
     "memory_bytes must be a finite number, above 0; got 'fast'"),
    (lambda: peak.timeline(Lifetimes((), (), ())), "lifetimes must have at least one step"),
    (lambda: peak.draw(lifetimes(), "memory.doc"), "path must end in one of "),
    (lambda: peak.draw(lifetimes(), "nowhere/memory.png"),
     "path must be in an existing directory; got 'nowhere/"),
    (lambda: arena.solve([], seconds=HUGE),
     "seconds must be a finite number, at least 0; got an int of 1329 bits"),
    (lambda: arena.solve([], seconds=True),
     "seconds must be a finite number, at least 0; got True"),
    (lambda: arena.solve([], capacity=10**5000),
     "capacity must be at most 2**63 - 1; got an int of 16610 bits"),
    (lambda: validate(0, alignment=0), "placement.alignment must be at least 1; got 0"),
    (lambda: Executor(graph(), [X], seconds="3"),
     "seconds must be a finite number, at least 0; got '3'"),
    (lambda: attention(read=print, reach=print, part=print),
     "targets must be what graphs call, at least one; got none"),
]  # fmt: skip


CASES = [
    *((act, TypeError, message) for act, message in TYPES),
    *((act, ValueError, message) for act, message in VALUES),
]


def error_of(act: Callable[[], Any]) -> Exception | None:
    try:
        act()
    except (TypeError, ValueError) as error:
        return error
    return None


@pytest.mark.parametrize(
    ("act", "error", "message"), CASES, ids=[message for _, _, message in CASES]
)
def test_bad_input_is_named(act: Callable[[], Any], error: type[Exception], message: str) -> None:
    raised = error_of(act)
    assert type(raised) is error
    assert str(raised).startswith(message)
    assert len(str(raised)) < 600


class Counted(nn.Module):
    """Counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x.sin()


@pytest.mark.parametrize("inputs", [X, [X, X], []], ids=["a bare tensor", "too many", "too few"])
def test_a_report_checks_inputs_before_it_runs_the_step(inputs: Any) -> None:
    model = Counted()
    step = passes.compile(model, passes=[])
    step(X)
    runs = model.runs
    assert str(error_of(lambda: passes.report(step, inputs))).startswith("inputs must be ")
    assert model.runs == runs


ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.lists(st.integers())
)


@given(ANYTHING | st.from_regex(r"\s*\d{1,30}(\.\d{1,30})?\s*[KMGT]?i?B\s*", fullmatch=True))
@example("1" + "0" * 4400 + ".5 TiB")
@example("0." + "0" * 4400 + "1TB")
@example("\u0661\u0662GiB")
@example(-(10**5000))
def test_a_budget_is_bytes_or_one_error(budget: Any) -> None:
    error = error_of(lambda: budgets.parse("limit", budget))
    if error is None:
        assert 1 <= budgets.parse("limit", budget) <= arguments.MOST
    else:
        assert str(error).startswith("limit must be ")
        assert len(str(error)) < 400


OPTIONS: dict[str, Callable[[Any], Any]] = {
    "rows": lambda value: Chunk(rows=value),
    "width": lambda value: Reorder(width=value),
    "least_bytes": lambda value: Spill(least_bytes=value),
    "to": lambda value: Spill(to=value),
    "directory": lambda value: Spill(directory=value),
    "own": lambda value: LinearCrossEntropy(own=value),
    "budget_bytes": lambda value: Remat(budget_bytes=value),
    "flops": lambda value: costs.Machine(flops=value),
    "dynamic": lambda value: compiled(dynamic=value),
    "model": lambda value: compiled(model=value),
    "passes": lambda value: passes.inductor_configs(value),
    "seconds": lambda value: arena.solve([], seconds=value),
    "alignment": lambda value: arena.solve([], alignment=value),
    "sizes": lambda value: liveness.lifetimes(graph(), sizes=value),
    "donated": lambda value: liveness.lifetimes(graph(), donated=value),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_taken_or_one_error_names_it(name: str) -> None:
    @given(ANYTHING)
    @example(10**5000)
    @example([10**5000])
    def check(value: Any) -> None:
        error = error_of(lambda: OPTIONS[name](value))
        if error is not None:
            assert str(error).startswith((f"{name} must ", f"{name}["))
            assert len(str(error)) < 400

    check()


def test_budgets_are_exact() -> None:
    """A float has sixteen digits."""
    assert budgets.parse("limit", "9007199254740993 B") == 9007199254740993
    assert budgets.parse("limit", f"{2**63 - 1} B") == 2**63 - 1
