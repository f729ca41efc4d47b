"""The mask of a layer that transformers passes to its attention function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .. import masks
from ..programs import Program

# Names of data tensors; the first two are the arguments of a call that they are computed from.
PADDING, PACKED, CHUNKS = "attention_mask", "position_ids", "chunks"
_EAGER = "Use attn_implementation='eager' for models that compute with their masks"


class Visible:
    """A mask without a tensor of N x N.

    structure: masks as text, as `causal() & window(15, 0)`; a layer's own program replaces them.
    joined: sorted names of data that also joins a layer's own program: PADDING (True where a key
        is hidden) and PACKED (ids of the packed sequences).
    data: tensors (batch, keys) by name.
    q_offset: the first query's position among the keys; a tensor (batch,) where a static cache
        counts on the device.
    causal: whether the model hides later keys.
    cut: whether a sliding cache has dropped the first keys.
    merged: whether the structure's chunks may also be those of packed sequences.
    """

    # Models look at a mask's shape, and leave one of four dimensions unchanged.
    shape = (0, 0, 0, 0)
    ndim = 4

    def __init__(
        self,
        structure: str,
        joined: tuple[str, ...],
        data: Mapping[str, Tensor],
        q_offset: int | Tensor,
        causal: bool,
        cut: bool = False,
        merged: bool = False,
    ) -> None:
        self.structure, self.joined, self.data = structure, joined, dict(data)
        self.q_offset, self.causal, self.cut, self.merged = q_offset, causal, cut, merged

    def dim(self) -> int:
        return self.ndim

    def contiguous(self) -> Visible:
        return self

    def clone(self) -> Visible:
        return self

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(
            "this model takes parts of its mask, and with compiled_dilated a mask is no tensor. "
            f"{_EAGER}"
        )

    def _in_arithmetic(self, *operands: Any) -> Any:
        raise TypeError(
            "this model computes with its mask, and with compiled_dilated a mask is no tensor. "
            f"{_EAGER}"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _in_arithmetic
    __and__ = __rand__ = __or__ = __ror__ = __lt__ = __gt__ = __invert__ = _in_arithmetic

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this model asks its mask for {name!r}, and with compiled_dilated a mask is no "
            f"tensor. {_EAGER}"
        )

    def __repr__(self) -> str:
        return f"Visible({self.structure}, joined={self.joined}, q_offset={self.q_offset})"


def _flatten(visible: Visible) -> tuple[list[Any], tuple[Any, ...]]:
    names = tuple(sorted(visible.data))
    leaves = [*(visible.data[name] for name in names), visible.q_offset]
    flags = visible.causal, visible.cut, visible.merged
    return leaves, (visible.structure, visible.joined, names, *flags)


def _unflatten(leaves: Any, context: tuple[Any, ...]) -> Visible:
    structure, joined, names, causal, cut, merged = context
    *tensors, q_offset = leaves
    data = dict(zip(names, tensors, strict=True))
    return Visible(structure, joined, data, q_offset, causal, cut, merged)


# A `Visible` can be an input of compiled graphs.
pytree.register_pytree_node(
    Visible, _flatten, _unflatten, serialized_type_name="compiled_dilated.hf.Visible"
)


def joined_with(program: Program, joined: tuple[str, ...]) -> Program:
    """The program under data that hides keys from every layer.

    joined: names of the data, PADDING or PACKED.
    """
    masks_of_data = {PADDING: masks.padding, PACKED: lambda name: masks.documents(ids=name)}
    further = tuple(masks_of_data[name](name) for name in joined)
    if not further:
        return program
    return program.map(lambda mask: masks.conjunction((mask, *further)))
