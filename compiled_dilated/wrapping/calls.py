"""What stands in a graph for scaled_dot_product_attention: attention by the site's program and what the call's mask says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import masks
from ..attend import Attend
from ..masks import Mask
from ..masks.bands import Causal, Window
from ..mods import ScoreMod
from ..programs import Program, as_program
from .expressions import TRUE, Expression, evaluate, indices_of
from .scores import added
from .sites import Site
from .structure import Structure

Condition = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def digest(*parts: Any) -> str:
    """A name for what is computed, equal by value."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Attention:
    """Attention of one call.

    line: where the model calls it, for messages. structure: what its mask says, where that was read.
    """

    def __init__(self, site: Site, line: str, structure: Structure | None = None) -> None:
        self.site, self.line = site, line
        self.structure = Structure() if structure is None else structure
        # Plans of graphs are kept by their code, in which this name stands.
        self.__name__ = f"attention_{digest(site.program, self.structure)}"
        self._attends = {causal: Attend(self._program(causal)) for causal in (False, True)}

    def _program(self, causal: bool) -> Program:
        """The program of a call that says is_causal, or not."""
        program = self.site.program or as_program(masks.causal() if causal else masks.full())
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

        attn_mask: one that was not read. captured: tensors that the structure reads.
        """
        if dropout_p:
            raise NotImplementedError(
                f"dropout of attention weights ({dropout_p}) is not computed{self.line}. Set it to 0"
            )
        if key.shape[-3:-2] != query.shape[-3:-2] and not enable_gqa:
            raise ValueError(
                f"{query.shape[-3]} query heads and {key.shape[-3]} key heads need enable_gqa=True{self.line}"
            )
        if key.shape[:-3] != query.shape[:-3] or value.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"query, key and value must have the same leading dimensions; got {tuple(query.shape)}, {tuple(key.shape)} and "
                f"{tuple(value.shape)}{self.line}"
            )
        q, k, v = (_four(x) for x in (query, key, value))
        whole = None if attn_mask is None else _four_of_mask(attn_mask, query)
        said = [
            part
            for part in ("causal()" if is_causal else "", str(self.structure))
            if part not in ("", "full()")
        ]
        if whole is not None:
            said.append("a mask" if whole.dtype == torch.bool else "a bias")
        score_mod = None if whole is None else added(whole)
        out = self.attend(
            q,
            k,
            v,
            " & ".join(said) or "full()",
            captured,
            score_mod,
            is_causal=is_causal,
            scale=scale,
        )
        result: Tensor = out.reshape(*query.shape[:-1], value.shape[-1])
        return result

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        said: str,
        captured: Sequence[Any] = (),
        score_mod: ScoreMod | None = None,
        *,
        is_causal: bool = False,
        conditions: Sequence[Condition] = (),
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Attention over (B, H, N, D), noted at the site.

        said: what the model says of its mask. score_mod: of the call, before what the structure adds. conditions: further ones,
        asked pair by pair.
        """
        attend = self._attends[is_causal]
        self.site.note(attend, said, 0, q.shape, k.shape, v.shape, q.dtype, q.device.type)
        data = self._data(attend.program.names, captured, k)
        mod = with_structure(score_mod, self.structure, conditions, captured)
        return attend(q, k, v, scale=scale, data=data, score_mod=mod, return_lse=return_lse)

    def _data(self, names: Sequence[str], captured: Sequence[Any], k: Tensor) -> dict[str, Tensor]:
        """The data tensors (B or 1, M) that masks read."""
        batch, keys = k.shape[0], k.shape[2]
        places = {
            "b": torch.arange(batch, device=k.device)[:, None],
            "kv": torch.arange(keys, device=k.device)[None],
        }
        data = {}
        for name in names:
            entry = self.structure.data[name]
            rows = batch if "b" in indices_of(entry) else 1
            entries = torch.as_tensor(evaluate(entry, places, captured), device=k.device)
            data[name] = entries.expand(rows, keys)
        return data


def joined(program: Program, others: Sequence[Mask]) -> Program:
    """A program under further masks; those that a branch has anyway are left out."""

    def with_others(mask: Mask) -> Mask:
        own = masks.conjuncts(mask)
        return masks.conjunction((*own, *(other for other in others if not _implied(other, own))))

    return program.map(with_others) if others else program


def _implied(mask: Mask, conjuncts: Sequence[Mask]) -> bool:
    """Whether some masks that a program has say a further one."""
    if mask in conjuncts:
        return True
    windows = [own for own in conjuncts if isinstance(own, Window)]
    if isinstance(mask, Causal):
        return any(own.right == 0 for own in windows)
    if isinstance(mask, Window) and mask.dilation == 1:
        return any(own.left <= mask.left and own.right <= mask.right for own in windows)
    return False


def with_structure(
    score_mod: ScoreMod | None,
    structure: Structure,
    conditions: Sequence[Condition],
    captured: Sequence[Any],
) -> ScoreMod | None:
    """A score_mod that also adds and hides what a structure says pair by pair; None where nothing does."""
    if score_mod is None and structure.bias is None and structure.pairs == TRUE and not conditions:
        return None

    def modified(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        places = {"b": b, "h": h, "q": q, "kv": kv}
        out = score if score_mod is None else score_mod(score, b, h, q, kv)
        if structure.bias is not None:
            out = out + evaluate(structure.bias, places, captured)
        for condition in conditions:
            out = torch.where(condition(b, h, q, kv), out, -torch.inf)
        if structure.pairs != TRUE:
            out = torch.where(_seen(structure.pairs, places, captured), out, -torch.inf)
        return out

    return modified


def _seen(condition: Expression, places: Mapping[str, Tensor], captured: Sequence[Any]) -> Tensor:
    seen: Tensor = evaluate(condition, places, captured)
    return seen


def _four(x: Tensor) -> Tensor:
    """(batch, heads, tokens, width) of a tensor with any leading dimensions; of three the first is the batch."""
    if x.dim() == 4:
        return x
    if x.dim() < 4:
        return x[None, None] if x.dim() == 2 else x[:, None]
    return x.reshape(-1, *x.shape[-3:])


def _four_of_mask(mask: Tensor, query: Tensor) -> Tensor:
    """(batch or 1, heads or 1, queries or 1, keys or 1) of a mask that broadcasts to the scores of a query."""
    while mask.dim() < max(query.dim(), 2):
        mask = mask[None]
    if query.dim() <= 4:
        return _four(mask)
    # Leading dimensions are joined: each must be there whole.
    return mask.expand(*query.shape[:-3], *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
