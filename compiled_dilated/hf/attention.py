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

    query: (B, Hq, N, D); key, value: (B, Hkv, M, D).
    attention_mask: what `masking.mask` made; or a tensor that broadcasts to (B, Hq, N, M): numbers that are added to scores, or
        True where a key is seen.
    softcap: scores become softcap * tanh(score / softcap).
    s_aux: (Hq,), a logit of each head that joins its softmax.
    position_bias: (1 or B, Hq, N, M), added to scores.

    Returns (B, N, Hq, D), and None for the weights, which are not made.

    Raises ValueError or NotImplementedError for dropout and weights.
    """
    bias = _bias_of(module, query, key, attention_mask, position_bias)
    _refuse(module, dropout, softcap, bias, options)
    own = sites_of(module)
    site: Any = own[0] if own else None
    if isinstance(attention_mask, Visible):
        visible = attention_mask
    elif attention_mask is None:
        visible = _unmasked(module, query, key, is_causal)
    else:
        visible = _masked(module, query, key, site)
    score_mod = None if softcap is None else _capped(softcap)
    if bias is not None:
        score_mod = added(bias, visible.q_offset)
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
        said = visible.structure + _said_of(attention_mask)
        site.note(attend, said, q_offset, *shapes, query.dtype, query.device.type)
    return out.transpose(1, 2), None


def _refuse(
    module: nn.Module,
    dropout: float,
    softcap: float | None,
    bias: Tensor | None,
    options: Mapping[str, Any],
) -> None:
    name = type(module).__name__
    if dropout:
        raise ValueError(
            f"compiled_dilated has no dropout of attention weights; {name} asks for {dropout}. Set attention_dropout (BERT: "
            "attention_probs_dropout_prob) to 0 in the model's config, or call model.eval()"
        )
    if softcap is not None and bias is not None:
        raise NotImplementedError(
            f"{name} passes softcap together with position_bias or a mask of one entry for each pair, which is not computed. "
            "Pass attention_mask of shape (batch, tokens), or use 'eager'"
        )
    if options.get("output_attentions"):
        raise ValueError(
            "compiled_dilated makes no attention weights. Leave out output_attentions, or use 'eager'"
        )
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


def _masked(module: nn.Module, query: Tensor, key: Tensor, site: Any) -> Visible:
    """Mask of a layer whose model made a tensor of one entry for each pair, which is added to the scores."""
    cached = getattr(module, "is_causal", False) and query.shape[2] != key.shape[2]
    if cached and site is not None and site.program is not None:
        raise NotImplementedError(
            f"{site.path} got a mask of one entry for each pair and {query.shape[2]} queries for {key.shape[2]} keys: where its "
            "program starts is not known. Pass attention_mask of shape (batch, tokens), or use_cache=False"
        )
    return Visible("full()", (), {}, 0, False)


def _bias_of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Visible | Tensor | None,
    position_bias: Tensor | None,
) -> Tensor | None:
    """What is added to the scores: the bias of positions, the tensor of a mask, or both in one."""
    if not isinstance(attention_mask, Tensor):
        return position_bias
    whole = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    shape = tuple(attention_mask.shape)
    fits = len(shape) == 4 and all(
        size in (1, most) for size, most in zip(shape, whole, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{type(module).__name__} got a mask of shape {shape}; expected (batch, heads, queries, keys) = {whole}, or 1 in "
            "place of any of them"
        )
    if position_bias is None:
        return attention_mask
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, position_bias, -torch.inf)
    return position_bias + attention_mask


def _said_of(attention_mask: Visible | Tensor | None) -> str:
    """What a tensor of a mask adds to the description of what a layer sees."""
    if not isinstance(attention_mask, Tensor):
        return ""
    return " & a mask" if attention_mask.dtype == torch.bool else " + a bias"


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
    visible: Visible,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    score_mod: Any,
    s_aux: Tensor | None,
) -> Tensor:
    frame, rule, names = _rule_of(visible.structure, visible.joined)
    tensors = [visible.data[name] for name in names]
    return attend_in_graph(
        frame,
        rule,
        query,
        key,
        value,
        tensors,
        scale=scaling,
        q_offset=visible.q_offset,
        score_mod=score_mod,
        sink_logits=s_aux,
    )
