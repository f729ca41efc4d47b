"""Rules as text.

Mutated and hostile texts are parsed or refused, without effects.
"""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import Program, masks, text
from compiled_dilated.masks import Mask
from compiled_dilated.mods import Graph
from compiled_dilated.parsing import ExpressionError
from compiled_dilated.rules import Skeleton, bind, read_rule
from tests import functions
from tests.functions import Parameters
from tests.support.exported import HEADS, many_tiles

pytestmark = pytest.mark.usefixtures("fresh")


def real_text(
    program: Program | Mask, mod: Any = None, ring: Any = None
) -> tuple[str, tuple[Tensor, ...]]:
    """The rule of a program as text, and its operands."""
    skeleton = Skeleton(cd.compile(program).program, "auto", ring)
    bound = bind(skeleton.frame, skeleton.literals, skeleton.mask_mods, mod, torch.float64)
    return bound.rule, bound.operands


def real_texts() -> list[tuple[str, tuple[Tensor, ...]]]:
    """Rules of every kind of literal, function and ring."""
    parameters = Parameters.of(HEADS, 8)
    mod = functions.score_mod(("T5 buckets", "products of rows", "-inf"), parameters)
    mask = masks.from_mod(
        functions.mask_mod(("allowed[i, j]", "torch.stack and any"), parameters),
        within=masks.window(5),
    )
    ring = cd.compile(masks.causal(), ranks=2).ring
    return [
        real_text(cd.longnet((8, 24), (1, 3), causal=True)),
        real_text((mask | masks.sinks(2)) & ~masks.documents(lengths=tuple(range(50)))),
        real_text(many_tiles(), mod),
        real_text(cd.hilbert_window((6, 8), 2), mod, ring),
        real_text(masks.padding() & masks.documents(ids="ids") & masks.neighborhood((4, 12), 2)),
    ]


TEXTS = real_texts()
HOSTILE = (
    *("__import__('os').system('ls')", "().__class__.__bases__", "eval('1')", "lambda: 0"),
    *("aten.add_.Tensor", "aten.rand.default", "aten.set_.source_Tensor", "prims.mul.default"),
    *("aten._local_scalar_dense.default", "stored(99)", "stored(-1)", "traced(", "per_length("),
    *("function(0)", '{"%dtype": "load"}', '{"%": 99}', '{"%": -1}', "[" * 2000, "(" * 300),
    *("*", "**{}", "-1", "9" * 30, "1e999", "null", "true", "NaN", "Infinity"),
    *('"', "\\", "'", "\x00", "\n", "é", "\ud800"),
)
WATCHED = {"os.system", "os.exec", "os.remove", "subprocess.Popen", "exec", "pickle.find_class"}
WATCHED |= {"ctypes.dlopen", "socket.connect"}
_watching: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is not None and event in WATCHED:
        _watching.append(event)


sys.addaudithook(_audit)


class Watch:
    """Collects Python's audit events of code, processes and removed files."""

    def __enter__(self) -> list[str]:
        global _watching
        _watching = []
        return _watching

    def __exit__(self, *_: object) -> None:
        global _watching
        _watching = None


@st.composite
def mutated(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> str:
    """A text with parts removed, doubled or replaced.

    Replacements are hostile or random.
    """
    out = draw(texts)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(out)))
        stop = draw(st.integers(start, min(len(out), start + 30)))
        doubled_or_removed = st.sampled_from((out[start:stop] * 2, ""))
        part = draw(st.sampled_from(HOSTILE) | st.text(max_size=3) | doubled_or_removed)
        out = out[:start] + part + out[stop:]
    return out


def reads_or_refuses(read: Callable[[], Any]) -> None:
    """A text gives a value or a ValueError, and runs no code."""
    with Watch() as events, contextlib.suppress(ValueError):
        read()
    assert events == []


@pytest.mark.parametrize(
    ("act", "event"),
    [
        (lambda: exec("1"), "exec"),
        (lambda: eval("1"), "exec"),
        (lambda: pickle.loads(pickle.dumps(masks.causal())), "pickle.find_class"),
        (lambda: subprocess.run(["true"], check=True), "subprocess.Popen"),
    ],
    ids=["exec", "eval", "pickle", "process"],
)
def test_code_that_runs_is_seen(act: Callable[[], Any], event: str) -> None:
    """The control of the tests below."""
    with Watch() as events:
        act()
    assert event in events
    with pytest.raises(AssertionError):
        reads_or_refuses(act)


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(range(len(TEXTS))))
def test_mutated_rules_are_read_or_refused(data: st.DataObject, number: int) -> None:
    rule, operands = TEXTS[number]
    mutant = data.draw(mutated(st.just(rule)))
    reads_or_refuses(lambda: read_rule(mutant, operands))


