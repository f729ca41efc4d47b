"""Edge cases of calls.

Scales, queries past the last key, sinks and scores of -inf, and modes of the caller.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks
from compiled_dilated.lowerings.flex import running
from tests.comparing import assert_close, exact_results, leaves, normal, results_and_gradients
from tests.support.attention import STRIDED, WAYS, way_name

CAUSAL_LONGNET = cd.longnet((8, 16), (1, 2), causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5])
@pytest.mark.parametrize(
    "program", [masks.causal(), CAUSAL_LONGNET, masks.window(4), masks.full()], ids=str
)
@pytest.mark.parametrize("way", [*WAYS, STRIDED], ids=way_name)
def test_scales_of_any_sign(
    way: dict[str, Any], program: Program | masks.Mask, scale: float
) -> None:
    if way == STRIDED and program == masks.window(4):
        pytest.skip("strided refuses masks that are not regular blocks")
    inputs = leaves(*normal((2, 4, 21, 8), (2, 2, 21, 8), (2, 2, 21, 4)))
    results = results_and_gradients(cd.compile(program, **way), inputs, scale=scale)

    def reference(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return cd.reference(program, q, k, v, **options)

    assert_close(results, results_and_gradients(reference, inputs, scale=scale))


@pytest.mark.parametrize("scale", [0.4, -0.4])
def test_decoding_of_one_query_uses_its_scale(scale: float) -> None:
    """Calls after the first are not checked again."""
    q, k, v = normal((1, 2, 1, 8), (1, 2, 40, 8), (1, 2, 40, 8))
    mask = masks.causal() & masks.window(9)
    attend = cd.compile(mask)
    for position in (30, 31, 32):
        out = attend(q, k, v, q_offset=position, scale=scale)
        assert_close([out], exact_results(mask, q, k, v, q_offset=position, scale=scale))


def test_a_scale_that_is_a_tensor_is_learned() -> None:
    inputs = leaves(*normal((1, 2, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8)))
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    results = results_and_gradients(cd.compile(masks.causal()), inputs, [scale], scale=scale)

    def reference(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return cd.reference(masks.causal(), q, k, v, **options)

    assert_close(results, results_and_gradients(reference, inputs, [scale], scale=scale))


@pytest.mark.parametrize("lowering", ["auto", "strided"])
@pytest.mark.parametrize(
    ("program", "q_shape", "k_shape", "q_offset"),
    [
        (
            cd.longnet((45, 49), (7, 7), causal=True, offsets="grouped"),
            (1, 4, 17, 4),
            (1, 1, 43, 4),
            27,
        ),
        (cd.longnet((2048,), (4,), causal=True), (1, 4, 512, 4), (1, 4, 1530, 4), 1024),
    ],
    ids=["grouped", "long"],
)
def test_queries_past_the_last_key(
    lowering: str, program: Program, q_shape: Any, k_shape: Any, q_offset: int
) -> None:
    q, k, v = normal(q_shape, k_shape, k_shape)
    results = cd.compile(program, lowering=lowering)(q, k, v, q_offset=q_offset, return_lse=True)
    assert_close(results, exact_results(program, q, k, v, q_offset=q_offset, return_lse=True))


@settings(max_examples=60)
@given(
    segments=st.lists(st.tuples(st.integers(3, 60), st.integers(1, 9)), min_size=1, max_size=2),
    grouped=st.booleans(),
    heads=st.sampled_from([(4, 4), (4, 1), (6, 3)]),
    lengths=st.tuples(st.integers(2, 30), st.integers(1, 50), st.integers(0, 50)),
    lowering=st.sampled_from(["auto", "strided", "tiled", "dense"]),
)
def test_queries_at_any_offset_of_residue_classes(
    segments: list[tuple[int, int]],
    grouped: bool,
    heads: tuple[int, int],
    lengths: tuple[int, int, int],
    lowering: str,
) -> None:
    """Each head has its own residue class."""
    q_len, kv_len, q_offset = lengths
    segment_lengths, rates = zip(*segments, strict=True)
    offsets = "grouped" if grouped else "cyclic"
    program = cd.longnet(segment_lengths, rates, causal=True, offsets=offsets)
    q, k, v = normal((1, heads[0], q_len, 4), (1, heads[1], kv_len, 4), (1, heads[1], kv_len, 4))
    inputs = leaves(q, k, v)

    def reference(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return cd.reference(program, q, k, v, **options)

    attend = cd.compile(program, lowering=lowering)
    results = results_and_gradients(attend, inputs, q_offset=q_offset)
    assert_close(results, results_and_gradients(reference, inputs, q_offset=q_offset))


def test_sinks_of_minus_infinity_beside_rows_that_see_nothing() -> None:
    """The first rows see nothing, and a sink of -inf adds nothing.

    This is left padding.
    """
    inputs = leaves(*normal((1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4)))
    sinks = torch.tensor([-math.inf, 0.5], dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[True, True, True, False, False, False]])
    program = masks.causal() & masks.padding()

    def reference(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return cd.reference(program, q, k, v, **options)

    options = {"sink_logits": sinks, "data": {"padding": padding}}
    results = results_and_gradients(cd.compile(program), inputs, [sinks], **options)
    assert_close(results, results_and_gradients(reference, inputs, [sinks], **options))
    assert all(grad.isfinite().all() for grad in results[2:])


@pytest.mark.parametrize("way", [*WAYS, STRIDED], ids=way_name)
def test_score_mods_of_minus_infinity(way: dict[str, Any]) -> None:
    """Rows of scores of -inf are 0, with lse -inf.

    Their gradients are 0.
    """
    inputs = leaves(*normal((1, 2, 12, 4), (1, 2, 12, 4), (1, 2, 12, 4)))

    def hides_early_rows(
        score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
    ) -> Tensor:
        return torch.where(q_idx > 4, score, -math.inf)

    def reference(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return cd.reference(masks.causal(), q, k, v, **options)

    attend = cd.compile(masks.causal(), **way)
    results = results_and_gradients(attend, inputs, score_mod=hides_early_rows)
    assert_close(results, results_and_gradients(reference, inputs, score_mod=hides_early_rows))


@pytest.mark.parametrize("lowering", ["strided", "tiled"])
def test_keys_in_many_batches_are_merged(lowering: str) -> None:
    """Beyond 2048 keys a query's tiles come in several batches."""
    q, k, v = normal((1, 1, 300, 4), (1, 1, 5000, 4), (1, 1, 5000, 4))
    program = ~masks.window(2, 0) if lowering == "tiled" else masks.full()
    out = cd.compile(program, lowering=lowering)(q, k, v, q_offset=4700)
    assert_close([out], exact_results(program, q, k, v, q_offset=4700))


