"""Programs with padding keys hidden, and the mask of padding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import masks
from ..programs import PerLength, Program, builder


def visible(program: Program | PerLength) -> Program | PerLength:
    """The program with padding keys hidden; it reads the data tensor "padding"."""
    if isinstance(program, PerLength):
        return PerLength(visible_at, (program,), (*program.names, "padding"))
    return _visible(program)


def _visible(program: Program) -> Program:
    """The program with a padding mask in every branch."""
    padding = masks.padding()
    branches = []
    for branch in program.branches:
        mask = masks.conjunction((*masks.conjuncts(branch.mask), padding))
        branches.append(replace(branch, mask=mask))
    return Program(tuple(branches))


@builder
def visible_at(program: PerLength, tokens: int) -> Program:
    """The program for this many tokens with padding keys hidden."""
    return _visible(program.at(tokens))


def checked_padding(key_padding_mask: Tensor, key: Tensor) -> Tensor:
    """The mask, checked to be bool (batch, tokens) of the key."""
    kind: object = type(key_padding_mask).__name__
    if isinstance(key_padding_mask, Tensor):
        kind = key_padding_mask.dtype
    if kind != torch.bool:
        raise TypeError(
            f"key_padding_mask must be a bool tensor, True where the key is padding; got {kind}. "
            "An additive float mask is `mask == -inf`, a mask of ones for tokens is `mask == 0`"
        )
    if key_padding_mask.shape != key.shape[:2]:
        raise ValueError(
            f"key_padding_mask must be (batch, tokens) of the key, {tuple(key.shape[:2])}; "
            f"got {tuple(key_padding_mask.shape)}"
        )
    return key_padding_mask
