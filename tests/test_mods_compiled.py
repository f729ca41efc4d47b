"""score_mods and mask_mods inside torch.compile: closures, numbers, captured tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.masks import Mask
from tests.support.mods import HEADS, N, in_one_graph, same, same_as_reference, tensors

pytestmark = pytest.mark.usefixtures("fresh")

# A number that varies from call to call is an operand of float64; a constant number times integer
# positions is float32.
ROUNDING_OF_A_NUMBER = 1e-6


class Layer(nn.Module):
    """Attention whose score_mod can be replaced.

    `slope` is captured as a number or a tensor.
    """

    def __init__(self, mod: Any = None, mask: Mask | None = None) -> None:
        super().__init__()
        self.attend = cd.compile(masks.causal() if mask is None else mask)
        self.mod = mod

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.attend(q, k, v, score_mod=self.mod)
        return out


def sloped(slope: float | Tensor) -> Callable[..., Any]:
    return lambda score, b, h, i, j: score - slope * (i - j)


def with_slope(slope: float | Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The reference's result with `sloped`."""
    out = cd.reference(masks.causal(), *inputs, score_mod=sloped(slope))
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_compiled_layers_with_closures_of_one_factory(kind: Callable[[float], Any]) -> None:
    inputs, slopes = tensors(), (0.1, 1.0, 0.25)
    layers = [Layer(sloped(kind(slope))) for slope in slopes]
    for layer in layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    for _, (layer, slope) in itertools.product(range(2), zip(layers, slopes, strict=True)):
        same(layer(*inputs), with_slope(slope, inputs), ROUNDING_OF_A_NUMBER)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_closures_as_arguments_of_a_compiled_function(kind: Callable[[float], Any]) -> None:
    inputs, attend = tensors(), cd.compile(masks.causal())
    compiled = in_one_graph(lambda q, k, v, mod: attend(q, k, v, score_mod=mod))
    for slope in (0.1, 1.0, 0.25, 0.1):
        same(
            compiled(*inputs, sloped(kind(slope))), with_slope(slope, inputs), ROUNDING_OF_A_NUMBER
        )


def test_numbers_that_vary_promote_as_numbers_do() -> None:
    """A number times integer positions is float32.

    Eager and compiled masks have one edge.
    """

    class Band:
        unit = 0.1

        def mod(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i - j).abs() * self.unit <= 0.3

    inputs, band = tensors(), Band()
    layer = Layer(mask=masks.from_mod(band.mod))
    compiled = in_one_graph(layer)
    for band.unit in (0.2, 0.15, 0.1):
        same(compiled(*inputs), cd.reference(masks.from_mod(band.mod), *inputs))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_numbers_that_vary_by_backend(backend: str) -> None:
    inputs, attend = tensors(), cd.compile(masks.causal())
    compiled = in_one_graph(lambda q, k, v, mod: attend(q, k, v, score_mod=mod), backend)
    for slope in (0.1, 1.0, 0.25):
        same(compiled(*inputs, sloped(slope)), with_slope(slope, inputs), ROUNDING_OF_A_NUMBER)


def readers(number: Tensor, integer: Tensor) -> dict[str, Callable[..., Any]]:
    return {
        "item": lambda s, b, h, i, j: s * number.item(),
        "float": lambda s, b, h, i, j: s * float(number),
        "int": lambda s, b, h, i, j: s * int(integer),
        "tolist": lambda s, b, h, i, j: s * number.tolist(),
    }


@pytest.mark.parametrize("name", ["item", "float", "int", "tolist"])
def test_item_of_a_captured_tensor_reads_its_value(name: str) -> None:
    """The value at the call."""
    inputs, attend = tensors(), cd.compile(masks.causal())
    number, integer = torch.tensor(0.25, dtype=torch.float64), torch.tensor(3)
    mod = readers(number, integer)[name]
    for _ in range(2):
        same(attend(*inputs, score_mod=mod), cd.reference(masks.causal(), *inputs, score_mod=mod))
        number.neg_()
        integer.add_(1)


@pytest.mark.parametrize("name", ["item", "float", "int"])
def test_item_of_a_captured_tensor_reads_its_value_when_compiled(name: str) -> None:
    inputs, attend = tensors(), cd.compile(masks.causal())
    number, count = torch.tensor(0.25, dtype=torch.float64), torch.tensor(3)
    mod = readers(number, count)[name]
    compiled = in_one_graph(lambda *x: attend(*x, score_mod=mod))
    for _ in range(2):
        same(compiled(*inputs), cd.reference(masks.causal(), *inputs, score_mod=mod))
        number.neg_()
        count.add_(1)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_replacing_a_layers_score_mod_changes_the_result(compiled: bool) -> None:
    inputs, layer = tensors(), Layer(sloped(0.1))
    run = in_one_graph(layer) if compiled else layer
    for slope in (0.1, 1.0, torch.tensor(0.5)):
        layer.mod = sloped(slope)
        same(run(*inputs), with_slope(slope, inputs))
    layer.mod = None
    same(run(*inputs), with_slope(0.0, inputs))


