"""Rules as text: mutated and hostile texts are parsed or refused, without effects."""

from __future__ import annotations

import contextlib
import copy
import json
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
from compiled_dilated.rules import Skeleton, bind, read_rule
from tests import functions
from tests.functions import Parameters
from tests.support.exported import HEADS, many_tiles

pytestmark = pytest.mark.usefixtures("fresh")


def real_text(
    program: Program | Mask, mod: Any = None, ring: Any = None
) -> tuple[str, tuple[Tensor, ...]]:
    """What an operator is told of a program, and the operands of its call."""
    skeleton = Skeleton(cd.compile(program).program, "auto", ring)
    bound = bind(skeleton.frame, skeleton.literals, skeleton.mask_mods, mod, torch.float64)
    written, operands = bound.rule, bound.operands
    return written, operands


def real_texts() -> list[tuple[str, tuple[Tensor, ...]]]:
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
    "__import__('os').system('ls')", "().__class__.__bases__", "eval('1')", "lambda: 0", "*", "**{}", "aten.add_.Tensor",
    "aten.rand.default", "aten.set_.source_Tensor", "aten._local_scalar_dense.default", "prims.mul.default", "stored(99)",
    "stored(-1)", "traced(", "per_length(", "function(0)", "{\"%dtype\": \"load\"}", "{\"%\": 99}", "{\"%\": -1}", "[" * 2000,
    "(" * 300, "-1", "9" * 30, "1e999", "null", "true", "NaN", "Infinity", "\"", "\\", "'", "\x00", "\n", "é", "\ud800",
)  # fmt: skip
WATCHED = frozenset(
    (
        "os.system",
        "os.exec",
        "os.remove",
        "subprocess.Popen",
        "exec",
        "pickle.find_class",
        "ctypes.dlopen",
        "socket.connect",
    )
)
_watching: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is not None and event in WATCHED:
        _watching.append(event)


sys.addaudithook(_audit)


class Watch:
    """Collects what Python runs: code, processes, files that it removes."""

    def __enter__(self) -> list[str]:
        global _watching
        _watching = []
        return _watching

    def __exit__(self, *_: object) -> None:
        global _watching
        _watching = None


@st.composite
def mutated(draw: st.DrawFn, written: st.SearchStrategy[str]) -> str:
    """A text cut, doubled, and mixed with what is hostile or random."""
    out = draw(written)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(out)))
        stop = draw(st.integers(start, min(len(out), start + 30)))
        put = draw(
            st.one_of(
                st.sampled_from(HOSTILE),
                st.text(max_size=3),
                st.just(out[start:stop] * 2),
                st.just(""),
            )
        )
        out = out[:start] + put + out[stop:]
    return out


def reads_or_refuses(read: Callable[[], Any]) -> None:
    """Nothing else comes of a text: a value, or a ValueError; no code runs."""
    with Watch() as events, contextlib.suppress(ValueError):
        read()
    assert events == []


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(range(len(TEXTS))).flatmap(
        lambda at: st.tuples(st.just(at), mutated(st.just(TEXTS[at][0])))
    )
)
def test_mutated_rules_are_read_or_refused(drawn: tuple[int, str]) -> None:
    at, written = drawn
    operands = TEXTS[at][1]
    reads_or_refuses(lambda: read_rule(written, operands))


PROGRAM_TEXTS = [json.loads(written)[0] for written, _ in TEXTS]


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(mutated(st.sampled_from(PROGRAM_TEXTS)))
def test_mutated_programs_are_read_or_refused(written: str) -> None:
    reads_or_refuses(lambda: text.read(written, TEXTS[1][1]))
    reads_or_refuses(lambda: text.read_program(written))


GRAPH_TEXTS = [graph for written, _ in TEXTS if (graph := json.loads(written)[3]) is not None]


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(mutated(st.sampled_from(GRAPH_TEXTS)))
def test_mutated_graphs_are_read_or_refused(written: str) -> None:
    reads_or_refuses(lambda: Graph(written).check())


@st.composite
def json_mutants(draw: st.DrawFn) -> str:
    """A graph of the right form with some of its leaves replaced."""
    graph = json.loads(draw(st.sampled_from(GRAPH_TEXTS)))
    put = st.sampled_from(
        [-1, 0, 1, 99, 1.5, None, True, "", "aten.add_.Tensor", "aten.rand.default", "aten.sum.default", "x.y.z", "a.b", [], {},
         {"%": 99}, {"%": -1}, {"%": 1.5}, {"%": "0"}, {"%dtype": "load"}, {"%format": "x"}, {"%": None}, [[]], 2**70]
    )  # fmt: skip
    for _ in range(draw(st.integers(1, 3))):
        node: Any = graph
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = draw(st.sampled_from(keys))
            inner = node[key]
            if not isinstance(inner, list | dict) or not inner or draw(st.integers(0, 4)) == 0:
                node[key] = copy.deepcopy(draw(put))
                break
            node = inner
        if not isinstance(graph, list) or not graph:
            break
    return json.dumps(graph)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(json_mutants())
def test_graphs_of_other_leaves_are_read_or_refused(written: str) -> None:
    reads_or_refuses(lambda: Graph(written).check())


NO_RULES = {
    "an object": "{}",
    "an empty list": "[]",
    "null": "null",
    "a number": "9" * 5000,
    "five numbers": "[1,2,3,4,5]",
    "slots that are no list": '["Program((Branch(causal()),))", "auto", null, null, null]',
    "a bare mask": '["causal()", "auto", null, null, []]',
    "half a ring": '["Program((Branch(causal()),))", "auto", [2], null, []]',
    "a ring of -2": '["Program((Branch(causal()),))", "auto", [-2, "auto", null], null, []]',
    "an empty graph": '["Program((Branch(traced(\\"[[],0,[],0]\\", (), \\"x\\")),))", "auto", null, null, []]',
    "a builder that is none": '["per_length(\\"eval\\", (1,), ())", "auto", null, null, []]',
    "three numbers as a builder": '["per_length(1, 2, 3)", "auto", null, null, []]',
    "parentheses": '["' + "(" * 150 + '", "auto", null, null, []]',
    "tildes": '["' + "~" * 5000 + 'causal()", "auto", null, null, []]',
}
NO_RULES_YET = {
    "deep lists": "[" * 100_000,
    "tiles of operand 7": '["Program((Branch(tiles_of(4, 4, stored(7))),))", "auto", null, null, []]',
    "lengths of operand 0": '["Program((Branch(documents(lengths=stored(0))),))", "auto", null, null, []]',
    "odd slots": '["Program((Branch(causal()),))", "auto", null, null, [5, "x", null]]',
}


@pytest.mark.parametrize("name", [*NO_RULES, *(name for name in NO_RULES_YET)])
def test_texts_that_are_no_rules_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_rule((NO_RULES | NO_RULES_YET)[name], ())
