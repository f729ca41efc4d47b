"""What a kind of layer may see, as transformers hands it from its mask function to its attention function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .. import masks
from ..programs import Program

# Names of data tensors.
PADDING, PACKED, CHUNKS = "padding", "packed", "chunks"


class Visible:
    """In place of a mask of N x N.

    structure: a mask as text, as `causal() & window(15, 0)`, which a layer's own program replaces.
    joined: the names, sorted, of data that joins a layer's own program too: PADDING (True where a key is hidden) and PACKED
        (document ids).
    data: tensors (batch, keys) by name.
    q_offset: the first query's place among the keys; a tensor (batch,) where a static cache counts on the device.
    causal: whether the model hides later keys. cut: whether a sliding cache has dropped the first keys.
    merged: whether the chunks of the structure may be those of packed sequences too.
    """

    # What models ask of a mask; one of four dimensions they leave alone.
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
            "this model takes parts of its mask, and with compiled_dilated a mask is no tensor. Use "
            "attn_implementation='eager' for models that compute with their masks"
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this model asks its mask for {name!r}, and with compiled_dilated a mask is no tensor. Use "
            "attn_implementation='eager' for models that compute with their masks"
        )

    def __repr__(self) -> str:
        return f"Visible({self.structure}, joined={self.joined}, q_offset={self.q_offset})"


def _flatten(visible: Visible) -> tuple[list[Any], tuple[Any, ...]]:
    names = tuple(sorted(visible.data))
    return [*(visible.data[name] for name in names), visible.q_offset], (
        visible.structure, visible.joined, names, visible.causal, visible.cut, visible.merged,
    )  # fmt: skip


def _unflatten(leaves: Any, context: tuple[Any, ...]) -> Visible:
    structure, joined, names, causal, cut, merged = context
    *tensors, q_offset = leaves
    return Visible(
        structure, joined, dict(zip(names, tensors, strict=True)), q_offset, causal, cut, merged
    )


# So that a compiled graph may take one as an input.
pytree.register_pytree_node(
    Visible, _flatten, _unflatten, serialized_type_name="compiled_dilated.hf.Visible"
)


def joined_with(program: Program, joined: tuple[str, ...]) -> Program:
    """The program under the masks of data that hides keys from every layer."""
    makers = {PADDING: masks.padding, PACKED: lambda name: masks.documents(ids=name)}
    parts = tuple(makers[name](name) for name in joined)
    return program.map(lambda mask: masks.conjunction((mask, *parts))) if parts else program
