"""score_mods that are refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import compiled_dilated as cd
from compiled_dilated import masks
from tests.support.mods import in_one_graph, tensors

pytestmark = pytest.mark.usefixtures("fresh")

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
    mod, message = REFUSED_MODS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        cd.compile(masks.causal())(*tensors(), score_mod=mod)


@pytest.mark.parametrize("name", REFUSED_MODS)
def test_score_mods_that_are_refused_in_compiled_functions(name: str) -> None:
    """Dynamo raises errors of its own for some of them."""
    attend = cd.compile(masks.causal())
    with pytest.raises(Exception, match=r"."):
        in_one_graph(lambda *x: attend(*x, score_mod=REFUSED_MODS[name][0]))(*tensors())