# Data and block masks


def test_data_of_batch_one_serve_all_entries() -> None:
    q, k, v = normal((3, 2, 20, 4), (3, 2, 20, 4), (3, 2, 20, 4))
    ids = torch.arange(20)[None] // 5
    program = masks.documents(ids="ids")
    expected = exact_results(program, q, k, v, data={"ids": ids.expand(3, 20)})
    assert_close(exact_results(program, q, k, v, data={"ids": ids}), expected)
    for way in WAYS:
        assert_close([cd.compile(program, **way)(q, k, v, data={"ids": ids})], expected)
    assert cd.block_mask(program, 20, 20, data={"ids": ids}).kv_indices.shape[0] == 1


# Inductor takes seconds for each kernel. In every run it compiles the block masks of
# test_block_masks_kernels.py, and FlexAttention in test_against_reference.py.
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiler of FlexAttention, also for the flex lowering."""
    name: str = request.param
    torch._dynamo.reset()
    compiled = partial(torch.compile, dynamic=True, fullgraph=True, backend=name)
    monkeypatch.setattr(running, "_compiled", partial(compiled, running._flex))
    monkeypatch.setattr(running, "_KERNELS", type(running._KERNELS)(most=8))
    return name


def test_block_masks_of_data_compile(backend: str) -> None:
    mask = masks.documents(ids="ids") & masks.causal()
    ids = torch.randint(0, 3, (2, 200), generator=torch.Generator().manual_seed(0))
    block_mask = cd.block_mask(mask, 200, 200, data={"ids": ids}, tile=64)
    assert block_mask.kv_num_blocks.shape[0] == 2
    q = torch.randn(2, 2, 200, 16, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(flex_attention, dynamic=True, backend=backend)
    out = compiled(q, q, q, block_mask=block_mask)
    torch.testing.assert_close(
        out.double(), cd.reference(mask, q, q, q, data={"ids": ids}), rtol=1e-5, atol=1e-5
    )


@pytest.mark.usefixtures("backend")
def test_flex_with_lookup_tables_in_several_branches() -> None:
    q, k, v = (x.float() for x in normal((2, 2, 40, 16), (2, 2, 40, 16), (2, 2, 40, 16)))
    documents = masks.documents(lengths=(7, 20, 13))
    tiles = masks.tiles([(0, 0), (1, 2), (3, 1)], 8)
    program = Program((Branch(documents), Branch(tiles), Branch(masks.window(5))))
    out = cd.compile(program, lowering="flex")(q, k, v)
    torch.testing.assert_close(out.double(), cd.reference(program, q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("backend")
def test_flex_with_functions_that_capture_tensors() -> None:
    q, k, v = (x.float() for x in normal((2, 2, 40, 16), (2, 2, 40, 16), (2, 2, 40, 16)))
    table = torch.randn(40, 40, generator=torch.Generator().manual_seed(2))
    length = torch.tensor(30)
    program = masks.from_mod(lambda b, h, i, j: (j <= i) & (j < length))
    options: dict[str, Any] = {"score_mod": lambda s, b, h, i, j: s + table[i, j]}
    out = cd.compile(program, lowering="flex")(q, k, v, **options)
    torch.testing.assert_close(
        out.double(), cd.reference(program, q, k, v, **options), rtol=1e-5, atol=1e-5
    )


# Layouts


def test_swapped_heads_and_tokens_raise_a_warning() -> None:
    q = torch.zeros(1, 512, 8, 4)
    module = cd.DilatedAttention((4,), (1,))
    with pytest.warns(UserWarning, match="512 heads of 8 tokens.*DilatedAttention takes") as caught:
        cd.compile(masks.causal())(q, q, q)
    assert [warning.filename for warning in caught] == [__file__], "not one, or elsewhere"
    with pytest.warns(UserWarning, match=r"512 heads of 8 tokens.*compile\(program\)") as caught:
        module(*[q.transpose(1, 2)] * 3)
    assert [warning.filename for warning in caught] == [__file__], "not one, or elsewhere"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cd.compile(masks.causal())(q.transpose(1, 2), q.transpose(1, 2), q.transpose(1, 2))
