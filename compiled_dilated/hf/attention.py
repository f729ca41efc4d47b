"""transformers' attention function."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import assume_constant_result, is_compiling

from .. import text
from ..attend import Attend, attend_in_graph
from ..mods import ScoreMod
from ..rules import Skeleton
from ..wrapping.scores import added
from ..wrapping.sites import sites_of
from .visible import Visible, joined_with

# What models pass on for other implementations: the mask holds it, or it says nothing of the numbers.
_SAID_ELSEWHERE = {
    "position_ids", "cache_position", "sliding_window", "use_cache", "past_key_values", "output_hidden_states", "layer_idx",
    "return_dict", "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic",
    "position_embeddings", "output_router_logits", "labels", "logits_to_keep", "target_dtype", "seq_idx",
}  # fmt: skip


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, in place of transformers' own.

    query: (B, Hq, N, D); key, value: (B, Hkv, M, D). attention_mask: what `masking.mask` made. softcap: scores become
    softcap * tanh(score / softcap). s_aux: (Hq,), a logit of each head that joins its softmax. position_bias: (1 or B, Hq, N, M),
    added to scores.

    Returns (B, N, Hq, D), and None for the weights, which are not made.

    Raises ValueError or NotImplementedError for dropout, weights and masks of N x N.
    """
    _refuse(module, dropout, attention_mask, softcap, position_bias, options)
    visible = attention_mask if isinstance(attention_mask, Visible) else _unmasked(module, query, key, is_causal)
    score_mod = None if softcap is None else _capped(softcap)
    if position_bias is not None:
        score_mod = added(position_bias, visible.q_offset)
    own = sites_of(module)
    site: Any = own[0] if own else None
    if site is not None and site.program is not None:
        site.check(visible)
        attend = site.attend(visible.joined)
        names = attend.program.names
    elif is_compiling():
        out = _traced(visible, query, key, value, scaling, score_mod, s_aux)
        return out.transpose(1, 2), None
    else:
        attend = attend_of(visible.structure, visible.joined)
        names = attend.program.names
    data = {name: visible.data[name] for name in names}
    out = attend(
        query, key, value, scale=scaling, q_offset=visible.q_offset, data=data, score_mod=score_mod, sink_logits=s_aux
    )  # fmt: skip
    if site is not None and not is_compiling():
        # Where a static cache counts on the device the first query is not asked for.
        q_offset = 0 if isinstance(visible.q_offset, Tensor) else int(visible.q_offset)
        shapes = query.shape, key.shape, value.shape
        site.note(attend, visible.structure, q_offset, *shapes, query.dtype, query.device.type)
    return out.transpose(1, 2), None


def _refuse(
    module: nn.Module,
    dropout: float,
    attention_mask: object,
    softcap: float | None,
    position_bias: Tensor | None,
    options: Mapping[str, Any],
) -> None:
    name = type(module).__name__
    if dropout:
        raise ValueError(
            f"compiled_dilated has no dropout of attention weights; {name} asks for {dropout}. Set attention_dropout (BERT: "
            "attention_probs_dropout_prob) to 0 in the model's config, or call model.eval()"
        )
    if isinstance(attention_mask, Tensor):
        raise NotImplementedError(
            f"{name} got a mask of shape {tuple(attention_mask.shape)}, one entry for each pair. Pass attention_mask of shape "
            "(batch, tokens), and what else hides keys as a program: compiled_dilated.compile(model, attention=...)"
        )
    if softcap is not None and position_bias is not None:
        raise NotImplementedError(f"{name} passes softcap and position_bias together, which is not computed. Use 'eager'")
    if options.get("output_attentions"):
        raise ValueError("compiled_dilated makes no attention weights. Leave out output_attentions, or use 'eager'")
    for option, setting in options.items():
        if setting is None or setting is False or option in _SAID_ELSEWHERE:
            continue
        raise NotImplementedError(
            f"compiled_dilated does not know the option {option!r} that {name} passes. Use 'eager' or 'sdpa'"
        )


def _unmasked(module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None) -> Visible:
    """Mask of a layer that got none: encoders of images, cross attention."""
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if causal:
        return Visible("causal()", (), {}, key.shape[2] - query.shape[2], True)
    return Visible("full()", (), {}, 0, False)


@lru_cache(maxsize=256)
def attend_of(structure: str, joined: tuple[str, ...]) -> Attend:
    """Attention by a structure as text and by data that joins it."""
    return Attend(joined_with(text.read_program(structure), joined))


@lru_cache(maxsize=64)
def _capped(softcap: float) -> ScoreMod:
    # One function for each cap: a call that brings another one is traced anew.
    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


# In a trace of torch.compile no object may be made that outlives it: what a graph needs are strings.
@assume_constant_result
def _rule_of(structure: str, joined: tuple[str, ...]) -> tuple[str, str, tuple[str, ...]]:
    """The frame and the rule of attention as text, and the names of the data that it reads."""
    program = attend_of(structure, joined).program
    skeleton = Skeleton(program, "auto", None)
    return skeleton.frame, skeleton.plain.rule, tuple(program.names)


def _traced(
    visible: Visible, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, score_mod: Any, s_aux: Tensor | None
) -> Tensor:
    frame, rule, names = _rule_of(visible.structure, visible.joined)
    tensors = [visible.data[name] for name in names]
    return attend_in_graph(
        frame, rule, query, key, value, tensors, scale=scaling, q_offset=visible.q_offset, score_mod=score_mod, sink_logits=s_aux
    )
