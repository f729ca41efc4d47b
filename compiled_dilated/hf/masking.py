"""transformers' masks as masks of this library, exactly or not at all.

transformers describes a mask by nested functions of indices. Where Python runs, `_read_function`
reads these. In a graph that torch.compile traces, the values that they capture cannot be read:
`_read_keywords` uses the keywords of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

from ..tracing import is_traced
from ..wrapping.structures.spans import FAR
from .visible import CHUNKS, PACKED, PADDING, Visible

_REMEDY = "Use attn_implementation='sdpa' or 'eager' for this model"


@dataclass
class _Description:
    """A `Visible` while it is read.

    structure: masks as text, which a layer's own program replaces.
    joined: names of data that joins every program.
    data: tensors by name.
    causal, merged: as in `Visible`.
    """

    structure: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    data: dict[str, Tensor] = field(default_factory=dict)
    causal: bool = False
    merged: bool = False

    def visible(self, q_offset: int | Tensor, kv_offset: int | Tensor, batch: int) -> Visible:
        """The description as a `Visible`.

        q_offset, kv_offset: positions of the first query and of the first key.
        """
        structure = " & ".join(self.structure) or "full()"
        joined = tuple(sorted(self.joined))
        offset = q_offset - kv_offset
        if isinstance(offset, Tensor):
            offset = offset.to(torch.int64).expand(batch)
        cut = isinstance(kv_offset, Tensor) or kv_offset > 0
        return Visible(structure, joined, self.data, offset, self.causal, cut, self.merged)


@dataclass(frozen=True)
class _Neighbours:
    """A traced mask function, called for pairs of neighbouring keys.

    It cannot be read: a trace has no values of what it captures.

    positions: of the keys, (1, keys).
    packed: whether the keys may belong to several sequences.
    """

    function: Callable[..., Any]
    batch: int
    positions: Callable[[], Tensor]
    packed: bool

    def ids(self) -> Tensor:
        """Ids (batch, keys) of runs of keys that see their predecessor.

        The id grows by one at every key that does not see the key before it. O(keys).
        """
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
    **options: Any,
) -> Visible:
    """transformers' mask function: the mask of a kind of layer.

    q_offset, kv_offset: positions of the first query and of the first key.
    attention_mask: (batch, tokens), True for tokens.
    local_size: tokens of a window or of chunks.
    options: for implementations that build a tensor.

    Raises NotImplementedError, by name, for an unknown mask function.
    """
    # With a static cache generate() computes the mask, and passes it to the model.
    if isinstance(attention_mask, Visible):
        return attention_mask
    if use_vmap:
        raise NotImplementedError(
            f"compiled_dilated reads no mask function of a user's own (or_mask_function). {_REMEDY}"
        )
    description = _Description()

    def positions() -> Tensor:
        return (torch.arange(kv_length, device=device) + kv_offset)[None]

    if is_traced():
        # transformers packs only causal sequences, without a cache and without attention_mask.
        packed = attention_mask is None and q_length == kv_length
        neighbours = _Neighbours(mask_function, batch_size, positions, packed)
        _read_keywords(description, neighbours, local_size, config, options)
    else:
        _read_function(description, mask_function, positions)
    if attention_mask is not None:
        _join_padding(description, attention_mask, kv_length, kv_offset)
    return description.visible(q_offset, kv_offset, batch_size)


def _join_padding(
    description: _Description, attention_mask: Tensor, kv_length: int, kv_offset: int
) -> None:
    """Add padding; the unfilled places of a static cache are hidden too."""
    tokens = attention_mask
    if tokens.dim() != 2:
        raise ValueError(
            "attention_mask must be (batch, tokens), or (batch, heads, queries, keys); "
            f"got shape {tuple(tokens.shape)}"
        )
    in_graph = is_traced()
    # The unfilled places come after all queries: a causal mask hides them already.
    if description.causal and not in_graph and bool(tokens.all()):
        return
    missing = kv_offset + kv_length - tokens.shape[1]
    # In a graph the length may vary: no branch on it.
    if in_graph or missing > 0:
        tokens = F.pad(tokens, (0, missing))
    tokens = tokens[:, kv_offset : kv_offset + kv_length]
    if not in_graph and bool(tokens.all()):
        return
    description.joined.append(PADDING)
    description.data[PADDING] = ~tokens


def _read_function(
    description: _Description, function: Callable[..., Any], positions: Callable[[], Tensor]
) -> None:
    """Read one of transformers' mask functions, and those that it joins.

    positions: of the keys, (batch or 1, keys).
    """
    if function is masking_utils.causal_mask_function:
        description.structure.append("causal()")
        description.causal = True
        return
    if function is masking_utils.bidirectional_mask_function:
        return
    captured = _captured_by(function)
    factory = function.__qualname__.partition(".")[0]
    if function.__module__ != masking_utils.__name__:
        factory = ""
    if factory == "and_masks":
        for part in captured["mask_functions"]:
            _read_function(description, part, positions)
    elif factory == "sliding_window_overlay":
        description.structure.append(f"window({captured['sliding_window'] - 1}, {FAR})")
    elif factory == "sliding_window_bidirectional_overlay":
        description.structure.append(f"window({captured['sliding_window']})")
    elif factory == "chunked_overlay":
        places = positions() - captured["left_padding"][:, None]
        chunks = places.div(captured["chunk_size"], rounding_mode="floor")
        description.structure.append(f"documents(ids={CHUNKS!r})")
        description.data[CHUNKS] = chunks.to(torch.int32)
    elif factory == "packed_sequence_mask_function":
        description.joined.append(PACKED)
        description.data[PACKED] = captured["packed_sequence_mask"].to(torch.int32)
    elif factory == "remap_positions_for_packed_sequence":
        # Distances within a sequence are unchanged; chunks count from the sequence's start.
        _read_function(description, captured["mask_function"], lambda: captured["position_ids"])
    else:
        raise _unknown(function)


def _captured_by(function: Callable[..., Any]) -> dict[str, Any]:
    """The values that a function captures, by name."""
    if function.__closure__ is None:
        return {}
    values = (cell.cell_contents for cell in function.__closure__)
    return dict(zip(function.__code__.co_freevars, values, strict=True))


def _unknown(function: Callable[..., Any]) -> NotImplementedError:
    return NotImplementedError(
        f"compiled_dilated does not know the mask function {function.__qualname__}. {_REMEDY}"
    )


def _read_keywords(
    description: _Description,
    neighbours: _Neighbours,
    local_size: int | None,
    config: Any,
    options: Mapping[str, Any],
) -> None:
    """Read a mask from the keywords of a traced call.

    Packed sequences and chunks are read from pairs of neighbours.

    local_size: tokens of a window, or of chunks if the config has chunks of this size.
    config: of the model.
    options: further keywords of the call.
    """
    function = neighbours.function
    if function is masking_utils.bidirectional_mask_function:
        return
    if function is masking_utils.causal_mask_function:
        description.structure.append("causal()")
        description.causal = True
        return
    if not function.__qualname__.startswith("and_masks"):
        raise _unknown(function)
    # This option is only passed for masks without a direction.
    causal = "allow_is_bidirectional_skip" not in options
    description.causal = causal
    if causal:
        description.structure.append("causal()")
    chunk_size = getattr(config, "attention_chunk_size", None)
    if local_size is not None and local_size == chunk_size:
        description.structure.append(f"documents(ids={CHUNKS!r})")
        description.data[CHUNKS] = neighbours.ids()
        description.merged = neighbours.packed
        return
    if local_size is not None and causal:
        description.structure.append(f"window({local_size - 1}, 0)")
    elif local_size is not None:
        description.structure.append(f"window({local_size})")
    if causal and neighbours.packed:
        description.joined.append(PACKED)
        description.data[PACKED] = neighbours.ids()
