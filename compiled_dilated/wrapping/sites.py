"""Where a model computes attention: the programs there, and what the last calls computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from .. import planner, text
from ..attend import Attend
from ..plans import Plan, problem_of
from ..programs import Program

# The attribute of a layer, or of a model, that holds its sites.
_ATTRIBUTE = "attention_sites"


@dataclass(frozen=True)
class _Call:
    """Shapes of a call, and what it computed."""

    attend: Attend
    said: str
    q_offset: int
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def plan(self) -> Plan:
        operands: list[Tensor] = []
        program = self.attend.program
        assert isinstance(program, Program)  # of a length alone are variants, which no layer has
        _, program = text.traced(program, operands)
        shapes = self.q_shape, self.k_shape, self.v_shape
        problem = problem_of(program, *shapes, self.dtype, self.device, self.q_offset, False)
        return planner.plan_for(problem)


class Site:
    """One attention layer.

    path: of its module in the model. kind: the name of its class. program: its own; None: the model's structure stays.
    """

    def __init__(self, path: str, kind: str, program: Program | None) -> None:
        self.path, self.kind, self.program = path, kind, program
        self.last: _Call | None = None

    def note(
        self, attend: Attend, said: str, q_offset: int, q_shape: Sequence[Any], k_shape: Sequence[Any], v_shape: Sequence[Any],
        dtype: torch.dtype, device: str,
    ) -> None:  # fmt: skip
        """Remember a call for the table: `said` is what the model says of its mask; of varying sizes those of an example."""
        q, k, v = [tuple(map(_example, shape)) for shape in (q_shape, k_shape, v_shape)]
        self.last = _Call(attend, said, q_offset, q, k, v, dtype, device)

    def to_json(self) -> dict[str, Any]:
        """A row of the table; without counts before the first call.

        pairs: computed over batch and heads; share: of all pairs; flops: of a forward; bytes: held beside q, k, v and out.
        pairs_eager, flops_eager, bytes_eager: of an eager layer, which computes all pairs and holds their scores.
        """
        row: dict[str, Any] = {"path": self.path, "kind": self.kind, "model": None, "program": None}
        if self.program is not None:
            row["program"] = repr(self.program)
        if self.last is None:
            return row
        plan = self.last.plan()
        batch, heads, q_len, _ = self.last.q_shape
        dense = batch * heads * q_len * self.last.k_shape[2]
        row |= {
            "model": self.last.said,
            "program": repr(self.last.attend.program),
            "lowering": plan.lowering,
            "pairs": plan.cost.pairs,
            "share": plan.cost.pairs / dense if dense else 0.0,
            "flops": plan.cost.kernel_flops,
            "bytes": plan.cost.peak_bytes,
            "pairs_eager": dense,
            "flops_eager": 2 * dense * (self.last.q_shape[3] + self.last.v_shape[3]),
            "bytes_eager": dense * plan.problem.itemsize,
        }
        return row


class Sites(list[Site]):
    """A model's sites; prints as a table: of an eager layer -> computed here."""

    def __repr__(self) -> str:
        rows = []
        for site in self:
            row = site.to_json()
            counts = ["not called yet"] + [""] * 3
            if "pairs" in row:
                units = {"pairs": 1e6, "flops": 1e9, "bytes": 2**20}
                changes = [
                    f"{row[f'{name}_eager'] / unit:.3g} -> {row[name] / unit:.3g}"
                    for name, unit in units.items()
                ]
                counts = [row["lowering"], *changes]
            program = site.program if site.last is None else site.last.attend.program
            rows.append(
                [
                    row["path"],
                    row["model"] or "",
                    "" if program is None else _shown(program),
                    *counts,
                ]
            )
        headers = [
            "layer",
            "the model says",
            "computed",
            "lowering",
            "million pairs",
            "GFLOP",
            "MiB held",
        ]
        return str(tabulate(rows, headers, disable_numparse=True))


def _shown(program: Any, most: int = 60) -> str:
    """A program's masks, one after the other, cut to so many characters."""
    written = "; ".join(repr(branch.mask) for branch in program.branches)
    return written if len(written) <= most else written[: most - 3] + "..."


def _example(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def put_sites(module: nn.Module, of_module: Sequence[Site]) -> None:
    """Keep sites at a layer, or at a model that has them all."""
    setattr(module, _ATTRIBUTE, Sites(of_module))


def sites_of(module: nn.Module) -> Sites | None:
    """The sites that a module has itself."""
    return getattr(module, _ATTRIBUTE, None)


def sites(model: nn.Module) -> Sites:
    """The attention layers of a wrapped model; `print(sites(model))` after a call is a table of what they computed.

    Raises ValueError for a model that was not wrapped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    of_model = Sites()
    wrapped = False
    for module in model.modules():
        own = sites_of(module)
        wrapped = wrapped or own is not None
        of_model += own or []
    if not wrapped:
        raise ValueError(
            f"{type(model).__name__} has no sites; wrap it first: compiled_dilated.compile(model, attention=...)"
        )
    return of_model