PROGRAM_TEXTS = [json.loads(rule)[0] for rule, _ in TEXTS]


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(mutated(st.sampled_from(PROGRAM_TEXTS)))
def test_mutated_programs_are_read_or_refused(mutant: str) -> None:
    reads_or_refuses(lambda: text.read(mutant, TEXTS[1][1]))
    reads_or_refuses(lambda: text.read_program(mutant))


GRAPH_TEXTS = [graph for rule, _ in TEXTS if (graph := json.loads(rule)[3]) is not None]


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(mutated(st.sampled_from(GRAPH_TEXTS)))
def test_mutated_graphs_are_read_or_refused(mutant: str) -> None:
    reads_or_refuses(lambda: Graph(mutant).check())


# Leaves of a graph's JSON that are out of range, of another type, or forbidden.
WRONG_LEAVES: list[Any] = [-1, 0, 1, 99, 1.5, 2**70, None, True, "", "x.y.z", "a.b", [], {}, [[]]]
WRONG_LEAVES += ["aten.add_.Tensor", "aten.rand.default", "aten.sum.default"]
WRONG_LEAVES += [{"%": 99}, {"%": -1}, {"%": 1.5}, {"%": "0"}, {"%": None}]
WRONG_LEAVES += [{"%dtype": "load"}, {"%format": "x"}]


@st.composite
def json_mutants(draw: st.DrawFn) -> str:
    """A graph with some of its leaves replaced."""
    graph = json.loads(draw(st.sampled_from(GRAPH_TEXTS)))
    for _ in range(draw(st.integers(1, 3))):
        node: Any = graph
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = draw(st.sampled_from(keys))
            inner = node[key]
            if not isinstance(inner, list | dict) or not inner or draw(st.integers(0, 4)) == 0:
                node[key] = copy.deepcopy(draw(st.sampled_from(WRONG_LEAVES)))
                break
            node = inner
        if not isinstance(graph, list) or not graph:
            break
    return json.dumps(graph)


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(json_mutants())
def test_graphs_with_wrong_leaves_are_read_or_refused(mutant: str) -> None:
    reads_or_refuses(lambda: Graph(mutant).check())


def rule_of(program: str, *fields: str) -> str:
    """The text of a rule.

    Its fields are lowering, ring, score_mod and slots, as JSON.
    """
    return f"[{', '.join((json.dumps(program), *fields))}]"


CAUSAL = "Program((Branch(causal()),))"
FIELDS = ('"auto"', "null", "null", "[]")
NO_RULES = {
    "an object": "{}",
    "an empty list": "[]",
    "null": "null",
    "a number": "9" * 5000,
    "five numbers": "[1,2,3,4,5]",
    "deep lists": "[" * 100_000,
    "slots that are no list": rule_of(CAUSAL, '"auto"', "null", "null", "null"),
    "odd slots": rule_of(CAUSAL, '"auto"', "null", "null", '[5, "x", null]'),
    "a bare mask": rule_of("causal()", *FIELDS),
    "half a ring": rule_of(CAUSAL, '"auto"', "[2]", "null", "[]"),
    "a ring of -2": rule_of(CAUSAL, '"auto"', '[-2, "auto", null]', "null", "[]"),
    "an empty graph": rule_of('Program((Branch(traced("[[],0,[],0]", (), "x")),))', *FIELDS),
    "a builder that is none": rule_of('per_length("eval", (1,), ())', *FIELDS),
    "three numbers as a builder": rule_of("per_length(1, 2, 3)", *FIELDS),
    "parentheses": rule_of("(" * 150, *FIELDS),
    "tildes": rule_of("~" * 5000 + "causal()", *FIELDS),
    "tiles of operand 7": rule_of("Program((Branch(tiles_of(4, 4, stored(7))),))", *FIELDS),
    "lengths of operand 0": rule_of("Program((Branch(documents(lengths=stored(0))),))", *FIELDS),
}


@pytest.mark.parametrize("name", NO_RULES)
def test_texts_that_are_no_rules_are_refused(name: str) -> None:
    with pytest.raises(ExpressionError, match=r"."):
        read_rule(NO_RULES[name], ())
