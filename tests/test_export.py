"""Exported models: results, fresh processes, training, any length, AOTInductor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import compiled_dilated as cd
from compiled_dilated import masks
from tests.caches import forget
from tests.support.exported import MODELS, Learned, N, mod, same, tensors
from tests.support.forked import run_code

pytestmark = pytest.mark.usefixtures("fresh")


def exported(name: str, strict: bool = False) -> torch.export.ExportedProgram:
    model = MODELS[name]
    return torch.export.export(model.make(), model.inputs(N), strict=strict)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
@pytest.mark.parametrize("name", MODELS)
def test_exported_models_compute_the_same(name: str, strict: bool) -> None:
    """With emptied caches."""
    model = MODELS[name]
    expected = model.make()(*model.inputs(N))
    program = exported(name, strict)
    forget()
    same(program.module()(*model.inputs(N)), expected)
    targets = [str(node.target) for node in attention_nodes(program)]
    assert targets == ["compiled_dilated.attend.default"]


def attention_nodes(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    """The nodes that call operators of this library."""
    return [node for node in program.graph.nodes if "compiled_dilated" in str(node.target)]


LOADS = """
import sys, pathlib, torch
import compiled_dilated
{before}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pt2")):
    inputs, expected = torch.load(path.with_suffix(".pt"))
    out = torch.export.load(path).module()(*inputs)
    named = lambda message: path.stem + message
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10, msg=named)
    print(path.stem)
"""
# Functions with the names of the exported ones, compiled and exported first.
SAME_NAMES = """
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


KINDS: dict[str, tuple[str, ...]] = {
    "long lists": ("many documents", "many tiles"),
    "functions": ("closures", "parameters"),
}
KINDS["programs"] = tuple(sorted(set(MODELS).difference(*KINDS.values())))


@pytest.mark.parametrize(
    "kind", ["programs", "functions", pytest.param("long lists", marks=pytest.mark.slow)]
)
def test_exported_models_run_in_a_fresh_process(kind: str, tmp_path: Path) -> None:
    """The process imports compiled_dilated and nothing else of the model."""
    for name in KINDS[kind]:
        save(tmp_path, name, MODELS[name].make(), MODELS[name].inputs(N))
    run = run_code(LOADS.format(before=""), str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:-1] == list(KINDS[kind])


def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = cd.compile(masks.from_mod(rule))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.attend(q, k, v, score_mod=mod)


def test_exported_models_run_beside_functions_of_the_same_names(
    tmp_path: Path,
) -> None:
    save(tmp_path, "named", Named(), tensors())
    run = run_code(LOADS.format(before=SAME_NAMES), str(tmp_path))
    assert run.returncode == 0, run.stderr


def test_exports_of_equal_models_have_equal_texts() -> None:
    texts = []
    for _ in range(2):
        forget()
        node = attention_nodes(exported("parameters"))[0]
        arguments = (*node.args, *node.kwargs.values())
        texts.append([value for value in arguments if isinstance(value, str)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
@pytest.mark.parametrize("saved", [False, True])
def test_exported_models_train(saved: bool, strict: bool, tmp_path: Path) -> None:
    """Gradients of q, k, v and the parameters of a score_mod."""
    model, inputs = Learned(), tuple(x.requires_grad_() for x in tensors())
    leaves = (*inputs, model.slopes, model.rows)
    expected = torch.autograd.grad(model(*inputs).sin().sum(), leaves)
    program = torch.export.export(model, inputs, strict=strict)
    if saved:
        torch.export.save(program, tmp_path / "model.pt2")
        program = torch.export.load(tmp_path / "model.pt2")
    loaded = program.module()
    forget()
    out = loaded(*inputs)
    forget()
    parameters = dict(loaded.named_parameters())
    leaves = (*inputs, parameters["slopes"], parameters["rows"])
    same(torch.autograd.grad(out.sin().sum(), leaves), expected)


COMPILED = ("longnet", "data", "parameters", "closures", "many documents", "grouped heads")


@pytest.mark.parametrize("name", [*COMPILED, "tiled", "variant"])
def test_exported_models_take_any_length(name: str) -> None:
    model = MODELS[name]
    built, inputs = model.make(), model.inputs(N)
    tokens = Dim("tokens", min=2, max=64)
    shapes = []
    for x in inputs:
        # Of data, (batch, tokens), and of a variant's input the second axis.
        axis = 1 if name == "variant" or x.dim() == 2 else 2
        shapes.append({axis: tokens})
    program = torch.export.export(built, inputs, dynamic_shapes=tuple(shapes)).module()
    for n in (N, 7, 64):
        same(program(*model.inputs(n)), built(*model.inputs(n)))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    model, path = MODELS[name], str(tmp_path / "model.pt2")
    with torch.no_grad():
        built, inputs = model.make(), model.inputs(N)
        expected = built(*inputs)
        program = torch.export.export(built, inputs)
        package = torch._inductor.aoti_compile_and_package(program, package_path=path)
        forget()
        same(torch._inductor.aoti_load_package(package)(*inputs), expected, 1e-6)
