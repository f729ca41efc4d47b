"""Random score_mods and mask_mods against the reference, create_mask and flex_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

import compiled_dilated as cd
from compiled_dilated import Program, masks
from compiled_dilated.masks import Mask
from tests import functions
from tests.functions import MASK_MODS, SCORE_MODS, WRAPPINGS, Parameters
from tests.support.mods import HEADS, N, attend_in, flex, same, same_as_reference, tensors

pytestmark = pytest.mark.usefixtures("fresh")

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


def ways_of(name: str) -> st.SearchStrategy[str]:
    return st.sampled_from([way for way in WAYS if (way, name) not in REFUSED])


@pytest.mark.parametrize("name", PROGRAMS)
@settings(max_examples=6)
@given(data=st.data())
def test_score_mods_equal_the_reference(name: str, data: st.DataObject) -> None:
    """out, lse and gradients by every lowering and a ring.

    The gradients are of q, k, v and all captured tensors.
    """
    parameters = Parameters.of(HEADS, N, number=data.draw(numbers))
    mod = WRAPPINGS[data.draw(wrappings)](functions.score_mod(data.draw(score_bodies), parameters))
    attend = attend_in(data.draw(ways_of(name)), PROGRAMS[name])

    def attention(*inputs: Tensor, **options: Any) -> Any:
        return attend(*inputs, return_lse=True, **options)

    same_as_reference(attention, PROGRAMS[name], tensors(), parameters.leaves, score_mod=mod)


@settings(max_examples=20)
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
    b, h, i, j = grid_of_indices()
    assert torch.equal(mask.allows(b, h, i, j), truth)
    if way == "strided":  # functions have no regular blocks
        with pytest.raises(ValueError, match="is not made of regular blocks"):
            cd.compile(mask, lowering=way)(*inputs)
        return
    attend = attend_in(way, mask)
    same_as_reference(lambda *x: attend(*x, return_lse=True), mask, inputs, ())
    bias = torch.zeros(truth.shape, dtype=torch.float64).masked_fill(~truth, float("-inf"))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *inputs, attn_mask=bias, enable_gqa=True
    )
    seen = truth.any(dim=-1)
    same(attend(*inputs)[seen], expected[seen])


def of_four(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A mask_mod of four arguments by name, which torch counts."""
    return lambda b, h, i, j: fn(b, h, i, j)


def grid_of_indices() -> tuple[Tensor, ...]:
    shapes = (2, 1, 1, 1), (1, HEADS, 1, 1), (1, 1, N, 1), (1, 1, 1, N)
    return tuple(torch.arange(max(shape)).reshape(shape) for shape in shapes)


@settings(max_examples=12)
@given(score_bodies, mask_bodies, wrappings, st.sampled_from(("dense", "tiled", "auto", "ring")))
def test_functions_equal_flex_attention(
    score_names: list[str], mask_names: list[str], wrapping: str, way: str
) -> None:
    """The same functions passed to torch, in float32, forward."""
    inputs = [x.detach() for x in tensors(dtype=torch.float32)]
    # On a CPU torch refuses captured tensors that require gradients.
    parameters = Parameters.of(HEADS, N, torch.float32).detached
    mod = WRAPPINGS[wrapping](functions.score_mod(score_names, parameters))
    fn = WRAPPINGS[wrapping](functions.mask_mod(["causal", *mask_names], parameters))
    with torch.no_grad():
        expected = flex(inputs, mod, create_block_mask(of_four(fn), 2, HEADS, N, N, device="cpu"))
        out = attend_in(way, masks.from_mod(fn))(*inputs, score_mod=mod)
    seen = torch.isfinite(expected)
    same(out[seen], expected[seen], 2e-5)


def functions_in(*ways: str) -> Callable[..., Any]:
    """Decorate a test with drawn arguments of `compare_compiled` after its backend."""
    way = st.sampled_from(ways)
    return given(drawn=st.tuples(score_bodies, mask_bodies, wrappings, way, st.booleans(), numbers))


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@functions_in("dense", "tiled", "auto", "ring")
def test_compiled_functions_equal_the_reference(drawn: tuple[Any, ...]) -> None:
    """Functions in one graph of torch.compile.

    Closures are created outside of the graph or inside.
    """
    compare_compiled("aot_eager", *drawn)


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@functions_in("dense", "tiled", "auto", "ring")
def test_more_compiled_functions_equal_the_reference(drawn: tuple[Any, ...]) -> None:
    compare_compiled("aot_eager", *drawn)


@pytest.mark.slow
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@functions_in("dense", "tiled")
def test_functions_compiled_by_inductor_equal_the_reference(drawn: tuple[Any, ...]) -> None:
    compare_compiled("inductor", *drawn)


def compare_compiled(
    backend: str,
    score_names: list[str],
    mask_names: list[str],
    wrapping: str,
    way: str,
    inside: bool,
    number: float,
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
