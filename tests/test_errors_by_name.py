"""Wrong values of constructors' arguments are refused by the argument's name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compiled_dilated as cd
from compiled_dilated import Branch, masks, orders
from tests.support.errors_of_programs import CAUSAL

Accepts = Callable[[Any], bool]
MOST = 2**60


def number_of(value: Any) -> int | None:
    """An integer of Python, numpy or torch; None for other values."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind == "i":
        return int(value)
    if isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.numel() == 1:
        return int(value)
    return None


def whole(least: int, most: int = MOST) -> Accepts:
    """Integers from `least` to `most`."""

    def accepts(value: Any) -> bool:
        number = number_of(value)
        return number is not None and least <= number <= most

    return accepts


def several(
    least: int, *counts: int, total: Callable[[Any], int] = max, most: int = MOST
) -> Accepts:
    """Sequences of integers.

    counts: how many there may be; any number if none is given.
    total: of the integers, which is `most` at most.
    """

    def accepts(value: Any) -> bool:
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            return False
        if getattr(value, "ndim", 1) == 0:
            return False
        found = [number_of(number) for number in value]
        numbers = [number for number in found if number is not None]
        is_right = len(numbers) == len(found) and (len(numbers) in counts or not counts)
        return is_right and bool(numbers) and min(numbers) >= least and total(numbers) <= most

    return accepts


def one_of(*values: Any) -> Accepts:
    """Some values, by type too: 1 is not True."""
    return lambda value: any(type(value) is type(x) and value == x for x in values)


def either(*kinds: Accepts) -> Accepts:
    """Values of several kinds."""
    return lambda value: any(accepts(value) for accepts in kinds)


def is_heads(value: Any) -> bool:
    """Whether a value is (start, stop) or a share."""
    if isinstance(value, str):
        return re.fullmatch("[0-9]+/[0-9]+", value) is not None
    return isinstance(value, tuple) and len(value) == 2 and {type(x) for x in value} == {int}


def is_empty(value: Any) -> bool:
    """Whether a value lists nothing."""
    return isinstance(value, list | tuple | dict) and not value


def is_density(value: Any) -> bool:
    """Whether a value is a number above 0, and at most 1."""
    return type(value) in (int, float) and 0 < value <= 1


def is_text(value: Any) -> bool:
    """Whether a value is a str."""
    return isinstance(value, str)


def is_device(value: Any) -> bool:
    """Whether a value is the name of a device."""
    return isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda", "mps", "xpu", "meta")


