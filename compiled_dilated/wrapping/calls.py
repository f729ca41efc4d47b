"""Replacement of scaled_dot_product_attention in a graph.

The site's program is computed under the call's mask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import masks
from ..attend import Attend
from ..masks import Mask
from ..masks.bands import Causal, Window
from ..mods import ScoreMod
from ..programs import Program, as_program
from .data import names_of
from .reading.expressions import TRUE, evaluate, indices_of
from .scores import added
from .sites import Site
from .structures.structure import Structure

Condition = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def digest(*parts: Any) -> str:
    """A short name of values; equal for equal values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Attention:
    """Attention of one call in a graph.

    line: source line of the call, for messages.
    structure: of the call's mask, if that was read.

    `captured` of a call: the tensors that the structure reads, then the data of the site's program.
    """

    def __init__(self, site: Site, line: str, structure: Structure | None = None) -> None:
        self.site, self.line = site, line
        self.structure = structure or Structure()
        self._names = names_of([site.program])
        # Caches of compiled graphs are keyed by their code, which contains this name.
        self.__name__ = f"attention_{digest(site.program, self.structure)}"
        self._attends = {causal: Attend(self._program(causal)) for causal in (False, True)}

    def _program(self, causal: bool) -> Program:
        """The program of a call with this is_causal."""
        program = self.site.program
        if program is None:
            program = as_program(masks.causal() if causal else masks.full())
        return joined(program, self.structure.masks)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        captured: Sequence[Any] = (),
    ) -> Tensor:
        """scaled_dot_product_attention over (..., heads, tokens, width).

        attn_mask: one that was not read.
        """
        self._check(query, key, value, dropout_p, enable_gqa)
        q, k, v = (_four(x) for x in (query, key, value))
        # A mask tensor hides or biases pairs one by one.
        score_mod = None
        if attn_mask is not None:
            attn_mask = _four_of_mask(attn_mask, query)
            score_mod = added(attn_mask)
        model_mask = self._model_mask(is_causal, attn_mask)
        out = self.attend(
            q, k, v, model_mask, captured, score_mod, is_causal=is_causal, scale=scale
        )
        result: Tensor = out.reshape(*query.shape[:-1], value.shape[-1])
        return result

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, enable_gqa: bool
    ) -> None:
        if dropout_p:
            raise NotImplementedError(
                f"dropout of attention weights ({dropout_p}) is not computed{self.line}. "
                "Set it to 0"
            )
        if key.shape[-3:-2] != query.shape[-3:-2] and not enable_gqa:
            raise ValueError(
                f"{query.shape[-3]} query heads and {key.shape[-3]} key heads need "
                f"enable_gqa=True{self.line}"
            )
        if key.shape[:-3] != query.shape[:-3] or value.shape[:-3] != query.shape[:-3]:
            shapes = f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            raise ValueError(
                "query, key and value must have the same leading dimensions; "
                f"got {shapes}{self.line}"
            )

    def _model_mask(self, is_causal: bool, attn_mask: Tensor | None) -> str:
        """The masks of a call as text, for the table of sites."""
        parts = []
        if is_causal:
            parts.append("causal()")
        structure = str(self.structure)
        if structure != "full()":
            parts.append(structure)
        if attn_mask is not None:
            parts.append("a mask" if attn_mask.dtype == torch.bool else "a bias")
        return " & ".join(parts) or "full()"

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        model_mask: str,
        captured: Sequence[Any] = (),
        score_mod: ScoreMod | None = None,
        *,
        is_causal: bool = False,
        conditions: Sequence[Condition] = (),
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Attention over (B, H, N, D), recorded at the site.

        model_mask: the model's own mask, as text.
        score_mod: of the call; applied before the structure's bias.
        conditions: mask_mods that are evaluated per pair.
        """
        attend = self._attends[is_causal]
        self.site.note(attend, model_mask, 0, q.shape, k.shape, v.shape, q.dtype, q.device.type)
        data = self._data(attend.program.names, captured, k)
        mod = with_structure(score_mod, self.structure, conditions, captured)
        return attend(q, k, v, scale=scale, data=data, score_mod=mod, return_lse=return_lse)

    def _data(self, names: Sequence[str], captured: Sequence[Any], k: Tensor) -> dict[str, Tensor]:
        """The data tensors (B or 1, M) that masks read."""
        passed = captured[len(captured) - len(self._names) :]
        data = dict(zip(self._names, passed, strict=True))
        batch, keys = k.shape[0], k.shape[2]
        indices = {
            "b": torch.arange(batch, device=k.device)[:, None],
            "kv": torch.arange(keys, device=k.device)[None],
        }
        for name in names:
            if name in data:
                continue
            entry = self.structure.data[name]
            rows = batch if "b" in indices_of(entry) else 1
            entries = torch.as_tensor(evaluate(entry, indices, captured), device=k.device)
            data[name] = entries.expand(rows, keys)
        return data


def joined(program: Program, added_masks: Sequence[Mask]) -> Program:
    """A program under further masks, without those that a branch implies anyway."""

    def under_masks(mask: Mask) -> Mask:
        conjuncts = masks.conjuncts(mask)
        further = [extra for extra in added_masks if not _implied(extra, conjuncts)]
        return masks.conjunction((*conjuncts, *further))

    if not added_masks:
        return program
    return program.map(under_masks)


def _implied(mask: Mask, conjuncts: Sequence[Mask]) -> bool:
    """Whether masks together allow no pair outside of a further mask."""
    if mask in conjuncts:
        return True
    windows = [conjunct for conjunct in conjuncts if isinstance(conjunct, Window)]
    if isinstance(mask, Causal):
        return any(window.right == 0 for window in windows)
    if isinstance(mask, Window) and mask.dilation == 1:
        return any(window.left <= mask.left and window.right <= mask.right for window in windows)
    return False


def with_structure(
    score_mod: ScoreMod | None,
    structure: Structure,
    conditions: Sequence[Condition],
    captured: Sequence[Any],
) -> ScoreMod | None:
    """A score_mod joined with a structure's bias and conditions per pair.

    None if there is nothing to apply.
    """
    if score_mod is None and structure.bias is None and structure.pairs == TRUE and not conditions:
        return None

    def modified(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        indices = {"b": b, "h": h, "q": q, "kv": kv}
        out = score
        if score_mod is not None:
            out = score_mod(score, b, h, q, kv)
        if structure.bias is not None:
            out = out + evaluate(structure.bias, indices, captured)
        for condition in conditions:
            out = torch.where(condition(b, h, q, kv), out, -torch.inf)
        if structure.pairs != TRUE:
            seen = evaluate(structure.pairs, indices, captured)
            out = torch.where(seen, out, -torch.inf)
        return out

    return modified


def _four(x: Tensor) -> Tensor:
    """A tensor of any leading dimensions as (batch, heads, tokens, width).

    The first of three dimensions is the batch.
    """
    if x.dim() == 2:
        return x[None, None]
    if x.dim() == 3:
        return x[:, None]
    if x.dim() == 4:
        return x
    return x.reshape(-1, *x.shape[-3:])


def _four_of_mask(mask: Tensor, query: Tensor) -> Tensor:
    """A mask that broadcasts to the scores, in four dimensions.

    They are (batch or 1, heads or 1, queries or 1, keys or 1).
    """
    while mask.dim() < max(query.dim(), 2):
        mask = mask[None]
    if query.dim() <= 4:
        return _four(mask)
    # Leading dimensions become one batch, so the mask is expanded along them.
    return mask.expand(*query.shape[:-3], *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
