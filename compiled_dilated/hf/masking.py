"""transformers' masks as masks of this library, exactly or not at all.

transformers describes a mask by functions of indices that it nests: read_function reads them where Python runs. In a graph that
torch.compile traces their captured values cannot be read, and read_keywords takes what else transformers says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from transformers import masking_utils

from .visible import CHUNKS, PACKED, PADDING, Visible

# A window without an end, beyond any sequence.
_FAR = 2**30
_WAY_OUT = "Use attn_implementation='sdpa' or 'eager' for this model"


@dataclass
class _Description:
    """What has been read so far: masks as text that a program replaces, data that joins every program, and their tensors."""

    structure: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    data: dict[str, Tensor] = field(default_factory=dict)
    causal: bool = False
    merged: bool = False

    def visible(self, q_offset: int | Tensor, cut: bool) -> Visible:
        structure = " & ".join(self.structure) or "full()"
        return Visible(
            structure,
            tuple(sorted(self.joined)),
            self.data,
            q_offset,
            self.causal,
            cut,
            self.merged,
        )


@dataclass(frozen=True)
class _Neighbours:
    """A traced mask function, which can be asked of pairs and not be read.

    positions: of the keys, (1, keys). packed: whether the keys may be those of several sequences.
    """

    function: Callable[..., Any]
    batch: int
    positions: Callable[[], Tensor]
    packed: bool

    def ids(self) -> Tensor:
        """Ids (batch, keys), one more wherever a key does not see the one before it; O(keys)."""
        keys = self.positions()
        rows = torch.arange(self.batch, device=keys.device)[:, None]
        same = self.function(rows, torch.zeros_like(keys), keys, (keys - 1).clamp(min=0))
        ids: Tensor = (~same.expand(self.batch, keys.shape[1])).cumsum(1).to(torch.int32)
        return ids


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | Visible | None = None,
    local_size: int | None = None,
    config: Any = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **others: Any,
) -> Visible:
    """transformers' mask function: what a kind of layer may see.

    q_offset, kv_offset: the positions of the first query and of the first key. attention_mask: (batch, tokens), True for tokens.
    local_size: of a window or of chunks. The rest is how other implementations build their tensors.

    Raises NotImplementedError, by name, for a mask that it does not know.
    """
    if isinstance(attention_mask, Visible):
        return attention_mask  # generate() with a static cache makes the mask before the model does
    if use_vmap:
        raise NotImplementedError(
            f"compiled_dilated reads no mask function of a user's own (or_mask_function). {_WAY_OUT}"
        )
    description = _Description()

    def positions() -> Tensor:
        return (torch.arange(kv_length, device=device) + kv_offset)[None]

    if is_compiling():
        # transformers packs causal sequences alone, without a cache and without an attention_mask.
        packed = attention_mask is None and q_length == kv_length
        # An argument of masks without a direction alone.
        causal = "allow_is_bidirectional_skip" not in others
        chunked = local_size is not None and local_size == getattr(
            config, "attention_chunk_size", None
        )
        neighbours = _Neighbours(mask_function, batch_size, positions, packed)
        _read_keywords(description, neighbours, local_size, causal, chunked)
    else:
        _read_function(description, mask_function, positions)
    if attention_mask is not None:
        _join_padding(description, attention_mask, kv_length, kv_offset)
    offset = q_offset - kv_offset
    if isinstance(offset, Tensor):
        offset = offset.to(torch.int64).expand(batch_size)
    cut = isinstance(kv_offset, Tensor) or kv_offset > 0
    return description.visible(offset, cut)


def _join_padding(
    description: _Description, attention_mask: Tensor, kv_length: int, kv_offset: int
) -> None:
    missing = kv_offset + kv_length - attention_mask.shape[1]
    # Places of a static cache that are not filled yet are hidden. In a graph the length is not asked: it may vary.
    tokens = (
        F.pad(attention_mask, (0, missing)) if is_compiling() or missing > 0 else attention_mask
    )
    tokens = tokens[:, kv_offset : kv_offset + kv_length]
    if not is_compiling() and bool(tokens.all()):
        return
    description.joined.append(PADDING)
    description.data[PADDING] = ~tokens


def _read_function(
    description: _Description, function: Callable[..., Any], positions: Callable[[], Tensor]
) -> None:
    """Read one of transformers' mask functions and those that it joins. positions: of the keys, (batch or 1, keys)."""
    if function is masking_utils.causal_mask_function:
        description.structure.append("causal()")
        description.causal = True
        return
    if function is masking_utils.bidirectional_mask_function:
        return
    captured = {}
    if function.__closure__ is not None:
        cells = (cell.cell_contents for cell in function.__closure__)
        captured = dict(zip(function.__code__.co_freevars, cells, strict=True))
    maker = (
        function.__qualname__.partition(".")[0]
        if function.__module__ == masking_utils.__name__
        else ""
    )
    if maker == "and_masks":
        for part in captured["mask_functions"]:
            _read_function(description, part, positions)
    elif maker == "sliding_window_overlay":
        description.structure.append(f"window({captured['sliding_window'] - 1}, {_FAR})")
    elif maker == "sliding_window_bidirectional_overlay":
        description.structure.append(f"window({captured['sliding_window']})")
    elif maker == "chunked_overlay":
        places = positions() - captured["left_padding"][:, None]
        chunks = places.div(captured["chunk_size"], rounding_mode="floor")
        description.structure.append(f"documents(ids={CHUNKS!r})")
        description.data[CHUNKS] = chunks.to(torch.int32)
    elif maker == "packed_sequence_mask_function":
        description.joined.append(PACKED)
        description.data[PACKED] = captured["packed_sequence_mask"].to(torch.int32)
    elif maker == "remap_positions_for_packed_sequence":
        # Differences of positions inside of a sequence stay what they are; chunks count from its start.
        _read_function(description, captured["mask_function"], lambda: captured["position_ids"])
    else:
        raise NotImplementedError(
            f"compiled_dilated does not know the mask function {function.__qualname__}. {_WAY_OUT}"
        )


def _read_keywords(
    description: _Description,
    neighbours: _Neighbours,
    local_size: int | None,
    causal: bool,
    chunked: bool,
) -> None:
    """Take a mask from the keywords of a traced call; of packed sequences and chunks neighbours are asked.

    local_size: of a window, or of chunks where `chunked`. causal: whether later keys are hidden.
    """
    function = neighbours.function
    if function is masking_utils.bidirectional_mask_function:
        return
    if function is masking_utils.causal_mask_function:
        description.structure.append("causal()")
        description.causal = True
        return
    if not function.__qualname__.startswith("and_masks"):
        raise NotImplementedError(
            f"compiled_dilated does not know the mask function {function.__qualname__}. {_WAY_OUT}"
        )
    description.causal = causal
    if causal:
        description.structure.append("causal()")
    if chunked:
        description.structure.append(f"documents(ids={CHUNKS!r})")
        description.data[CHUNKS] = neighbours.ids()
        description.merged = neighbours.packed
        return
    if local_size is not None:
        description.structure.append(
            f"window({local_size - 1}, 0)" if causal else f"window({local_size})"
        )
    if causal and neighbours.packed:
        description.joined.append(PACKED)
        description.data[PACKED] = neighbours.ids()