NONE, FLAG = one_of(None), one_of(True, False)
GRID = {
    "grid": ((4, 4), several(1, 1, 2, 3, total=math.prod)),
    "radius": (1, either(whole(0), several(0, 2))),
    "edges": ("cut", one_of("cut", "shift")),
}
PLAN = partial(cd.plan, CAUSAL)
LENGTH = (4, whole(1))
COUNT = (4, whole(0))
# Constructors; by argument a value that is accepted, and what else may be.
CONSTRUCTORS: list[tuple[Callable[..., Any], dict[str, tuple[Any, Accepts]]]] = [
    (
        masks.window,
        {"left": COUNT, "right": (4, either(NONE, whole(0))), "dilation": (1, whole(1))},
    ),
    (masks.segments, {"length": LENGTH}),
    (
        masks.congruent,
        {
            "modulus": (4, whole(2)),
            "offset": (1, either(whole(0, 3), several(0, most=3))),
            "period": (8, either(NONE, whole(1))),
        },
    ),
    (masks.documents, {"lengths": ((3, 4), several(0, total=sum))}),
    (masks.sinks, {"count": COUNT}),
    (masks.prefix, {"count": COUNT}),
    (masks.global_tokens, {"count": COUNT}),
    (masks.dilated_blocks, {"block": LENGTH, "stride": (2, whole(1))}),
    (
        masks.neighborhood,
        {**GRID, "dilation": (1, either(whole(1), several(1, 2))), "causal": (False, FLAG)},
    ),
    (
        masks.tiles,
        {
            "pairs": (((0, 0),), either(is_empty, one_of(((0, 0),)))),
            "block": (4, whole(1, MOST // 3)),
            "columns": (3, either(NONE, whole(1, MOST // 4))),
        },
    ),
    (masks.padding, {"name": ("padding", is_text)}),
    (orders.residue, {"rate": (2, whole(1)), "period": (8, either(NONE, whole(1)))}),
    (
        cd.longnet,
        {
            "segment_lengths": ((4, 8), several(1, 2)),
            "dilation_rates": ((1, 2), several(1, 2)),
            "causal": (False, FLAG),
            "offsets": ("cyclic", one_of("cyclic", "grouped")),
            "heads": ("all", one_of("all", "split")),
        },
    ),
    (
        cd.local_window,
        {
            "left": COUNT,
            "right": (4, either(NONE, whole(0))),
            "causal": (False, one_of(False)),
            "dilation": (1, whole(1)),
        },
    ),
    (
        cd.hilbert_window,
        {**GRID, "grid": ((4, 4), several(1, 2, 3, total=math.prod, most=2**31))},
    ),
    (
        cd.block_sparse,
        {
            "density": (0.5, is_density),
            "kind": ("local", one_of("local", "global_local", "dilated")),
            "block": LENGTH,
            "tokens": (64, whole(1)),
            "causal": (False, FLAG),
        },
    ),
    (
        Branch,
        {
            "mask": (CAUSAL, one_of(CAUSAL)),
            "heads": ((0, 2), either(NONE, is_heads)),
            "order": (orders.identity(), one_of(orders.identity())),
        },
    ),
    (
        PLAN,
        {
            "q_shape": ((1, 2, 8, 4), several(1, 4)),
            "kv_heads": (2, either(NONE, whole(1, 2))),
            "kv_len": (8, either(NONE, whole(1))),
            "value_dim": (4, either(NONE, whole(1))),
            "q_offset": (0, whole(0)),
            "dtype": (torch.float32, one_of(torch.float32)),
            "device": ("cpu", is_device),
            "training": (False, FLAG),
            "lowering": ("auto", one_of("auto", "native")),
        },
    ),
]
# Errors about two arguments that name the other one.
OTHERS = {
    (masks.tiles, "block"): "pairs",
    (masks.tiles, "columns"): "pairs",
    (PLAN, "q_shape"): "heads",
}
EDGES = [-1, 0, 2**31, 2**60, 2**60 + 1, 2**62, 2**63]
SEQUENCES = [(), [], {}, (True,), (None, 1), ((1,),), np.array(3), np.array([1.5])]
NUMBERS = [True, 1.5, float("nan"), float("inf"), 1j, np.float32(2), np.int64(-3)]
TENSORS = [torch.tensor(2), torch.tensor(2.5), torch.tensor([[1]]), torch.tensor(True)]
LISTED = [*EDGES, *SEQUENCES, *NUMBERS, *TENSORS, None, b"4", "", "cpu", object, CAUSAL, len]
WRONG = st.one_of(
    st.integers(-(2**80), 2**80),
    st.sampled_from(LISTED),
    st.text(max_size=4),
    st.lists(st.integers(-2, 2**70), max_size=4).map(tuple),
)


def check(construct: Callable[..., Any], name: str, value: Any) -> None:
    """A value of an argument may be accepted, or is refused by name."""
    arguments = next(rows for built, rows in CONSTRUCTORS if built is construct)
    accepted = {argument: right for argument, (right, _) in arguments.items()}
    try:
        construct(**{**accepted, name: value})
    except (TypeError, ValueError) as error:
        text = str(error)
        names = {name, OTHERS.get((construct, name), name)}
        assert re.search(rf"\b({'|'.join(names)})\b", text), f"{name}={value!r}: {text}"
        assert "\n" not in text
    else:
        _, accepts = arguments[name]
        assert accepts(value), f"{name}={value!r} is accepted"


def test_every_listed_value_is_accepted_or_refused_by_name() -> None:
    for construct, arguments in CONSTRUCTORS:
        for name, (right, accepts) in arguments.items():
            assert accepts(right), name
            for value in LISTED:
                check(construct, name, value)


@settings(max_examples=200)
@given(data=st.data())
def test_wrong_values_are_refused_by_name(data: st.DataObject) -> None:
    construct, arguments = data.draw(st.sampled_from(CONSTRUCTORS))
    check(construct, data.draw(st.sampled_from(sorted(arguments))), data.draw(WRONG))
