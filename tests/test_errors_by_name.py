"""Wrong values of constructors' arguments are refused by the argument's name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compiled_dilated as cd
from compiled_dilated import Branch, masks, orders
from tests.support.errors_of_programs import CAUSAL

PLAN = {"q_shape": (1, 2, 8, 4), "kv_heads": 2, "kv_len": 8, "value_dim": 4, "q_offset": 0}
PLAN |= {"dtype": torch.float32, "device": "cpu", "training": False, "lowering": "auto"}
GRID = {"grid": (4, 4), "radius": 1, "edges": "cut"}
LONGNET = {"segment_lengths": (4, 8), "dilation_rates": (1, 2), "causal": False}
# Constructors with arguments that they accept.
CONSTRUCTORS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (masks.window, {"left": 4, "right": 4, "dilation": 1}),
    (masks.segments, {"length": 4}),
    (masks.congruent, {"modulus": 4, "offset": 1, "period": 8}),
    (masks.documents, {"lengths": (3, 4)}),
    (masks.sinks, {"count": 4}),
    (masks.prefix, {"count": 4}),
    (masks.global_tokens, {"count": 4}),
    (masks.dilated_blocks, {"block": 4, "stride": 2}),
    (masks.neighborhood, {**GRID, "dilation": 1, "causal": False}),
    (masks.tiles, {"pairs": ((0, 0),), "block": 4, "columns": 3}),
    (masks.padding, {"name": "padding"}),
    (orders.residue, {"rate": 2, "period": 8}),
    (cd.longnet, {**LONGNET, "offsets": "cyclic", "heads": "all"}),
    (cd.local_window, {"left": 4, "right": 4, "causal": False, "dilation": 1}),
    (cd.hilbert_window, GRID),
    (cd.block_sparse, {"density": 0.5, "kind": "local", "block": 4, "tokens": 64, "causal": False}),
    (Branch, {"mask": CAUSAL, "heads": (0, 2), "order": orders.identity()}),
    (partial(cd.plan, CAUSAL), PLAN),
]
EDGES = [-1, 0, 2**31, 2**60, 2**60 + 1, 2**62, 2**63]
SEQUENCES = [(), [], {}, (True,), (None, 1), ((1,),), np.array(3), np.array([1.5])]
NUMBERS = [True, 1.5, float("nan"), float("inf"), 1j, np.float32(2), np.int64(-3)]
TENSORS = [torch.tensor(2), torch.tensor(2.5), torch.tensor([[1]]), torch.tensor(True)]
WRONG = st.one_of(
    st.integers(-(2**80), 2**80),
    st.sampled_from(EDGES),
    st.sampled_from(SEQUENCES),
    st.sampled_from(NUMBERS),
    st.sampled_from(TENSORS),
    st.sampled_from([None, b"4", object, CAUSAL, len]),
    st.text(max_size=4),
    st.lists(st.integers(-2, 2**70), max_size=4).map(tuple),
)


@settings(max_examples=200)
@given(data=st.data())
def test_wrong_values_are_refused_by_name(data: st.DataObject) -> None:
    """Any value of an argument is accepted, or refused by name."""
    construct, arguments = data.draw(st.sampled_from(CONSTRUCTORS))
    name = data.draw(st.sampled_from(sorted(arguments)))
    value = data.draw(WRONG)
    try:
        construct(**{**arguments, name: value})
    except (TypeError, ValueError) as error:
        text = str(error)
        # An error about two arguments, as of lengths that must agree, may name the second.
        assert any(argument in text for argument in arguments), text
        assert "\n" not in text
