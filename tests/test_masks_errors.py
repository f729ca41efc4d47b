"""Masks: bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compiled_dilated import masks
from tests.strategies import every_third


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: masks.window(-1), ValueError, "left must be at least 0; got -1"),
        (
            lambda: masks.window(2.5),  # type: ignore[arg-type]
            TypeError,
            "left must be an integer; got float 2.5",
        ),
        (lambda: masks.window(True), TypeError, "left must be an integer; got bool"),
        (lambda: masks.window(2, -1), ValueError, "right must be at least 0"),
        (lambda: masks.window(2, dilation=0), ValueError, "dilation must be at least 1"),
        (lambda: masks.segments(0), ValueError, "length must be at least 1"),
        (lambda: masks.congruent(0), ValueError, "modulus must be at least 1"),
        (lambda: masks.congruent(3, 3), ValueError, "offset must be below the modulus 3; got 3"),
        (lambda: masks.congruent(3, (0, 4)), ValueError, "offset must be below the modulus 3"),
        (
            lambda: masks.congruent(3, "round"),
            ValueError,
            "offset must be one of 'cyclic', 'grouped'; got 'round'",
        ),
        (lambda: masks.congruent(3, 0, period=0), ValueError, "period must be at least 1"),
        (lambda: masks.documents(), ValueError, "either ids .* or lengths"),
        (lambda: masks.documents(ids="a", lengths=(1,)), ValueError, "either ids .* or lengths"),
        (
            lambda: masks.documents(ids=torch.zeros(3)),  # type: ignore[arg-type]
            TypeError,
            "ids must be the name of a data tensor; got Tensor",
        ),
        (lambda: masks.documents(lengths=()), ValueError, "lengths is empty"),
        (
            lambda: masks.documents(lengths=5),  # type: ignore[arg-type]
            TypeError,
            "lengths must be a sequence of integers",
        ),
        (
            lambda: masks.padding(torch.zeros(3)),  # type: ignore[arg-type]
            TypeError,
            "name must be the name of a data tensor; got Tensor",
        ),
        (lambda: masks.sinks(-1), ValueError, "count must be at least 0"),
        (lambda: masks.neighborhood((4, 4, 4, 4), 1), ValueError, "grid must have 1 to 3 axes"),
        (
            lambda: masks.neighborhood(16, 1),  # type: ignore[arg-type]
            TypeError,
            "grid must be a sequence of integers",
        ),
        (
            lambda: masks.neighborhood((4, 4), (1, 1, 1)),
            ValueError,
            "radius must be one number or one per axis",
        ),
        (
            lambda: masks.neighborhood((4, 4), 1, edges="wrap"),
            ValueError,
            "edges must be one of 'cut', 'shift'; got 'wrap'",
        ),
        (
            lambda: masks.neighborhood((4, 4), 1, causal=(True,)),
            ValueError,
            "causal must be a bool or one bool per axis",
        ),
        (
            lambda: masks.neighborhood((4, 4), 1, causal=None),  # type: ignore[arg-type]
            ValueError,
            "causal must be a bool or one bool per axis",
        ),
        (
            lambda: masks.tiles([(1, 2, 3)]),  # type: ignore[list-item]
            ValueError,
            "every tile must be a .query tile, key tile. pair",
        ),
        (lambda: masks.tiles([(0, -1)]), ValueError, "must be at least 0"),
        (
            lambda: masks.tiles("ab"),  # type: ignore[arg-type]
            TypeError,
            "pairs must be .query tile, key tile. pairs",
        ),
        (lambda: masks.tiles([(0, 3)], columns=2), ValueError, "columns must be at least 4"),
        (
            lambda: masks.from_mod(3),  # type: ignore[arg-type]
            TypeError,
            "fn must be a function of",
        ),
        (
            lambda: masks.from_mod(every_third, within=3),  # type: ignore[arg-type]
            TypeError,
            "within must be a mask; got int",
        ),
        (
            lambda: masks.from_mod(every_third).check(range(10**6), 10**6),
            ValueError,
            "from_mod.fn, within=mask.",
        ),
        (
            lambda: masks.neighborhood((4, 4), 1).check(range(17), 4),
            ValueError,
            "speaks of a grid of 16 tokens; got positions up to 17",
        ),
        (
            lambda: (masks.causal() & masks.neighborhood((4, 4), 1)).check(range(17), 4),
            ValueError,
            "grid of 16 tokens",
        ),
    ],
)
def test_bad_input(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
