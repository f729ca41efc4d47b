"""The values of the tensors that functions capture, compared by digest."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..mods import Kind, kind_of


@dataclass(frozen=True)
class Contents:
    """The values of a call's operands, equal by digest.

    digests: one per operand.
    tensors: weak references, so that cached plans keep no tensor alive.
    kinds: dtype and shape per operand.
    """

    digests: tuple[str, ...]
    tensors: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    kinds: tuple[Kind, ...] = field(default=(), compare=False, repr=False)

    @staticmethod
    def of(tensors: Sequence[Any]) -> Contents:
        """Contents of tensors; fake ones have only a shape and dtype."""
        return Contents(
            tuple(map(digest, tensors)),
            tuple(map(weakref.ref, tensors)),
            tuple(map(kind_of, tensors)),
        )

    def alive(self) -> list[Any] | None:
        """The tensors; None if one was freed or has no data."""
        if any(digest.startswith("unknown") for digest in self.digests):
            return None
        tensors = [reference() for reference in self.tensors]
        if any(tensor is None for tensor in tensors):
            return None
        return tensors


NO_CONTENTS = Contents(())


def digest(x: Any) -> str:
    """Shape, dtype and a hash of a tensor's values.

    Without a hash for a tensor without data.
    """
    kind = f"{tuple(x.shape)} {x.dtype}"
    # Tensors of a transform and tensor subclasses have no values of their own.
    is_plain = type(x) in (torch.Tensor, torch.nn.Parameter)
    is_plain = is_plain and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    if x.device.type == "meta" or not is_plain:
        return f"unknown {kind}"
    with _disable_current_modes():
        numbers = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{kind} {hashlib.blake2b(numbers, digest_size=16).hexdigest()}"


def slot_name(slot: int) -> str:
    """Key of operand `slot` in a call's data; never a user's name."""
    return f"<{slot}>"
