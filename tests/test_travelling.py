"""Programs that leave their process or outlive its tables: export, AOTInductor, texts, and caches emptied at any moment."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

import compiled_dilated as cd
from compiled_dilated import Program, masks, text
from compiled_dilated.masks import Mask
from compiled_dilated.mods import Graph
from compiled_dilated.rules import Skeleton, bind, read_rule
from tests import functions
from tests.caches import forget
from tests.functions import Parameters

HEADS, N = 4, 48


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Dynamo without what earlier tests compiled; reaching its limit of graphs is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def same(got: Any, want: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def tensors(n: int = N, kv_heads: int = HEADS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q (2, HEADS, n, 8), k and v (2, kv_heads, n, 8)."""
    generator = torch.Generator().manual_seed(n)
    return tuple(torch.randn(2, h, n, 8, generator=generator, dtype=torch.float64).to(dtype) for h in (HEADS, kv_heads, kv_heads))


# Models that are exported ---------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A program, as it is."""

    def __init__(self, program: Program | Mask, **options: Any) -> None:
        super().__init__()
        self.attend = cd.compile(program, **options)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.attend(q, k, v, return_lse=True)


class WithData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = cd.compile(masks.causal() & masks.documents(ids="ids") & masks.padding())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, padding: Tensor) -> Any:
        return self.attend(q, k, v, data={"ids": ids, "padding": padding})


class Learned(nn.Module):
    """A score_mod and a mask_mod as bound methods of a module with parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.slopes = nn.Parameter(torch.rand(HEADS, generator=generator, dtype=torch.float64))
        self.rows = nn.Parameter(torch.randn(64, 3, generator=generator, dtype=torch.float64))
        self.register_buffer("kind", torch.randint(0, 3, (64,), generator=generator))
        self.attend = cd.compile(masks.from_mod(self.mask_mod, within=masks.causal()))

    def mask_mod(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (self.kind[i] == self.kind[j]) | (i - j < 3)

    def score_mod(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - self.slopes[h] * (i - j) + (self.rows[i] * self.rows[j]).sum()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.attend(q, k, v, score_mod=self.score_mod)


class Closures(nn.Module):
    """Functions that capture a number and a tensor which is no part of the model."""

    def __init__(self) -> None:
        super().__init__()
        parameters = Parameters.of(HEADS, 64)
        table, reach = parameters.table.detach(), 5
        self.mod = lambda score, b, h, i, j: 9 * torch.tanh(score / 9) + table[i, j]
        self.attend = cd.compile(masks.from_mod(lambda b, h, i, j: (i - j).abs() <= reach + h))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.attend(q, k, v, score_mod=self.mod)


def many_tiles() -> Mask:
    """3,600 tiles of one token."""
    return masks.tiles([(i, j) for i in range(120) for j in range(120) if (i * 7 + j) % 4 == 0 or i == j], block=1)


def many_documents() -> Mask:
    """Hundreds of documents, some of them empty."""
    return masks.documents(lengths=tuple(number % 4 for number in range(400))) & masks.causal()


@dataclass(frozen=True)
class Model:
    """What is exported, and its inputs at a length."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]] = tensors


