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

pytestmark = pytest.mark.usefixtures("fresh")


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
    targets = [
        str(node.target) for node in program.graph.nodes if "compiled_dilated" in str(node.target)
    ]
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
KINDS["programs"] = tuple(
    sorted(name for name in MODELS if not any(name in names for names in KINDS.values()))
)


@pytest.mark.parametrize("kind", ["programs", "functions", "long lists"])
def test_exported_models_run_in_a_fresh_process(
    kind: str, tmp_path: Path, fresh_python: Python
) -> None:
    """Which imports the package and nothing else."""
    for name in KINDS[kind]:
        save(tmp_path, name, MODELS[name].make(), MODELS[name].inputs(N))
    ran = fresh_python("-c", LOADS.format(before=""), str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[:-1] == list(KINDS[kind])


def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = cd.compile(masks.from_mod(rule))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.attend(q, k, v, score_mod=mod)


def test_exported_models_run_beside_functions_of_the_same_names(
    tmp_path: Path, fresh_python: Python
) -> None:
    save(tmp_path, "named", Named(), tensors())
    ran = fresh_python("-c", LOADS.format(before=OTHERS), str(tmp_path))
    assert ran.returncode == 0, ran.stderr


def test_exported_text_needs_no_process() -> None:
    """What two exports of equal models say is equal."""
    texts = []
    for _ in range(2):
        forget()
        nodes = [
            node
            for node in exported("parameters").graph.nodes
            if "compiled_dilated" in str(node.target)
        ]
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
    [
        "longnet",
        "tiled",
        "data",
        "grouped heads",
        "parameters",
        "closures",
        "variant",
        "many documents",
    ],
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
@pytest.mark.parametrize(
    "name", ["longnet", "data", "parameters", "closures", "many documents", "grouped heads"]
)
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    with torch.no_grad():
        built, inputs = model.make(), model.inputs(N)
        want = built(*inputs)
        program = torch.export.export(built, inputs)
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        forget()
        same(torch._inductor.aoti_load_package(package)(*inputs), want, 1e-6)
