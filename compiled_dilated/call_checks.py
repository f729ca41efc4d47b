"""Checks of a call's options: keywords, offsets, sinks and captured tensors.

One check and one message per mistake.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .tracing import is_traced

# SDPA's options, and what to write here in their place.
_OF_SDPA = {
    "is_causal": "write it into the program: masks.causal() & mask",
    "attn_mask": "write it as a mask, as masks.from_mod(...) or masks.padding(); "
    "a bias to the scores is a score_mod",
    "attn_bias": "write it as score_mod=lambda score, b, h, q_idx, kv_idx: "
    "score + bias[q_idx, kv_idx]",
    "dropout_p": "there is no dropout of attention weights; "
    "put torch.nn.Dropout behind the attention",
    "enable_gqa": "leave it out: key heads are shared whenever k has fewer heads than q",
    "block_mask": "write it as a mask: masks.from_mod(mask_mod)",
    "score_mod": "scores cannot be changed out of core; compile without transport='streamed'",
    "key_padding_mask": "join the program with masks.padding() and pass data={'padding': mask}",
}


def no_options_of_sdpa(options: Iterable[str]) -> None:
    """Raise TypeError for unsupported keywords, with the alternative to SDPA's options."""
    for name in options:
        remedy = _OF_SDPA.get(name, "leave it out")
        raise TypeError(f"a compiled program takes no {name}=; {remedy}")


def no_onnx_export() -> None:
    """Raise NotImplementedError in an ONNX export.

    The export would write a custom operator that no ONNX runtime has.
    """
    if "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            "attention by a program is no ONNX operator: its tiles are found at the call, "
            "which a graph of ONNX operators does not express. "
            "Use compiled_dilated.export, whose package runs from Python and C++, or torch.export"
        )


def captured(operands: Sequence[Tensor], device: torch.device) -> None:
    """Raise unless captured tensors can be used on a device."""
    for x in operands:
        if x.layout != torch.strided:
            raise TypeError(
                f"a function captures a {x.layout} tensor of shape {tuple(x.shape)}; "
                "convert it with .to_dense()"
            )
        if x.device.type != device.type and (x.dim() > 0 or "meta" in (x.device.type, device.type)):
            raise ValueError(
                f"a function captures a tensor of shape {tuple(x.shape)} on {x.device}; "
                f"q is on {device}. Move it with .to(q.device)"
            )
        if x.is_complex() and x.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"a function captures a {x.dtype} tensor of shape {tuple(x.shape)} that requires "
                "grad, and complex operands get none. "
                "Detach it, or capture its real and imaginary parts"
            )


def sinks(sink_logits: object, heads: int, device: torch.device) -> None:
    """Raise unless there is one real logit per query head."""
    if not isinstance(sink_logits, Tensor) or tuple(sink_logits.shape) != (heads,):
        came: object = type(sink_logits).__name__
        if isinstance(sink_logits, Tensor):
            came = tuple(sink_logits.shape)
        raise ValueError(
            f"sink_logits must be a tensor of one logit per query head, shape ({heads},); "
            f"got {came}"
        )
    if not sink_logits.dtype.is_floating_point:
        raise TypeError(
            f"sink_logits must be real numbers; got {sink_logits.dtype}. Cast with .float()"
        )
    if sink_logits.device != device:
        raise ValueError(
            f"sink_logits must be on the device of q, {device}; got {sink_logits.device}. Move it"
        )


def q_offset(value: object) -> Any:
    """The offset of the first query, symbolic or an integer."""
    if isinstance(value, torch.SymInt):
        return value
    return arguments.integer("q_offset", value, 0)


def last_offset(value: object, batch: int, device: torch.device) -> Any:
    """The greatest q_offset, checked: a number, or one per sequence.

    0 for a tensor without known values (fake, or while compiling).
    """
    if not isinstance(value, Tensor):
        return q_offset(value)
    if (
        value.dtype != torch.int64
        or value.dim() != 1
        or value.shape[0] != batch
        or value.device != device
    ):
        raise ValueError(
            f"q_offset as a tensor must be int64 of shape ({batch},) on {device}, one position "
            "for each sequence of the batch; "
            f"got {value.dtype} of shape {tuple(value.shape)} on {value.device}"
        )
    is_fake = isinstance(value, torch._subclasses.FakeTensor) or value.device.type == "meta"
    if is_traced() or is_fake or not value.numel():
        return 0
    least, greatest = (int(x) for x in value.aminmax())
    if least < 0:
        raise ValueError(f"q_offset must be 0 or more for each sequence; got {least}")
    return greatest
