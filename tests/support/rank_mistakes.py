"""Scenarios of real ranks: invalid or different calls raise everywhere."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import compiled_dilated as cd
from compiled_dilated import masks
from tests.cases import both_data
from tests.support.rank_failures import PROMPT_S
from tests.support.rank_inputs import LONGNET, Tensors, check, inputs, leaves, positions_of


def refuses(message: str, call: Callable[[], object]) -> None:
    """Check that a call soon raises a ValueError of one line.

    The error contains the text.
    """
    start = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert time.monotonic() - start < PROMPT_S


def refusals(group: dist.ProcessGroup) -> None:
    """Calls that differ are refused on all ranks.

    They are refused before data moves, and the group still works afterwards.
    """
    is_last = group.rank() == group.size() - 1

    def shards(rows: int = 20, dtype: torch.dtype = torch.float64, **options: int) -> Tensors:
        q, k, v = inputs(40, dtype, **options)
        return q[:, :, :rows], k[:, :, :rows], v[:, :, :rows]

    # Programs, layouts and functions.
    rule = "in the program, the layout or a function"
    attend = cd.compile(masks.window(3) if is_last else masks.causal(), mesh=group)
    refuses(f"differ from rank {group.rank()} {rule}", lambda: attend(*shards()))
    layout = "zigzag" if is_last else "striped"
    laid_out = cd.compile(masks.causal(), mesh=group, layout=layout)
    refuses(rule, lambda: laid_out(*shards()))
    causal = cd.compile(masks.causal(), mesh=group, layout="contiguous")
    factor = 1.0 + is_last
    refuses(rule, lambda: causal(*shards(), score_mod=lambda s, b, h, i, j: s * factor))
    bias = torch.full((40, 40), float(is_last))
    refuses(
        "in what the score_mod captures: ",
        lambda: causal(*shards(), score_mod=lambda s, b, h, i, j: s + bias[i, j]),
    )
    # Tensors and options.
    dtype = torch.float32 if is_last else torch.float64
    refuses("in dtype: ", lambda: causal(*shards(dtype=dtype)))
    refuses("in the scale: ", lambda: causal(*shards(), scale=0.5 if is_last else 0.25))
    refuses(
        "the ranks of a ring must compute the same; ranks ",
        lambda: causal(*shards(heads=8 if is_last else 4)),
    )
    refuses("in key heads: ", lambda: causal(*shards(kv_heads=4 if is_last else 2)))
    refuses("in batch: ", lambda: causal(*shards(batch=1 if is_last else 2)))
    # Rows: of 64 tokens the first of three ranks must have ceil(64 / 3).
    wrong_rows = (
        "rank 0 of 3 must hold 22 of the 64 tokens under the layout contiguous; got 20. "
        "Take the rows that "
    )
    refuses(wrong_rows, lambda: causal(*shards(24 if is_last else 20)))
    check(LONGNET, inputs(131), group, "auto")


def wrong_options(right: dict[str, Any], own: torch.Tensor) -> list[dict[str, Any]]:
    """Changes of a call's arguments, each a mistake.

    right: the arguments of a correct call, by name.
    own: positions of this rank's tokens.
    """
    q, k, data = right["q"], right["k"], right["data"]
    return [
        {"q": q[0]},
        {"q": 3},
        {"q": q[..., :7]},
        {"q": q.float()},
        {"k": k[:, :1]},
        {"k": k[:, :, :-1]},
        {"k": k[:1]},
        {"data": None},
        {"data": {"ids": data["ids"]}},
        {"data": data | {"ids": data["ids"].float()}},
        {"data": data | {"ids": data["ids"][:, own]}},
        {"data": data | {"ids": data["ids"] + 1}},
        {"data": data | {"padding": data["padding"].logical_not()}},
        {"scale": math.nan},
        {"scale": 0.77},
        {"q_offset": 2},
        {"q_offset": -1},
        {"return_lse": "no"},
        {"sink_logits": torch.zeros(3)},
        {"score_mod": 3},
        {"score_mod": lambda s, b, h, i, j: s if i > j else -s},
        {"score_mod": lambda s, b, h, i, j: s * 2},
        {"is_causal": True},
    ]


def mistakes(group: dist.ProcessGroup) -> None:
    """A mistake on one rank raises on all, with equal words.

    No rank waits.
    """
    tokens = 10 * group.size()
    complete = inputs(tokens)
    program = masks.causal() & masks.documents(ids="ids") & masks.padding()
    data = both_data(2, tokens)
    data = {"ids": data["documents"], "padding": data["padding"]}
    attend = cd.compile(program, mesh=group, layout="contiguous")
    own = positions_of(group, program, complete, "contiguous")
    right: dict[str, Any] = dict(zip("qkv", leaves(complete, own), strict=True)) | {"data": data}
    out = cd.reference(program, *complete, data=data)
    assert isinstance(out, torch.Tensor)
    expected = out[:, :, own]
    generator = torch.Generator().manual_seed(group.size())
    for number, change in enumerate(wrong_options(right, own)):
        culprit = int(torch.randint(group.size(), (), generator=generator))
        options = right | (change if group.rank() == culprit else {})
        tensors = [options.pop(name) for name in "qkv"]
        with pytest.raises((TypeError, ValueError)) as raised:
            attend(*tensors, **options)
        # All ranks report the culprit's error, or name the ranks that differ from them.
        messages: list[str] = [""] * group.size()
        dist.all_gather_object(messages, str(raised.value), group=group)
        errors = {
            message.split("cannot compute: ")[-1]
            for message in messages
            if "differ from rank" not in message
        }
        assert len(errors) <= 1, (number, messages)
        # The group still works.
        out = attend(*[right[name] for name in "qkv"], data=data)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
