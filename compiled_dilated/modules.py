"""Attention as torch modules, with the signatures and state dicts of the first public LongNet port.

    DilatedAttention            (B, N, H, D) -> (B, N, H, D)     no parameters
    MultiheadDilatedAttention   (B, N, E) -> ((B, N, E), None)   projections -> attention -> norm
                                                                 -> output projection

The core works on (B, H, N, D): inputs and the output are transposed as views.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import arguments, checks, masks
from .attend import Attend
from .programs import PerLength, Program, builder, longnet
from .ring.rings import Ring


class Attention(nn.Module):
    """Attention over (batch, tokens, heads, head_dim) by a program, without parameters.

    programs: by `is_causal`.
    ring: the ranks that compute it; None for this process only.
    """

    def __init__(
        self,
        programs: Mapping[bool, Program | PerLength],
        softmax_scale: float | None,
        attention_dropout: float,
        lowering: str,
        ring: Ring | None = None,
    ) -> None:
        super().__init__()
        if softmax_scale is not None:
            checks.scale("softmax_scale", softmax_scale)
        _refuse_dropout("attention_dropout", attention_dropout)
        self.softmax_scale = softmax_scale
        self.lowering = lowering
        self._attends: dict[tuple[bool, bool], Attend] = {}
        for is_causal, program in programs.items():
            self._attends[is_causal, False] = Attend(program, lowering, ring)
            self._attends[is_causal, True] = Attend(visible(program), lowering, ring)

    def program(self, tokens: int, is_causal: bool = False) -> Program:
        """The program of a call with this many tokens and no padding."""
        program = self._attends[arguments.flag("is_causal", is_causal), False].program
        if isinstance(program, PerLength):
            return program.at(arguments.integer("tokens", tokens, 1))
        return program

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention over (batch, tokens, heads, head_dim).

        A row without keys is 0 and has no gradient.

        Args:
            query: (B, N, H, D), H a multiple of Hkv.
            key: (B, M, Hkv, D).
            value: (B, M, Hkv, Dv).
            key_padding_mask: bool (B, M), True where the key is padding, as in torch. It hides
                keys only. Outputs of padded queries are defined: mask such rows in the loss.

        Returns (B, N, H, Dv).
        """
        checks.tensors(query, key, value, checks.TOKENS_FIRST)
        is_padded = key_padding_mask is not None
        attend = self._attends[arguments.flag("is_causal", is_causal), is_padded]
        if isinstance(attend.program, PerLength) and query.shape[1] != key.shape[1]:
            raise ValueError(
                f"this attention is over one sequence; got {query.shape[1]} query and "
                f"{key.shape[1]} key tokens. "
                "Use DilatedAttention, or compiled_dilated.compile with a program of your own"
            )
        if is_padded and attend.ring is not None and attend.ring.sharded:
            raise ValueError(
                "a distributed ring reads a mask of the whole sequence, and this rank has that of "
                "its shard. Use compiled_dilated.compile(program & masks.padding('padding'), "
                "mesh=...) with data={'padding': the whole mask}"
            )
        data = None
        if key_padding_mask is not None:
            data = {"padding": _check_padding(key_padding_mask, key)}
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out: Tensor = attend(q, k, v, scale=self.softmax_scale, data=data)
        return out.transpose(1, 2)

    def _options(self) -> list[str]:
        """Options that differ from their defaults, as code."""
        options = []
        if self.softmax_scale is not None:
            options.append(f"softmax_scale={self.softmax_scale}")
        if self.lowering != "auto":
            options.append(f"lowering={self.lowering!r}")
        return options


