"""transformers' attention function."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import assume_constant_result
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .. import text
from ..attend import Attend, attend_in_graph
from ..mods import ScoreMod
from ..rules import Skeleton
from ..tracing import is_traced
from ..wrapping.scores import added
from ..wrapping.sites import sites_of
from . import NAME
from .visible import Visible, joined_with

# Options for other implementations: in the mask already, or without effect on the numbers.
_WITHOUT_EFFECT = {
    *("position_ids", "cache_position", "sliding_window", "seq_idx", "position_embeddings"),
    *("use_cache", "past_key_values", "layer_idx", "logits_to_keep", "num_items_in_batch"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic"),
    *("return_dict", "output_hidden_states", "output_router_logits", "labels", "target_dtype"),
}


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
    data: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, in place of transformers' own.

    query: (B, Hq, N, D).
    key, value: (B, Hkv, M, D).
    attention_mask: from `masking.mask`; or a tensor that broadcasts to (B, Hq, N, M), of numbers
        that are added to scores, or True where a key is seen.
    softcap: scores become softcap * tanh(score / softcap).
    s_aux: (Hq,), sink logits, one more term of each head's softmax.
    position_bias: (1 or B, Hq, N, M), added to scores.
    data: tensors by name that the programs of the model's layers read.

    Returns (B, N, Hq, D), and None for the weights, which are not computed.

    Raises ValueError or NotImplementedError for dropout, weights and unknown options.
    """
    if attention_mask is None:
        _refuse_without_masks(module)
    bias = _bias_of(module, query, key, attention_mask, position_bias)
    _refuse(module, dropout, softcap, bias, options)
    layer_sites = sites_of(module)
    site: Any = layer_sites[0] if layer_sites else None
    if site is not None:
        site.check_data(data, query, key)
    elif data:
        raise ValueError(
            f"no program of {type(module).__name__} reads data; got {sorted(map(str, data))}. "
            "Pass the model and its programs to compiled_dilated.compile(model, attention=...)"
        )
    visible = _visible(module, query, key, attention_mask, is_causal, site)
    score_mod: ScoreMod | None = None
    if softcap is not None:
        score_mod = _capped(softcap)
    if bias is not None:
        score_mod = added(bias, visible.q_offset)
    of_scores = (scaling, score_mod, s_aux)
    if is_traced() and (site is None or site.program is None):
        out = _traced(visible, query, key, value, *of_scores)
    else:
        model_mask = visible.structure + _tensor_as_text(attention_mask)
        out = _at_site(site, visible, model_mask, data or {}, query, key, value, *of_scores)
    return out.transpose(1, 2), None