class Sloped(nn.Module):
    """A score_mod as a bound method.

    It reads a number and two tensors.
    """

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.number, self.t = 0.1, nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        self.register_buffer("table", torch.zeros(HEADS, dtype=torch.float64))

    def mod(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - (self.number * self.t + self.table[h]) * (i - j)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_captured_numbers_and_tensors_change(compiled: bool) -> None:
    """The next call uses the new number and the tensors' new values."""
    inputs, owner = tensors(), Sloped()
    layer = Layer(owner.mod)
    run = in_one_graph(layer) if compiled else layer
    for step in range(4):
        same(run(*inputs), cd.reference(masks.causal(), *inputs, score_mod=owner.mod))
        owner.number += 0.5
        with torch.no_grad():
            owner.t.add_(0.25)
            owner.table[step] = 1.0
    owner.table = torch.ones(HEADS, dtype=torch.float64)
    same(run(*inputs), cd.reference(masks.causal(), *inputs, score_mod=owner.mod))


def test_a_bound_method_learns_in_a_compiled_function() -> None:
    inputs, owner = tensors(), Sloped()
    attend = cd.compile(masks.causal())

    def attention(*inputs: Tensor, score_mod: Any) -> Any:
        return attend(*inputs, score_mod=score_mod, return_lse=True)

    same_as_reference(
        in_one_graph(attention), masks.causal(), inputs, (owner.t,), score_mod=owner.mod
    )
    in_one_graph(lambda *x: attend(*x, score_mod=owner.mod))(*inputs).sum().backward()
    assert owner.t.grad is not None


def test_closures_created_inside_of_a_compiled_function() -> None:
    inputs, attend = tensors(), cd.compile(masks.causal())
    bias = torch.randn(N, N, dtype=torch.float64, requires_grad=True)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        doubled = bias * 2
        return attend(q, k, v, score_mod=lambda s, b, h, i, j: s + doubled[i, j], return_lse=True)

    mod = lambda s, b, h, i, j: s + 2 * bias[i, j]  # noqa: E731
    same_as_reference(
        lambda *x, score_mod: in_one_graph(attention)(*x, bias),
        masks.causal(),
        inputs,
        (bias,),
        score_mod=mod,
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_tensors_of_mask_mods_change_between_calls(compiled: bool) -> None:
    inputs, allowed = tensors(), torch.ones(N, N, dtype=torch.bool)
    mask = masks.from_mod(lambda b, h, i, j: allowed[i, j] & (i >= j))
    layer = Layer(mask=mask)
    run = in_one_graph(layer) if compiled else layer
    for step in range(4):
        same(run(*inputs), cd.reference(mask, *inputs))
        allowed[:, step * 3 : step * 3 + 2] = False


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_number_of_a_mask_mod_changes(compiled: bool) -> None:
    class Window:
        reach = 3

        def mod(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i - j).abs() <= self.reach

    inputs, window = tensors(), Window()
    layer = Layer(mask=masks.from_mod(window.mod))
    run = in_one_graph(layer) if compiled else layer
    for reach in (3, 9, 0):
        window.reach = reach
        same(run(*inputs), cd.reference(masks.window(reach), *inputs))


def test_compiled_masks_of_one_factory() -> None:
    def band(reach: int, table: Tensor) -> Mask:
        return masks.from_mod(lambda b, h, i, j: ((i - j).abs() <= reach) & table[j])

    inputs = tensors()
    bands = [band(reach, torch.arange(N) % reach < 2) for reach in (3, 5, 9)]
    layers = [Layer(mask=mask) for mask in bands]
    for layer in layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    for _, (layer, mask) in itertools.product(range(2), zip(layers, bands, strict=True)):
        same(layer(*inputs), cd.reference(mask, *inputs))


def test_scales_that_vary_in_one_graph() -> None:
    """A float argument with dynamic=True; negative, zero, and whole ones too."""
    inputs, attend = tensors(), cd.compile(masks.causal())
    compiled = torch.compile(
        lambda q, k, v, scale: attend(q, k, v, scale=scale),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for scale in (0.3, 0.7, -1.5, 2, 0.0, 1.0):
        same(compiled(*inputs, scale), cd.reference(masks.causal(), *inputs, scale=scale))
