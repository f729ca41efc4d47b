"""Attention by a program over (batch, tokens, heads, head_dim), without parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .. import arguments, checks
from ..attend import Attend
from ..programs import PerLength, Program, longnet
from ..ring.rings import Ring
from .padding import checked_padding, visible
from .refusals import refuse_dropout


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
        refuse_dropout("attention_dropout", attention_dropout)
        self.softmax_scale = softmax_scale
        self.lowering = lowering
        # By (is_causal, whether there is padding).
        self._attends: dict[tuple[bool, bool], Attend] = {}
        for is_causal, program in programs.items():
            for is_padded, joined in ((False, program), (True, visible(program))):
                attend = Attend(joined, lowering, ring, tensor_layout=checks.TOKENS_FIRST)
                self._attends[is_causal, is_padded] = attend

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
        checks.warn_of_swapped_axes(query, checks.TOKENS_FIRST)
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
            data = {"padding": checked_padding(key_padding_mask, key)}
        # Views: the core takes heads before tokens.
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