def _at_site(
    site: Any,
    visible: Visible,
    model_mask: str,
    data: Mapping[str, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    score_mod: ScoreMod | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention by a site's program, or by the model's own mask.

    model_mask: the model's own mask as text, for the table of sites.
    data: of the call, for the site's program.
    """
    if site is not None and site.program is not None:
        site.check(visible)
        attend = site.attend(visible.joined)
        data = {**visible.data, **data}
    else:
        attend = attend_of(visible.structure, visible.joined)
        data = visible.data
    q_offset = _position(visible.q_offset)
    # Attention without data decodes a token without the checks of its first call.
    read = {name: data[name] for name in attend.program.names} or None
    out: Tensor = attend(
        query,
        key,
        value,
        scale=scaling,
        q_offset=q_offset,
        data=read,
        score_mod=score_mod,
        sink_logits=s_aux,
    )
    if site is not None and not is_traced():
        if isinstance(q_offset, Tensor):
            q_offset = 0
        shapes = query.shape, key.shape, value.shape
        site.note(attend, model_mask, q_offset, *shapes, query.dtype, query.device.type)
    return out


def _position(q_offset: int | Tensor) -> int | Tensor:
    """The first query's position as a number, where reading it is free.

    A static cache counts in a tensor: on another device reading it would be a transfer.
    """
    if is_traced() or not isinstance(q_offset, Tensor):
        return q_offset
    # One number for all sequences is expanded over the batch.
    is_common = q_offset.numel() == 1 or q_offset.stride(0) == 0
    if q_offset.device.type != "cpu" or not is_common or q_offset.numel() == 0:
        return q_offset
    return int(q_offset[0])


def _refuse(
    module: nn.Module,
    dropout: float,
    softcap: float | None,
    bias: Tensor | None,
    options: Mapping[str, Any],
) -> None:
    """Raise ValueError or NotImplementedError for what is not computed."""
    name = type(module).__name__
    if dropout:
        raise ValueError(
            f"compiled_dilated has no dropout of attention weights; {name} asks for {dropout}. "
            "Set attention_dropout (BERT: attention_probs_dropout_prob) to 0 in the model's "
            "config, or call model.eval()"
        )
    if softcap is not None and bias is not None:
        raise NotImplementedError(
            f"{name} passes softcap together with position_bias or a mask of one entry for each "
            "pair, which is not computed. "
            "Pass attention_mask of shape (batch, tokens), or use 'eager'"
        )
    if options.get("output_attentions"):
        raise ValueError(
            "compiled_dilated makes no attention weights. "
            "Leave out output_attentions, or use 'eager'"
        )
    for option, setting in options.items():
        if setting is None or setting is False or option in _WITHOUT_EFFECT:
            continue
        raise NotImplementedError(
            f"compiled_dilated does not know the option {option!r} that {name} passes. "
            "Use 'eager' or 'sdpa'"
        )


def _refuse_without_masks(module: nn.Module) -> None:
    """Refuse an implementation without a mask function: transformers drops its masks.

    Attention that is registered by hand under another name lacks one.
    """
    name = getattr(getattr(module, "config", None), "_attn_implementation", NAME)
    if name == NAME or name in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        return
    raise ValueError(
        f"attention is registered as {name!r} without a mask function: transformers would drop "
        "padding and the positions of a cache. Call compiled_dilated.hf.register() and use "
        f"attn_implementation={NAME!r}, or register compiled_dilated.hf.masking.mask under "
        f"{name!r} with AttentionMaskInterface.register"
    )


def _visible(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Visible | Tensor | None,
    is_causal: bool | None,
    site: Any,
) -> Visible:
    """The mask of a call, without a tensor of pairs.

    Such a tensor is added to the scores: see `_bias_of`.
    """
    if isinstance(attention_mask, Visible):
        return attention_mask
    of_module = bool(getattr(module, "is_causal", False))
    if attention_mask is None:
        # Encoders of images, cross attention.
        if is_causal is None:
            is_causal = of_module
        if is_causal:
            return Visible("causal()", (), {}, key.shape[2] - query.shape[2], True)
        return Visible("full()", (), {}, 0, False)
    # With a cache the position of the first query is unknown, and a program needs it.
    is_cached = of_module and query.shape[2] != key.shape[2]
    if is_cached and site is not None and site.program is not None:
        raise NotImplementedError(
            f"{site.path} got a mask of one entry for each pair and {query.shape[2]} queries for "
            f"{key.shape[2]} keys: where its program starts is not known. "
            "Pass attention_mask of shape (batch, tokens), or use_cache=False"
        )
    return Visible("full()", (), {}, 0, False)


def _bias_of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Visible | Tensor | None,
    position_bias: Tensor | None,
) -> Tensor | None:
    """The tensor that is added to scores, if any.

    It is the bias of positions, a mask of pairs, or both.
    """
    if not isinstance(attention_mask, Tensor):
        return position_bias
    pairs = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    shape = tuple(attention_mask.shape)
    fits = len(shape) == 4 and all(
        size in (1, most) for size, most in zip(shape, pairs, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{type(module).__name__} got a mask of shape {shape}; expected "
            f"(batch, heads, queries, keys) = {pairs}, or 1 in place of any of them"
        )
    if position_bias is None:
        return attention_mask
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, position_bias, -torch.inf)
    return position_bias + attention_mask


def _tensor_as_text(attention_mask: Visible | Tensor | None) -> str:
    """A mask tensor's part of a layer's mask as text."""
    if not isinstance(attention_mask, Tensor):
        return ""
    if attention_mask.dtype == torch.bool:
        return " & a mask"
    return " + a bias"


@lru_cache(maxsize=256)
def attend_of(structure: str, joined: tuple[str, ...]) -> Attend:
    """Attention by a structure as text, under data of a call.

    joined: sorted names of the data.
    """
    return Attend(joined_with(text.read_program(structure), joined))


@lru_cache(maxsize=64)
def _capped(softcap: float) -> ScoreMod:
    # One function per cap: with another one a call would be traced anew.
    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


# No object that is created in a trace of torch.compile may outlive it: the graph contains text.
@assume_constant_result
def _rule_of(structure: str, joined: tuple[str, ...]) -> tuple[str, str, tuple[str, ...]]:
    """Frame and rule of attention as text, and names of its data."""
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
    """Attention by the model's own mask, in a graph of torch.compile."""
    frame, rule, names = _rule_of(visible.structure, visible.joined)
    return attend_in_graph(
        frame,
        rule,
        query,
        key,
        value,
        [visible.data[name] for name in names],
        scale=scaling,
        q_offset=visible.q_offset,
        score_mod=score_mod,
        sink_logits=s_aux,
    )
