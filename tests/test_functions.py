"""score_mods and mask_mods in the user's terms: what they may be, what they capture, what a change of either does.

The judges: `cd.reference` in float64 with plain autograd, and torch's own flex_attention and create_mask.
"""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask, flex_attention, noop_mask

import compiled_dilated as cd
from compiled_dilated import Program, masks
from compiled_dilated.masks import Mask
from compiled_dilated.planner import PLANS
from tests import functions
from tests.caches import forget, lru_caches
from tests.functions import MASK_MODS, SCORE_MODS, WRAPPINGS, Parameters

N, HEADS = 40, 4
# A number that varies from call to call is an operand of float64; times whole positions it is float32 elsewhere.
ROUNDING_OF_A_NUMBER = 1e-6


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Dynamo without what earlier tests compiled; reaching its limit of graphs, where it silently goes eager, is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def tensors(n: int = N, dtype: torch.dtype = torch.float64, heads: int = HEADS, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """q (2, heads, n, 6), k and v (2, heads // 2, n, 6), leaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, heads, n, 6), (2, heads // 2, n, 6), (2, heads // 2, n, 6)
    q, k, v = (torch.randn(x, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for x in shapes)
    return q, k, v


def same(got: Any, want: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def gradients(results: tuple[Tensor, Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of a loss of out and lse; zeros for what the results do not depend on."""
    out, lse = results
    lse = torch.where(lse == -torch.inf, 0.0, lse)  # of rows that see nothing
    loss = (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)).sum() + lse.sin().sum()
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def same_as_reference(
    attention: Callable[..., Any], program: Program | Mask, inputs: Sequence[Tensor], learned: Sequence[Tensor], **options: Any
) -> None:
    """out, lse and the gradients of q, k, v and of what functions capture, in float64."""
    leaves = (*inputs, *learned)
    got, want = attention(*inputs, **options), cd.reference(program, *inputs, return_lse=True, **options)
    for name, x, y in zip(("out", "lse"), got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10, msg=lambda message, name=name: f"{name}: {message}")
    for number, (x, y) in enumerate(zip(gradients(got, leaves), gradients(want, leaves), strict=True)):
        torch.testing.assert_close(
            x, y, rtol=1e-10, atol=1e-10, msg=lambda message, number=number: f"gradient {number}: {message}"
        )


def flex(inputs: Sequence[Tensor], mod: Any, block_mask: BlockMask | None) -> Tensor:
    """torch's own attention, eager."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out: Any = flex_attention(*inputs, score_mod=mod, block_mask=block_mask, enable_gqa=True)
    return out  # type: ignore[no-any-return]


# A2, A9 and their kind: random functions ------------------------------------------------------------------------------------

PROGRAMS: dict[str, Program | Mask] = {
    "causal": masks.causal(),
    "window": masks.window(9),
    "window or sinks": masks.causal() & (masks.window(9) | masks.sinks(2)),
    "longnet": cd.longnet((8, 24), (1, 3), causal=True),
    "rows that see nothing": cd.longnet((16, 48), (2, 4)),
}
WAYS = ("dense", "strided", "tiled", "auto", "ring")
REFUSED = {("strided", "window"), ("strided", "window or sinks")}
score_bodies = st.lists(st.sampled_from(sorted(SCORE_MODS)), min_size=1, max_size=3, unique=True)
mask_bodies = st.lists(st.sampled_from(sorted(MASK_MODS)), min_size=1, max_size=3, unique=True)
wrappings = st.sampled_from(sorted(WRAPPINGS))
numbers = st.sampled_from((0.3, -1.25, 2, 0))


def attend_in(way: str, program: Program | Mask) -> cd.Attend:
    """The program by a lowering, or over two ranks."""
    return cd.compile(program, ranks=2) if way == "ring" else cd.compile(program, lowering=way)


def ways_of(name: str) -> st.SearchStrategy[str]:
    return st.sampled_from([way for way in WAYS if (way, name) not in REFUSED])


@pytest.mark.parametrize("name", PROGRAMS)
@settings(max_examples=10)
@given(data=st.data())
def test_score_mods_equal_the_reference(name: str, data: st.DataObject) -> None:
    """out, lse and gradients of q, k, v and of all captured tensors, by every lowering and over a ring."""
    parameters = Parameters.of(HEADS, N, number=data.draw(numbers))
    mod = WRAPPINGS[data.draw(wrappings)](functions.score_mod(data.draw(score_bodies), parameters))
    attend = attend_in(data.draw(ways_of(name)), PROGRAMS[name])

    def attention(*inputs: Tensor, **options: Any) -> Any:
        return attend(*inputs, return_lse=True, **options)

    same_as_reference(attention, PROGRAMS[name], tensors(), parameters.leaves, score_mod=mod)


@settings(max_examples=40)
@given(mask_bodies, st.sampled_from(("and", "or")), wrappings, st.sampled_from(WAYS), st.booleans())
def test_mask_mods_equal_the_reference_and_create_mask(
    names: list[str], join: str, wrapping: str, way: str, within: bool
) -> None:
    parameters, inputs = Parameters.of(HEADS, N), tensors()
    fn = WRAPPINGS[wrapping](functions.mask_mod(names, parameters, join))
    mask = masks.from_mod(fn, within=masks.window(30) if within else None)
    truth = create_mask(of_four(fn), 2, HEADS, N, N, device="cpu")
    if within:
        truth = truth & ((torch.arange(N)[:, None] - torch.arange(N)).abs() <= 30)
    assert torch.equal(mask.allows(*grid_of_indices()), truth)
    if way == "strided":  # which functions have no blocks for
        with pytest.raises(ValueError, match="is not made of regular blocks"):
            cd.compile(mask, lowering=way)(*inputs)
        return
    attend = attend_in(way, mask)
    same_as_reference(lambda *x: attend(*x, return_lse=True), mask, inputs, ())
    bias = torch.zeros(truth.shape, dtype=torch.float64).masked_fill(~truth, float("-inf"))
    want = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=bias, enable_gqa=True)
    seen = truth.any(dim=-1)
    same(attend(*inputs)[seen], want[seen])


def of_four(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A mask_mod of four arguments by name, which torch counts."""
    return lambda b, h, i, j: fn(b, h, i, j)