def with_data(n: int) -> tuple[Tensor, ...]:
    at = torch.arange(n)
    return (*tensors(n), torch.stack([at // 7, at // 11]), torch.stack([at > n - 4, at % 5 == 1]))


def tokens_first(n: int) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).float().contiguous() for x in tensors(n))


MODELS: dict[str, Model] = {
    "longnet": Model(lambda: Plain(cd.longnet((8, 24), (1, 3), causal=True))),
    "hilbert": Model(lambda: Plain(cd.hilbert_window((6, 8), 2))),
    "ring": Model(lambda: Plain(masks.causal() | masks.sinks(2), ranks=2)),
    "tiled": Model(lambda: Plain(masks.window(5) | masks.sinks(2), lowering="tiled")),
    "data": Model(WithData, with_data),
    "many tiles": Model(lambda: Plain(many_tiles())),
    "many documents": Model(lambda: Plain(many_documents())),
    "grouped heads": Model(lambda: Plain(cd.longnet((8, 24), (2, 4))), lambda n: tensors(n, kv_heads=2)),
    "parameters": Model(Learned),
    "closures": Model(Closures),
    "variant": Model(lambda: cd.variant("BlockSparse_LocalWindow_0.95"), tokens_first),
}


def exported(name: str, strict: bool = False) -> torch.export.ExportedProgram:
    model = MODELS[name]
    return torch.export.export(model.make(), model.inputs(N), strict=strict)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
@pytest.mark.parametrize("name", MODELS)
def test_exported_models_compute_the_same(name: str, strict: bool) -> None:
    """After what they were made from is gone from every table."""
    model = MODELS[name]
    want = model.make()(*model.inputs(N))
    program = exported(name, strict)
    forget()
    same(program.module()(*model.inputs(N)), want)
    targets = [str(node.target) for node in program.graph.nodes if "compiled_dilated" in str(node.target)]
    assert targets == ["compiled_dilated.attend.default"]


LOADS = """
import sys, pathlib, torch
import compiled_dilated
{before}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pt2")):
    inputs, want = torch.load(path.with_suffix(".pt"))
    got = torch.export.load(path).module()(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda message: path.stem + message)
    print(path.stem)
"""

# Another mask_mod and another score_mod of the names that the exported ones have, compiled and exported first.
OTHERS = """
def rule(b, h, i, j): return j >= i
def mod(score, b, h, i, j): return score * 0
q = torch.randn(2, 4, 48, 8, dtype=torch.float64)
attend = compiled_dilated.compile(compiled_dilated.masks.from_mod(rule))
attend(q, q, q, score_mod=mod)
torch.compile(lambda q: attend(q, q, q, score_mod=mod), backend="aot_eager")(q)
"""

Python = Callable[..., CompletedProcess[str]]


def save(folder: Path, name: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    torch.export.save(torch.export.export(model, inputs), folder / f"{name}.pt2")
    with torch.no_grad():
        torch.save((inputs, model(*inputs)), folder / f"{name}.pt")


KINDS = {"long lists": ("many documents", "many tiles"), "functions": ("closures", "parameters")}
KINDS["programs"] = tuple(sorted(name for name in MODELS if not any(name in names for names in KINDS.values())))


@pytest.mark.parametrize("kind", ["programs", "functions", "long lists"])
def test_exported_models_run_in_a_fresh_process(kind: str, tmp_path: Path, fresh_python: Python) -> None:
    """Which imports the package and nothing else."""
    for name in KINDS[kind]:
        save(tmp_path, name, MODELS[name].make(), MODELS[name].inputs(N))
    ran = fresh_python("-c", LOADS.format(before=""), str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[:-1] == list(KINDS[kind])


def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score + (i - j) / 8


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = cd.compile(masks.from_mod(rule))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.attend(q, k, v, score_mod=mod)


def test_exported_models_run_beside_functions_of_the_same_names(tmp_path: Path, fresh_python: Python) -> None:
    save(tmp_path, "named", Named(), tensors())
    ran = fresh_python("-c", LOADS.format(before=OTHERS), str(tmp_path))
    assert ran.returncode == 0, ran.stderr


def test_exported_text_needs_no_process() -> None:
    """What two exports of equal models say is equal."""
    texts = []
    for _ in range(2):
        forget()
        nodes = [node for node in exported("parameters").graph.nodes if "compiled_dilated" in str(node.target)]
        texts.append([x for x in (*nodes[0].args, *nodes[0].kwargs.values()) if isinstance(x, str)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
@pytest.mark.parametrize("saved", [False, True])
def test_exported_models_train(saved: bool, strict: bool, tmp_path: Path) -> None:
    """Gradients of the parameters that a score_mod reads, and of q, k and v; of the saved and loaded model too."""
    model, inputs = Learned(), tuple(x.requires_grad_() for x in tensors())
    leaves = (*inputs, model.slopes, model.rows)
    want = torch.autograd.grad(model(*inputs).sin().sum(), leaves)
    program = torch.export.export(model, inputs, strict=strict)
    if saved:
        torch.export.save(program, tmp_path / "model.pt2")
        program = torch.export.load(tmp_path / "model.pt2")
    loaded = program.module()
    forget()
    out = loaded(*inputs)
    forget()
    names = dict(loaded.named_parameters())
    same(torch.autograd.grad(out.sin().sum(), (*inputs, names["slopes"], names["rows"])), want)


@pytest.mark.parametrize(
    "name",
    ["longnet", "tiled", "data", "grouped heads", "parameters", "closures", "variant", "many documents"],
)
def test_exported_models_take_any_length(name: str) -> None:
    model = MODELS[name]
    built, inputs = model.make(), model.inputs(N)
    tokens = Dim("tokens", min=2, max=64)
    axis = 1 if name == "variant" else 2
    shapes = tuple({1: tokens} if x.dim() == 2 else {axis: tokens} for x in inputs)
    program = torch.export.export(built, inputs, dynamic_shapes=shapes).module()
    for n in (N, 7, 64):
        same(program(*model.inputs(n)), built(*model.inputs(n)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["longnet", "data", "parameters", "closures", "many documents", "grouped heads"])
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    with torch.no_grad():
        built, inputs = model.make(), model.inputs(N)
        want = built(*inputs)
        program = torch.export.export(built, inputs)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        forget()
        same(torch._inductor.aoti_load_package(package)(*inputs), want, 1e-6)


# Tables are caches ----------------------------------------------------------------------------------------------------------


CACHED = ("longnet", "ring", "tiled", "data", "parameters", "closures")


@pytest.mark.parametrize("name", [*CACHED, "many documents"])
def test_tables_may_be_emptied_at_any_moment(name: str) -> None:
    """Between forward and backward, between any two calls."""
    check_without_tables(name, "eager")


@pytest.mark.parametrize("name", [*CACHED, "many documents"])
def test_tables_may_be_emptied_at_any_moment_of_compiled_models(name: str) -> None:
    """Between compiling and running too."""
    check_without_tables(name, "aot_eager")


def check_without_tables(name: str, how: str) -> None:
    model = MODELS[name]
    built = model.make()
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in model.inputs(N)]
    leaves = [x for x in (*inputs, *built.parameters()) if x.requires_grad]

    def results(run: Any, empty: bool) -> list[Tensor]:
        out = run(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        if empty:
            forget()
        grads = torch.autograd.grad(sum(x.masked_fill(x.isinf(), 0).sin().sum() for x in out), leaves)
        if empty:
            forget()
        return [*out, *grads]

    want = results(built, empty=False)

    def emptying(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        forget()
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        forget()
        return compiled

    run = built if how == "eager" else torch.compile(built, backend=emptying, fullgraph=True)
    forget()
    for _ in range(3):
        same(results(run, empty=True), want)


# Texts ----------------------------------------------------------------------------------------------------------------------


def real_text(program: Program | Mask, mod: Any = None, ring: Any = None) -> tuple[str, tuple[Tensor, ...]]:
    """What an operator is told of a program, and the operands of its call."""
    skeleton = Skeleton(cd.compile(program).program, "auto", ring)
    bound = bind(skeleton.frame, skeleton.literals, skeleton.mask_mods, mod, torch.float64)
    written, operands = bound.rule, bound.operands
    return written, operands


def real_texts() -> list[tuple[str, tuple[Tensor, ...]]]:
    parameters = Parameters.of(HEADS, 8)
    mod = functions.score_mod(("T5 buckets", "products of rows", "-inf"), parameters)
    mask = masks.from_mod(functions.mask_mod(("allowed[i, j]", "torch.stack and any"), parameters), within=masks.window(5))
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
    ("os.system", "os.exec", "os.remove", "subprocess.Popen", "exec", "pickle.find_class", "ctypes.dlopen", "socket.connect")
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
        put = draw(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=3), st.just(out[start:stop] * 2), st.just("")))
        out = out[:start] + put + out[stop:]
    return out


def reads_or_refuses(read: Callable[[], Any]) -> None:
    """Nothing else comes of a text: a value, or a ValueError; no code runs."""
    with Watch() as events, contextlib.suppress(ValueError):
        read()
    assert events == []


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(range(len(TEXTS))).flatmap(lambda at: st.tuples(st.just(at), mutated(st.just(TEXTS[at][0])))))
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
