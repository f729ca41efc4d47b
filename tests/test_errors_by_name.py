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

# Each constructor with arguments that it accepts.
CONSTRUCTORS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (masks.window, {"left": 4, "right": 4, "dilation": 1}),
    (masks.segments, {"length": 4}),
    (masks.congruent, {"modulus": 4, "offset": 1, "period": 8}),
    (masks.documents, {"lengths": (3, 4)}),
    (masks.sinks, {"count": 4}),
    (masks.prefix, {"count": 4}),
    (masks.global_tokens, {"count": 4}),
    (masks.dilated_blocks, {"block": 4, "stride": 2}),
    (masks.neighborhood, {"grid": (4, 4), "radius": 1, "dilation": 1, "causal": False, "edges": "cut"}),
    (masks.tiles, {"pairs": ((0, 0),), "block": 4, "columns": 3}),
    (masks.padding, {"name": "padding"}),
    (orders.residue, {"rate": 2, "period": 8}),
    (cd.longnet, {"segment_lengths": (4, 8), "dilation_rates": (1, 2), "causal": False, "offsets": "cyclic", "heads": "all"}),
    (cd.local_window, {"left": 4, "right": 4, "causal": False, "dilation": 1}),
    (cd.hilbert_window, {"grid": (4, 4), "radius": 1, "edges": "cut"}),
    (cd.block_sparse, {"density": 0.5, "kind": "local", "block": 4, "tokens": 64, "causal": False}),
    (Branch, {"mask": CAUSAL, "heads": (0, 2), "order": orders.identity()}),
    (
        partial(cd.plan, CAUSAL),
        {
            "q_shape": (1, 2, 8, 4), "kv_heads": 2, "kv_len": 8, "value_dim": 4, "dtype": torch.float32, "device": "cpu",
            "training": False, "lowering": "auto", "q_offset": 0,
        },
    ),
]  # fmt: skip
WRONG = st.one_of(
    st.integers(-(2**80), 2**80),
    st.sampled_from(
        [
            -1,
            0,
            2**31,
            2**60,
            2**60 + 1,
            2**62,
            2**63,
            True,
            None,
            (),
            [],
            {},
            (True,),
            (None, 1),
            ((1,),),
        ]
    ),
    st.sampled_from(
        [
            1.5,
            float("nan"),
            float("inf"),
            1j,
            b"4",
            object,
            np.float32(2),
            np.array(3),
            np.array([1.5]),
            np.int64(-3),
        ]
    ),
    st.sampled_from(
        [torch.tensor(2), torch.tensor(2.5), torch.tensor([[1]]), torch.tensor(True), CAUSAL, len]
    ),
    st.text(max_size=4),
    st.lists(st.integers(-2, 2**70), max_size=4).map(tuple),
)


@settings(max_examples=600)
@given(data=st.data())
def test_wrong_values_are_refused_by_name(data: st.DataObject) -> None:
    """Whatever comes for an argument is accepted, or refused by an error of ours that names an argument."""
    make, good = data.draw(st.sampled_from(CONSTRUCTORS))
    name = data.draw(st.sampled_from(sorted(good)))
    value = data.draw(WRONG)
    try:
        make(**{**good, name: value})
    except (TypeError, ValueError) as error:
        text = str(error)
        # The lengths of two sequences, windows, heads and shapes are said of each other.
        assert any(argument in text for argument in (name, *good)), text
        assert "\n" not in text