def grid_of_indices() -> tuple[Tensor, ...]:
    shapes = (2, 1, 1, 1), (1, HEADS, 1, 1), (1, 1, N, 1), (1, 1, 1, N)
    return tuple(torch.arange(max(shape)).reshape(shape) for shape in shapes)


@settings(max_examples=25)
@given(score_bodies, mask_bodies, wrappings, st.sampled_from(("dense", "tiled", "auto", "ring")))
def test_functions_equal_flex_attention(score_names: list[str], mask_names: list[str], wrapping: str, way: str) -> None:
    """The same functions given to torch, in float32, forward."""
    inputs = [x.detach() for x in tensors(dtype=torch.float32)]
    parameters = Parameters.of(HEADS, N, torch.float32).detached  # torch refuses on a CPU what requires gradients
    mod = WRAPPINGS[wrapping](functions.score_mod(score_names, parameters))
    fn = WRAPPINGS[wrapping](functions.mask_mod(["causal", *mask_names], parameters))
    with torch.no_grad():
        want = flex(inputs, mod, create_block_mask(of_four(fn), 2, HEADS, N, N, device="cpu"))
        got = attend_in(way, masks.from_mod(fn))(*inputs, score_mod=mod)
    seen = torch.isfinite(want)
    same(got[seen], want[seen], 2e-5)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(score_bodies, mask_bodies, wrappings, st.sampled_from(("dense", "tiled", "auto", "ring")), st.booleans(), numbers)
def test_compiled_functions_equal_the_reference(
    score_names: list[str], mask_names: list[str], wrapping: str, way: str, inside: bool, number: float
) -> None:
    """The same in one graph of torch.compile, closures made outside of the compiled function or inside."""
    compare_compiled("aot_eager", score_names, mask_names, wrapping, way, inside, number)


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(score_bodies, mask_bodies, wrappings, st.sampled_from(("dense", "tiled", "auto", "ring")), st.booleans(), numbers)
def test_more_compiled_functions_equal_the_reference(
    score_names: list[str], mask_names: list[str], wrapping: str, way: str, inside: bool, number: float
) -> None:
    compare_compiled("aot_eager", score_names, mask_names, wrapping, way, inside, number)


@pytest.mark.slow
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(score_bodies, mask_bodies, wrappings, st.sampled_from(("dense", "tiled")), st.booleans(), numbers)
def test_functions_compiled_by_inductor_equal_the_reference(
    score_names: list[str], mask_names: list[str], wrapping: str, way: str, inside: bool, number: float
) -> None:
    compare_compiled("inductor", score_names, mask_names, wrapping, way, inside, number)


