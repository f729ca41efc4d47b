"""What wrapping does not compute is refused, never left out.

The error has the name and the source line.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.programs import as_program
from compiled_dilated.wrapping.layers import sees_later
from tests.support.wrapped import WIDTH, Bare, Multihead, Net, Q, X, wrapped

# The model, attention=, and the error with its message.
REFUSED: dict[str, tuple[nn.Module, Any, type[Exception], str]] = {
    "no attention": (
        nn.Linear(WIDTH, WIDTH),
        None,
        ValueError,
        "Linear called no scaled_dot_product_attention",
    ),
    "dropout": (
        Net(dropout=0.1),
        None,
        NotImplementedError,
        r"dropout of attention weights \(0.1\) is not computed \(File .*wrapped",
    ),
    "weights": (
        Multihead(weights=True),
        None,
        NotImplementedError,
        r"weights as a result are not made \(File .*wrapped",
    ),
    "sees later keys": (
        Net(),
        cd.local_window(9),
        ValueError,
        "blocks.0 is causal, and its program shows later keys",
    ),
    "pattern": (
        Net(),
        {"layers.*": masks.causal()},
        ValueError,
        r"no layer matches 'layers.\*'. The layers: blocks, blocks.0",
    ),
    "function": (
        Net(),
        lambda layer: 3,
        TypeError,
        "attention of blocks.0 must be a program, a mask or None; got int 3",
    ),
    "function, of the model itself": (
        Bare(),
        lambda layer: 3,
        TypeError,
        "attention of scaled_dot_product_attention must be a program, a mask or None; got int 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused(case: str) -> None:
    model, attention, error, message = REFUSED[case]
    with pytest.raises(error, match=message):  # noqa: PT012
        wrapped_model, _ = wrapped(model.train(), attention)
        wrapped_model(X)


@pytest.mark.parametrize(
    "program",
    [
        masks.causal() | masks.global_tokens(positions=(5000,)),
        masks.congruent(4096, 4000),
        masks.causal() | masks.tiles([(40, 41)], 64),
        masks.from_mod(lambda b, h, q, kv: kv <= q + 1),
    ],
    ids=repr,
)
def test_later_keys_at_any_position_are_seen(program: masks.Mask) -> None:
    assert sees_later(as_program(program), 4)
    assert not sees_later(as_program(program & masks.causal()), 4)


def test_bad_arguments_are_refused_at_once() -> None:
    message = "attention must be a program, a mask, a function of a layer or"
    with pytest.raises(TypeError, match=message):
        cd.compile(Net(), attention=3)
    with pytest.raises(ValueError, match="memory_budget must be a number and one of B, KiB"):
        cd.compile(Net(), attention=None, memory_budget="much")
    with pytest.raises(ValueError, match="attention, memory_budget and dynamic are for models"):
        cd.compile(masks.causal(), attention=masks.causal())  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="Linear has no sites; wrap it first"):
        cd.sites(nn.Linear(2, 2))


def test_export_and_eager_runs_would_leave_the_program_out_and_are_refused() -> None:
    model, _ = wrapped(Net(), masks.causal() & masks.window(9))
    expected = model(X)
    with pytest.raises(Exception, match="would leave that out"):
        torch.export.export(model, (X,))
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(RuntimeError, match="without compiling it"),
    ):
        model(X)
    # A compiler around it runs it as it is.
    assert torch.equal(torch.compile(model, backend="eager")(X), expected)


class PartlyDisabled(nn.Module):
    """A second call that torch.compile skips."""

    @torch.compiler.disable
    def second(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q)

    def forward(self, q: Tensor) -> Tensor:
        return self.second(F.scaled_dot_product_attention(q, q, q))


def test_attention_behind_a_graph_break_is_refused() -> None:
    model, _ = wrapped(PartlyDisabled(), masks.window(3))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(Q[0])
