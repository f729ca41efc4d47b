"""Projections into heads, attention, layer norm and the output projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import arguments
from .attention import DilatedAttention
from .refusals import is_finite_number, refuse_dropout


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
        refuse_dropout("dropout", dropout)
        if not is_finite_number(gamma_init):
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
        # MAGNETO's norm between the attention and the output projection.
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
                "which are never in memory. Leave it out; "
                "for short sequences compiled_dilated.reference is dense and written to be read"
            )
        self._check_embeddings(query, key, value)
        # The heads are views of the projections, which the attention reads in place.
        x = self.attention(
            self._heads(self.q_proj(query)),
            self._heads(self.k_proj(key)),
            self._heads(self.v_proj(value)),
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
        ).flatten(2)
        if self.norm is not None:
            x = self.norm(x)
        return self.out_proj(x), None

    def _check_embeddings(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raise unless all are tensors (batch, tokens, embed_dim)."""
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

    def _heads(self, x: Tensor) -> Tensor:
        """View of a projection, (B, N, H, D)."""
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
