"""score_mods that are refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchRuntimeError, Unsupported

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


# What Dynamo raises: its own reason, or the error above in a text of its own.
REFUSED_IN_GRAPHS: dict[str, tuple[type[Exception], str]] = {
    "branches": (Unsupported, "Data-dependent branching"),
    "random of a shape": (TorchRuntimeError, r"ModError\('score_mod .* draws random numbers"),
    "random": (TorchRuntimeError, r"ModError\('score_mod .* draws random numbers"),
    "a float": (Unsupported, "output must consist of tensors .* got <class 'float'>"),
    "a bool": (TorchRuntimeError, r"TypeError\('score_mod .* must return the new score"),
    "two numbers": (TorchRuntimeError, r"ValueError\('score_mod .* one number for each pair"),
    "two arguments": (Unsupported, "Argument mismatch when attempting to trace function <lambda>"),
}


@pytest.mark.parametrize("name", REFUSED_MODS)
def test_score_mods_that_are_refused_in_compiled_functions(name: str) -> None:
    attend = cd.compile(masks.causal())
    kind, message = REFUSED_IN_GRAPHS[name]
    with pytest.raises(kind, match=message):
        in_one_graph(lambda *x: attend(*x, score_mod=REFUSED_MODS[name][0]))(*tensors())
