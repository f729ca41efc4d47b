"""A new mask runs by every lowering, native code included.

It is added as in CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import compiled_dilated as cd
from compiled_dilated import masks, text
from compiled_dilated.masks import Mask
from compiled_dilated.masks.core import Data, Positions
from compiled_dilated.regions import PARTIAL, Regions, Verdicts


@dataclass(frozen=True, repr=False)
class Diagonals(Mask):
    """Keys whose distance to the query is a multiple of `step`."""

    step: int

    def __repr__(self) -> str:
        return f"diagonals({self.step})"

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        return (q - kv) % self.step == 0

    def classify(self, q: Regions, kv: Regions) -> Verdicts:
        return np.full(len(q), PARTIAL)

    @property
    def period(self) -> int | None:
        return 1


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention over distances that are multiples of 3."""
    positions = torch.arange(q.shape[2])
    distance = positions[:, None] - positions
    scores = (q @ k.mT) / q.shape[3] ** 0.5
    return scores.masked_fill((distance % 3 != 0) | (distance < 0), -torch.inf).softmax(dim=-1) @ v


@pytest.mark.parametrize("lowering", ["auto", "native", "tiled", "dense"])
@pytest.mark.parametrize("tokens", [1, 129, 300])
def test_a_new_mask_runs_forward_and_backward(
    lowering: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "NAMES", {**text.NAMES, "diagonals": Diagonals})
    mask = masks.causal() & Diagonals(3)
    inputs = [
        torch.randn(2, 2, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]
    out, expected = cd.compile(mask, lowering=lowering)(*inputs), dense_attention(*inputs)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, weights)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, weights))


def test_a_new_mask_is_native_without_an_operation_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text, "NAMES", {**text.NAMES, "diagonals": Diagonals})
    assert cd.plan(Diagonals(3), q_shape=(1, 2, 300, 8)).lowering == "native"


def test_a_new_mask_runs_as_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries before a block's first key have negative positions, which no tape has."""
    monkeypatch.setattr(text, "NAMES", {**text.NAMES, "diagonals": Diagonals})
    inputs = [torch.randn(1, 2, 64, 8, dtype=torch.float64) for _ in range(3)]
    out = cd.compile(Diagonals(3), ranks=4)(*inputs)
    torch.testing.assert_close(out, cd.reference(Diagonals(3), *inputs))


@dataclass(frozen=True, repr=False)
class OfHeads(Diagonals):
    """Diagonals of a step for each head, without `at_head`."""

    def __repr__(self) -> str:
        return f"diagonals_of_heads({self.step})"

    def allows(
        self, b: Positions, h: Positions, q: Positions, kv: Positions, data: Data | None = None
    ) -> Any:
        return (q - kv) % (self.step + h) == 0


@pytest.mark.parametrize("call", [cd.compile, lambda mask: cd.plan(mask, q_shape=(1, 2, 8, 8))])
def test_a_new_mask_that_reads_heads_has_at_head(
    call: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans would compute all heads as one."""
    monkeypatch.setattr(text, "NAMES", {**text.NAMES, "diagonals_of_heads": OfHeads})
    with pytest.raises(TypeError, match="OfHeads must have at_head: its `allows` reads the head"):
        call(masks.causal() & OfHeads(3))


@pytest.mark.parametrize("call", [cd.compile, lambda mask: cd.plan(mask, q_shape=(1, 1, 8, 8))])
def test_a_mask_that_text_cannot_name_is_refused(call: Callable[[Any], Any]) -> None:
    message = r"Diagonals is no mask of compiled_dilated.masks.*; got diagonals\(3\). Write masks"
    with pytest.raises(TypeError, match=message):
        call(masks.causal() & ~Diagonals(3))