class DilatedAttention(Attention):
    """LongNet's dilated attention (arXiv 2307.02486), a drop-in for the first port's module.

    segment_lengths: in tokens, one per branch; the sequence need not be divisible by them.
    dilation_rates: in tokens, one per branch.
    softmax_scale: default 1 / sqrt(D).
    attention_dropout: 0.0. More is refused: the fused kernels have no dropout.
    offsets, heads: as in `longnet`. The first port splits its heads among the branches, which is
        heads="split"; in the paper, and here by default, every branch has all heads.
    lowering: as in `compile`.
    ring: a `Ring`, as `variant` constructs it.

    >>> attention = DilatedAttention(segment_lengths=(2048, 4096), dilation_rates=(1, 2))
    >>> attention(query, key, value, is_causal=True).shape == query.shape
    True
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        *,
        offsets: str = "cyclic",
        heads: str = "all",
        lowering: str = "auto",
        ring: Ring | None = None,
    ) -> None:
        programs = {
            is_causal: self._ordered(
                longnet(segment_lengths, dilation_rates, is_causal, offsets, heads)
            )
            for is_causal in (False, True)
        }
        super().__init__(programs, softmax_scale, attention_dropout, lowering, ring)
        self.segment_lengths = arguments.integers("segment_lengths", segment_lengths, 1)
        self.dilation_rates = arguments.integers("dilation_rates", dilation_rates, 1)
        self.offsets, self.heads = offsets, heads

    @staticmethod
    def _ordered(program: Program) -> Program | PerLength:
        """The program in its order of computation."""
        return program

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        parts = [
            f"segment_lengths={self.segment_lengths}",
            f"dilation_rates={self.dilation_rates}",
            *self._options(),
        ]
        if self.offsets != "cyclic":
            parts.append(f"offsets={self.offsets!r}")
        if self.heads != "all":
            parts.append(f"heads={self.heads!r}")
        return ", ".join(parts)


class Multihead(nn.Module):
    """Projections into heads, attention, layer norm and the output projection.

    As in MAGNETO (arXiv 2210.06423). Parameters: q_proj, k_proj, v_proj, out_proj (weights
    embed_dim x embed_dim, biases if `bias`), and norm if `layer_norm`.

    attention: any module on (B, N, H, D).
    gamma_init: initial gain of v_proj and out_proj; MAGNETO derives it from the depth.
    """

    def __init__(
        self,
        attention: nn.Module,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = arguments.integer("embed_dim", embed_dim, 1)
        self.num_heads = arguments.integer("num_heads", num_heads, 1)
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads; got {embed_dim} and {num_heads}"
            )
        _refuse_dropout("dropout", dropout)
        if not _is_finite_number(gamma_init):
            raise ValueError(
                "gamma_init must be a finite number, the gain of v_proj and out_proj; "
                f"got {gamma_init!r}"
            )
        arguments.flag("bias", bias)
        self.gamma_init = gamma_init
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.attention = attention
        self.norm = None
        if arguments.flag("layer_norm", layer_norm):
            self.norm = nn.LayerNorm(embed_dim, layer_norm_eps, device=device, dtype=dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-normal weights, with gain `gamma_init` for v and out; zero biases."""
        for projection, gain in (
            (self.q_proj, 1.0),
            (self.k_proj, 1.0),
            (self.v_proj, self.gamma_init),
            (self.out_proj, self.gamma_init),
        ):
            nn.init.xavier_normal_(projection.weight, gain)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, None]:
        """Multi-head attention of embeddings.

        Args:
            query: (B, N, E).
            key, value: (B, M, E).
            key_padding_mask: bool (B, M), True where the key is padding; see `DilatedAttention`
                for padded queries.
            need_weights: refused if True.

        Returns (B, N, E), and None in place of the weights of torch.nn.MultiheadAttention.
        """
        if need_weights:
            raise ValueError(
                "need_weights=True asks for the attention weights, queries x keys of them, "
                "which are never held. Leave it out; "
                "for short sequences compiled_dilated.reference is dense and written to be read"
            )
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"{name} must be a torch.Tensor; got {type(x).__name__}. "
                    "Convert it with torch.as_tensor"
                )
            if x.dim() != 3 or x.shape[2] != self.embed_dim:
                raise ValueError(
                    f"{name} must be (batch, tokens, embed_dim={self.embed_dim}); "
                    f"got shape {tuple(x.shape)}"
                )
        x = self.attention(
            self._heads(self.q_proj(query)),
            self._heads(self.k_proj(key)),
            self._heads(self.v_proj(value)),
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
        ).flatten(2)
        return self.out_proj(x if self.norm is None else self.norm(x)), None

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(2, (self.num_heads, self.embed_dim // self.num_heads))
        return heads

    def extra_repr(self) -> str:
        """The arguments that the submodules do not print."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, gamma_init={self.gamma_init}"
        )


class MultiheadDilatedAttention(Multihead):
    """Multi-head dilated attention, compatible with the first port's signature and state dicts.

    As in that port dilation_rates comes before segment_lengths. The other arguments are those of
    `Multihead` and `DilatedAttention`.

    >>> lengths, rates = (2048, 4096), (1, 2)
    >>> attention = MultiheadDilatedAttention(512, 8, dilation_rates=rates, segment_lengths=lengths)
    >>> out, none = attention(x, x, x, is_causal=True)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dilation_rates: Sequence[int],
        segment_lengths: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        softmax_scale: float | None = None,
        offsets: str = "cyclic",
        heads: str = "all",
        lowering: str = "auto",
    ) -> None:
        attention = DilatedAttention(
            segment_lengths,
            dilation_rates,
            softmax_scale,
            offsets=offsets,
            heads=heads,
            lowering=lowering,
        )
        super().__init__(
            attention,
            embed_dim,
            num_heads,
            dropout,
            bias,
            layer_norm,
            layer_norm_eps,
            gamma_init,
            device,
            dtype,
        )


def visible(program: Program | PerLength) -> Program | PerLength:
    """The program with padding keys hidden; it reads the data tensor "padding"."""
    if isinstance(program, PerLength):
        return PerLength(visible_at, (program,), (*program.names, "padding"))
    return _visible(program)


def _visible(program: Program) -> Program:
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


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_dropout(name: str, value: float) -> None:
    if not _is_finite_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], and 0.0 at that; got {value!r}")
    if value:
        raise ValueError(
            f"{name}={value} cannot be honoured: the fused attention kernels have no dropout. "
            "Pass 0.0, which for inference is the same; "
            f"for training put torch.nn.Dropout({value}) behind the module"
        )


def _check_padding(key_padding_mask: Tensor, key: Tensor) -> Tensor:
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