def compare_compiled(
    backend: str, score_names: list[str], mask_names: list[str], wrapping: str, way: str, inside: bool, number: float
) -> None:
    torch._dynamo.reset()
    parameters, inputs = Parameters.of(HEADS, N, number=number), tensors()
    fn = WRAPPINGS[wrapping](functions.mask_mod(mask_names, parameters))
    mask = masks.from_mod(fn, within=masks.causal())
    attend = attend_in(way, mask)
    outside = WRAPPINGS[wrapping](functions.score_mod(score_names, parameters))

    def attention(*inputs: Tensor, score_mod: Any) -> Any:
        if inside:
            score_mod = functions.score_mod(score_names, parameters)
        return attend(*inputs, score_mod=score_mod, return_lse=True)

    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    same_as_reference(compiled, mask, inputs, parameters.leaves, score_mod=outside)


# A1, A2, A3: functions in compiled code -------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention whose score_mod can be replaced; `slope` is captured as a number or a tensor."""

    def __init__(self, mod: Any = None, mask: Mask | None = None) -> None:
        super().__init__()
        self.attend = cd.compile(masks.causal() if mask is None else mask)
        self.mod = mod

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.attend(q, k, v, score_mod=self.mod)
        return out


def sloped(slope: float | Tensor) -> Callable[..., Any]:
    return lambda score, b, h, i, j: score - slope * (i - j)


def whole(function: Any, backend: str = "aot_eager") -> Any:
    """In one graph."""
    return torch.compile(function, backend=backend, fullgraph=True)


def with_slope(slope: float | Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The right result of `sloped`."""
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
    compiled = whole(lambda q, k, v, mod: attend(q, k, v, score_mod=mod))
    for slope in (0.1, 1.0, 0.25, 0.1):
        same(compiled(*inputs, sloped(kind(slope))), with_slope(slope, inputs), ROUNDING_OF_A_NUMBER)


def test_numbers_that_vary_promote_as_numbers_do() -> None:
    """A number times whole positions is float32, so that eager and compiled calls draw the same edge."""

    class Band:
        unit = 0.1

        def mod(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i - j).abs() * self.unit <= 0.3

    inputs, band = tensors(), Band()
    layer = Layer(mask=masks.from_mod(band.mod))
    compiled = whole(layer)
    for band.unit in (0.2, 0.15, 0.1):
        same(compiled(*inputs), cd.reference(masks.from_mod(band.mod), *inputs))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_numbers_that_vary_by_backend(backend: str) -> None:
    inputs, attend = tensors(), cd.compile(masks.causal())
    compiled = whole(lambda q, k, v, mod: attend(q, k, v, score_mod=mod), backend)
    for slope in (0.1, 1.0, 0.25):
        same(compiled(*inputs, sloped(slope)), with_slope(slope, inputs), ROUNDING_OF_A_NUMBER)


def readers(number: Tensor, whole: Tensor) -> dict[str, Callable[..., Any]]:
    return {
        "item": lambda s, b, h, i, j: s * number.item(),
        "float": lambda s, b, h, i, j: s * float(number),
        "int": lambda s, b, h, i, j: s * int(whole),
        "tolist": lambda s, b, h, i, j: s * number.tolist(),
    }


@pytest.mark.parametrize("name", [*(name for name in ("item", "float", "int")), "tolist"])
def test_values_of_captured_tensors_are_read(name: str) -> None:
    """As they are at the call."""
    inputs, attend = tensors(), cd.compile(masks.causal())
    number, whole = torch.tensor(0.25, dtype=torch.float64), torch.tensor(3)
    mod = readers(number, whole)[name]
    for _ in range(2):
        same(attend(*inputs, score_mod=mod), cd.reference(masks.causal(), *inputs, score_mod=mod))
        number.neg_()
        whole.add_(1)


@pytest.mark.parametrize("name", ["item", "float", "int"])
def test_values_of_captured_tensors_are_read_in_compiled_functions(name: str) -> None:
    inputs, attend = tensors(), cd.compile(masks.causal())
    number, count = torch.tensor(0.25, dtype=torch.float64), torch.tensor(3)
    mod = readers(number, count)[name]
    compiled = whole(lambda *x: attend(*x, score_mod=mod))
    for _ in range(2):
        same(compiled(*inputs), cd.reference(masks.causal(), *inputs, score_mod=mod))
        number.neg_()
        count.add_(1)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_function_of_a_layer_is_replaced(compiled: bool) -> None:
    inputs, layer = tensors(), Layer(sloped(0.1))
    run = whole(layer) if compiled else layer
    for slope in (0.1, 1.0, torch.tensor(0.5)):
        layer.mod = sloped(slope)
        same(run(*inputs), with_slope(slope, inputs))
    layer.mod = None
    same(run(*inputs), with_slope(0.0, inputs))


class Sloped(nn.Module):
    """A score_mod as a bound method, with a number and two tensors that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.t = 0.1, nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        self.register_buffer("table", torch.zeros(HEADS, dtype=torch.float64))

    def mod(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - (self.number * self.t + self.table[h]) * (i - j)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_captured_numbers_and_tensors_change(compiled: bool) -> None:
    """The next call computes with the new number, and with what a tensor holds by then."""
    inputs, owner = tensors(), Sloped()
    layer = Layer(owner.mod)
    run = whole(layer) if compiled else layer
    for step in range(4):
        same(run(*inputs), cd.reference(masks.causal(), *inputs, score_mod=owner.mod))
        owner.number += 0.5
        with torch.no_grad():
            owner.t += 0.25
            owner.table[step] = 1.0
    owner.table = torch.ones(HEADS, dtype=torch.float64)
    same(run(*inputs), cd.reference(masks.causal(), *inputs, score_mod=owner.mod))


def test_a_bound_method_learns_in_a_compiled_function() -> None:
    inputs, owner = tensors(), Sloped()
    attend = cd.compile(masks.causal())

    def attention(*inputs: Tensor, score_mod: Any) -> Any:
        return attend(*inputs, score_mod=score_mod, return_lse=True)

    same_as_reference(whole(attention), masks.causal(), inputs, (owner.t,), score_mod=owner.mod)
    whole(lambda *x: attend(*x, score_mod=owner.mod))(*inputs).sum().backward()
    assert owner.t.grad is not None


def test_closures_made_inside_of_a_compiled_function() -> None:
    inputs, attend = tensors(), cd.compile(masks.causal())
    bias = torch.randn(N, N, dtype=torch.float64, requires_grad=True)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        doubled = bias * 2
        return attend(q, k, v, score_mod=lambda s, b, h, i, j: s + doubled[i, j], return_lse=True)

    mod = lambda s, b, h, i, j: s + 2 * bias[i, j]  # noqa: E731
    same_as_reference(lambda *x, score_mod: whole(attention)(*x, bias), masks.causal(), inputs, (bias,), score_mod=mod)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_tensors_of_mask_mods_change_between_calls(compiled: bool) -> None:
    inputs, allowed = tensors(), torch.ones(N, N, dtype=torch.bool)
    mask = masks.from_mod(lambda b, h, i, j: allowed[i, j] & (i >= j))
    layer = Layer(mask=mask)
    run = whole(layer) if compiled else layer
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
    run = whole(layer) if compiled else layer
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


# A8 -------------------------------------------------------------------------------------------------------------------------


def test_scales_that_vary_in_one_graph() -> None:
    """A float argument with dynamic=True; negative, zero, and whole ones too."""
    inputs, attend = tensors(), cd.compile(masks.causal())
    compiled = torch.compile(
        lambda q, k, v, scale: attend(q, k, v, scale=scale), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for scale in (0.3, 0.7, -1.5, 2, 0.0, 1.0):
        same(compiled(*inputs, scale), cd.reference(masks.causal(), *inputs, scale=scale))


# A9, A10, A11 ---------------------------------------------------------------------------------------------------------------


def reductions(rows: Tensor) -> dict[str, Callable[..., Any]]:
    return {
        "sum": lambda s, b, h, i, j: s + (rows[i] * rows[j]).sum(),
        "torch.dot": lambda s, b, h, i, j: s + torch.dot(rows[i], rows[j]),
        "matmul": lambda s, b, h, i, j: s + rows[i] @ rows[j],
        "mean": lambda s, b, h, i, j: s + (rows[i] - rows[j]).abs().mean(dim=-1),
        "norm": lambda s, b, h, i, j: s - (rows[i] - rows[j] + 0.1).norm(),
        "logsumexp": lambda s, b, h, i, j: torch.logsumexp(torch.stack([s, rows[i, 0], rows[j, 0]]), 0),
    }


@pytest.mark.parametrize("way", ["dense", "tiled", "auto", "ring"])
@pytest.mark.parametrize("name", reductions(torch.zeros(1, 1)))
def test_reductions_over_rows_of_tables(name: str, way: str) -> None:
    inputs, rows = tensors(), torch.randn(N, 5, dtype=torch.float64, requires_grad=True)
    mod, attend = reductions(rows)[name], attend_in(way, masks.causal())
    same_as_reference(lambda *x, **o: attend(*x, return_lse=True, **o), masks.causal(), inputs, (rows,), score_mod=mod)
    with torch.no_grad():
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, N, N, device="cpu")
        same(attend(*inputs, score_mod=mod), flex([x.detach() for x in inputs], mod, block_mask), 1e-5)


OF_TORCHS_KIND: dict[str, Callable[..., Any]] = {
    "noop_mask": noop_mask,
    "and_masks": and_masks(),
    "stack and all": lambda b, h, i, j: torch.stack([i >= j, i - j < 9]).all(),
    "hides nothing": lambda b, h, i, j: i >= 0,
    "torch.tensor": lambda b, h, i, j: torch.tensor(True),
}


@pytest.mark.parametrize("way", ["dense", "tiled", "auto", "ring"])
@pytest.mark.parametrize("name", OF_TORCHS_KIND)
def test_mask_mods_of_torchs_kind(name: str, way: str) -> None:
    fn, inputs = OF_TORCHS_KIND[name], tensors()
    want = create_mask(fn, 1, 1, N, N, device="cpu")
    wanted = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=want, enable_gqa=True)
    same(attend_in(way, masks.from_mod(fn))(*inputs), wanted)


@pytest.mark.parametrize("name", [*list(OF_TORCHS_KIND)[:-1], "torch.tensor"])
def test_compiled_mask_mods_of_torchs_kind(name: str) -> None:
    mask, inputs = masks.from_mod(OF_TORCHS_KIND[name]), tensors()
    same(whole(cd.compile(mask))(*inputs), cd.reference(mask, *inputs))


def test_plans_of_functions_that_call_methods_of_tensors() -> None:
    mask = masks.from_mod(lambda b, h, i, j: (i - j).abs() < 100, within=masks.window(100))
    assert cd.plan(mask, (1, 2, 512, 16)).useful_pairs == 2 * sum(min(511, i + 99) - max(0, i - 99) + 1 for i in range(512))


# E3, E4: autocast -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["dense", "tiled", "auto", "ring"])
def test_functions_under_autocast(way: str) -> None:
    """Autocast casts q, k and v, and nothing inside; a float32 table is read as it is, the lse is float32."""
    inputs = [(x.detach() * 20).requires_grad_() for x in tensors(dtype=torch.float32)]
    table = torch.randn(N, N, requires_grad=True)
    mod, attend = (lambda s, b, h, i, j: s + table[i, j]), attend_in(way, masks.causal())
    cast = [x.bfloat16() for x in inputs]
    want = attend(*cast, score_mod=mod, return_lse=True)
    want_gradients = torch.autograd.grad(want[0].float().sum() + want[1].sum(), (*inputs, table))
    for run in (attend, whole(attend)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = run(*inputs, score_mod=mod, return_lse=True)
        assert got[0].dtype == torch.bfloat16
        assert got[1].dtype == torch.float32
        same(got, want, 0)
        same(torch.autograd.grad(got[0].float().sum() + got[1].sum(), (*inputs, table)), want_gradients, 1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # the backward too
            got = run(*inputs, score_mod=mod, return_lse=True)
            same(torch.autograd.grad(got[0].float().sum() + got[1].sum(), (*inputs, table)), want_gradients, 1e-6)


@pytest.mark.parametrize("way", ["dense", "strided", "tiled", "auto", "ring"])
def test_rows_that_see_nothing_pass_no_gradient_of_their_lse(way: str) -> None:
    """Whatever comes back for their lse of -inf: NaN, as from the sine or the join of two such rows."""
    mask, inputs = masks.congruent(2, 1), tensors()
    attend = attend_in(way, mask)
    got = torch.autograd.grad(attend(*inputs, return_lse=True)[1].sin().sum(), inputs[:2])
    want = torch.autograd.grad(cd.reference(mask, *inputs, return_lse=True)[1].sin().sum(), inputs[:2])
    same(got, want)


# A4, E13: memory ------------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def stepped(step: Callable[[int], weakref.ref[Tensor]], count: int, warm: int = 20) -> None:
    """Calls `step` often: the tensor that it names dies, memory and tables stay within bounds."""
    forget()
    references = [step(number) for number in range(warm)]
    before = resident_bytes()
    references += [step(number) for number in range(warm, count)]
    grown = resident_bytes() - before
    assert sum(reference() is not None for reference in references) == 0
    assert grown < 20 * 2**20
    assert len(PLANS) <= PLANS.most
    for cache in lru_caches():
        assert (bound := cache.cache_parameters()["maxsize"]) is not None, cache
        assert cache.cache_info().currsize <= bound


@pytest.mark.parametrize("calls", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_tensors_of_score_mods_are_freed(calls: int) -> None:
    """Calls with a new closure over a new tensor each, every fiftieth trained."""
    n = 16
    inputs, attend = [x[:1] for x in tensors(n, torch.float32)], cd.compile(masks.causal())

    def step(number: int) -> weakref.ref[Tensor]:
        table = torch.full((64, n, n), float(number), requires_grad=number % 50 == 0)
        with torch.set_grad_enabled(number % 50 == 0):
            out = attend(*inputs, score_mod=lambda s, b, h, i, j: s + table[0, i, j])
        if number % 50 == 0:
            out.sum().backward()
        return weakref.ref(table)

    stepped(step, calls)


def test_tensors_of_mask_mods_are_freed() -> None:
    """300 calls with a new mask over a new tensor each."""
    n = 64
    inputs = [x[:1].detach() for x in tensors(n, torch.float32)]

    def step(number: int) -> weakref.ref[Tensor]:
        table = (torch.arange(64 * n).view(64, n) * (number + 1) % 7) < 5
        cd.compile(masks.from_mod(lambda b, h, i, j: table[0, j] & (i >= j), within=masks.causal()))(*inputs)
        return weakref.ref(table)

    stepped(step, 300)


def test_tensors_of_compiled_functions_are_freed() -> None:
    inputs = [x[:1].detach() for x in tensors(16, torch.float32)]
    attend = cd.compile(masks.causal())
    compiled = whole(lambda q, k, v, table: attend(q, k, v, score_mod=lambda s, b, h, i, j: s + table[0, i, j]))

    def step(number: int) -> weakref.ref[Tensor]:
        table = torch.full((64, 16, 16), float(number))
        compiled(*inputs, table)
        return weakref.ref(table)

    stepped(step, 60)


def test_equal_rings_leave_nothing_in_tables() -> None:
    inputs = [x.detach() for x in tensors()]
    same(cd.compile(masks.causal(), ranks=2)(*inputs), cd.reference(masks.causal(), *inputs))

    def made() -> weakref.ref[Any]:
        attend = cd.compile(masks.causal(), ranks=2)
        attend(*inputs)
        return weakref.ref(attend.ring)

    plans = len(PLANS)
    rings = [made() for _ in range(20)]
    gc.collect()
    assert len(PLANS) == plans
    assert all(ring() is None for ring in rings)


# torch.func, checkpoints, modes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["dense", "tiled", "auto", "ring"])
def test_func_grad_and_vjp_of_captured_tensors(way: str) -> None:
    inputs, table = [x.detach() for x in tensors()], torch.randn(N, N, dtype=torch.float64)
    attend = attend_in(way, masks.causal())

    def loss(attention: Any, table: Tensor, q: Tensor) -> Tensor:
        return attention(q, *inputs[1:], score_mod=lambda s, b, h, i, j: s + table[i, j]).square().sum()  # type: ignore[no-any-return]

    def reference(*x: Tensor, **options: Any) -> Any:
        return cd.reference(masks.causal(), *x, **options)

    want = torch.func.grad(lambda *x: loss(reference, *x), argnums=(0, 1))(table, inputs[0])
    same(torch.func.grad(lambda *x: loss(attend, *x), argnums=(0, 1))(table, inputs[0]), want)
    value, pull = torch.func.vjp(lambda *x: loss(attend, *x), table, inputs[0])
    same(value, loss(reference, table, inputs[0]))
    same(pull(torch.ones_like(value)), want)


@pytest.mark.parametrize("way", ["dense", "tiled", "auto", "ring"])
def test_vmap_over_captured_tensors(way: str) -> None:
    """A table for each entry, and its gradient."""
    inputs, table = [x.detach() for x in tensors()], torch.randn(3, N, N, dtype=torch.float64)
    attend = attend_in(way, masks.causal())

    def of(table: Tensor) -> Any:
        return attend(*inputs, score_mod=lambda s, b, h, i, j: s + table[i, j])

    def wanted(table: Tensor) -> Any:
        return cd.reference(masks.causal(), *inputs, score_mod=lambda s, b, h, i, j: s + table[i, j])

    same(torch.vmap(of)(table), torch.stack([wanted(x) for x in table]))
    got = torch.vmap(torch.func.grad(lambda x: of(x).square().sum()))(table)
    same(got, torch.stack([torch.func.grad(lambda x: wanted(x).square().sum())(x) for x in table]))


def test_vmap_over_tensors_of_mask_mods() -> None:
    inputs, allowed = [x.detach() for x in tensors()], torch.rand(3, N, N) > 0.3

    def of(allowed: Tensor) -> Any:
        return cd.compile(masks.from_mod(lambda b, h, i, j: allowed[i, j]))(*inputs)

    same(torch.vmap(of)(allowed), torch.stack([of(x) for x in allowed]))


def test_func_grad_of_what_decides_a_mask() -> None:
    """A mask_mod that reads a tensor of the transform; it passes no gradient."""
    inputs = [x.detach() for x in tensors()]

    def loss(attention: Any, row: Tensor, q: Tensor) -> Any:
        mask = masks.from_mod(lambda b, h, i, j: (row[j] > 0) | (i == j))
        return (attention(mask)(q, *inputs[1:]) * row[None, None, :, None]).sum()

    def reference(mask: Mask) -> Any:
        return lambda *x: cd.reference(mask, *x)

    row = torch.randn(N, dtype=torch.float64)
    got, want = (torch.func.grad(loss, argnums=(1, 2))(attention, row, inputs[0]) for attention in (cd.compile, reference))
    same(got, want)


def test_vmap_over_inputs_beside_a_captured_tensor_that_learns() -> None:
    inputs, rows = (
        [torch.stack([x.detach(), -x.detach()]) for x in tensors()],
        torch.randn(N, 3, dtype=torch.float64).requires_grad_(),
    )
    mod, attend = (lambda s, b, h, i, j: s + (rows[i] * rows[j]).sum()), cd.compile(masks.causal())
    got = torch.vmap(lambda *x: attend(*x, score_mod=mod))(*inputs)
    want = torch.stack([cd.reference(masks.causal(), *x, score_mod=mod) for x in zip(*inputs, strict=True)])
    same(got, want)
    same(torch.autograd.grad(got.sin().sum(), rows), torch.autograd.grad(want.sin().sum(), rows))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_with_closures(reentrant: bool) -> None:
    inputs, table = tensors(), torch.randn(N, N, dtype=torch.float64, requires_grad=True)
    attend = cd.compile(masks.causal())

    def attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Any:
        return attend(q, k, v, score_mod=lambda s, b, h, i, j: s + table[i, j])

    leaves = (*inputs, table)
    out = torch.utils.checkpoint.checkpoint(attention, *leaves, use_reentrant=reentrant)
    out.sin().sum().backward()
    want = torch.autograd.grad(attention(*leaves).sin().sum(), leaves)
    same([x.grad for x in leaves], list(want))


def test_second_derivatives_of_captured_tensors_are_refused() -> None:
    inputs, table = tensors(), torch.randn(N, N, dtype=torch.float64, requires_grad=True)
    out = cd.compile(masks.causal())(*inputs, score_mod=lambda s, b, h, i, j: s + table[i, j])
    (grad,) = torch.autograd.grad(out.square().sum(), table, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"not twice differentiable here.*Use compiled_dilated.reference"):
        grad.sum().backward()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_after_inference_mode(compiled: bool) -> None:
    inputs, parameters = tensors(), Parameters.of(HEADS, N)
    mod = functions.score_mod(("table[i, j]", "soft cap"), parameters)
    mask = masks.from_mod(functions.mask_mod(("segments",), parameters))
    attend = cd.compile(mask)
    run = whole(attend) if compiled else attend
    forget()
    with torch.inference_mode():
        run(*inputs, score_mod=mod)
    same_as_reference(lambda *x, **o: run(*x, return_lse=True, **o), mask, inputs, parameters.leaves, score_mod=mod)


@torch.no_grad()
def captured_in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.randn(N, N, dtype=torch.float64)


def test_a_table_made_in_inference_mode() -> None:
    inputs, table = tensors(), captured_in_inference_mode()
    mod = lambda s, b, h, i, j: s + table[i, j]  # noqa: E731
    attend = cd.compile(masks.from_mod(lambda b, h, i, j: table[i, j] < 1))
    with torch.inference_mode():
        got = attend(*inputs, score_mod=mod)
        plain = table.clone()
    same(got, attend(*(x.detach() for x in inputs), score_mod=lambda s, b, h, i, j: s + plain[i, j]))


class DefaultDtype:
    """torch.set_default_dtype(torch.float64) for a while."""

    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)


class Deterministic:
    """torch.use_deterministic_algorithms(True) for a while."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], Any]] = {
    "default dtype": DefaultDtype,
    "default device": lambda: torch.device("meta"),
    "deterministic": Deterministic,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("way", ["dense", "tiled", "auto", "ring"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_around_a_call_change_nothing(mode: str, way: str, compiled: bool) -> None:
    """float64 inputs, which autocast leaves alone; whole numbers, constants and tables inside of the functions."""
    inputs, parameters = tensors(), Parameters.of(HEADS, N)
    mask = masks.from_mod(functions.mask_mod(("segments", "torch.stack and any"), parameters, "or"))
    attend, run = (attend_in(way, mask) for _ in range(2))
    if compiled:
        run = whole(run)
    mod = functions.score_mod(("alibi", "T5 buckets", "table[i, j]", "torch.stack and all", "soft cap"), parameters)
    leaves = (*inputs, *parameters.leaves)
    want = attend(*inputs, score_mod=mod, return_lse=True)
    want_gradients = gradients(want, leaves)
    for empty in (False, True):
        if empty:
            forget()
        with MODES[mode]():
            got = run(*inputs, score_mod=mod, return_lse=True)
        same(got, want)
        same(gradients(got, leaves), want_gradients)
    if compiled and mode == "deterministic":  # torch refuses to change it between a compiled forward and its backward
        return
    out, lse = run(*inputs, score_mod=mod, return_lse=True)
    with MODES[mode]():
        got_gradients = torch.autograd.grad((out, lse), leaves, (out.detach(), lse.detach()), allow_unused=True)
    out, lse = want = attend(*inputs, score_mod=mod, return_lse=True)
    same(list(got_gradients), list(torch.autograd.grad((out, lse), leaves, (out.detach(), lse.detach()), allow_unused=True)))


# What is refused ------------------------------------------------------------------------------------------------------------


REFUSED_MODS: dict[str, tuple[Callable[..., Any], str]] = {
    "branches": (lambda s, b, h, i, j: s if i >= j else -s, "reads the value"),
    "random of a shape": (lambda s, b, h, i, j: s + torch.rand_like(s), "random"),
    "random": (lambda s, b, h, i, j: s + torch.rand(()), "random"),
    "a float": (lambda s, b, h, i, j: 1.0, "must return a number"),
    "a bool": (lambda s, b, h, i, j: s > 0, "must return the new score"),
    "two numbers": (lambda s, b, h, i, j: torch.stack([s, s]), "one number for each pair"),
    "two arguments": (lambda s, b: s, "5 arguments"),
}


@pytest.mark.parametrize("name", REFUSED_MODS)
def test_score_mods_that_are_refused(name: str) -> None:
    mod, says = REFUSED_MODS[name]
    with pytest.raises((TypeError, ValueError), match=says):
        cd.compile(masks.causal())(*tensors(), score_mod=mod)


@pytest.mark.parametrize("name", REFUSED_MODS)
def test_score_mods_that_are_refused_in_compiled_functions(name: str) -> None:
    """Dynamo has words of its own for some."""
    attend = cd.compile(masks.causal())
    with pytest.raises(Exception, match=r"."):
        whole(lambda *x: attend(*x, score_mod=REFUSED_MODS[name][0]))(*tensors())
