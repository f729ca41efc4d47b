"""The attention layers of one model: their own programs, and what their last calls computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from .. import planner, text
from ..attend import Attend
from ..plans import Plan, problem_of
from ..programs import Program
from .visible import PACKED, PADDING, Visible, joined_with

# The attribute of a layer that holds its site.
_ATTRIBUTE = "attention_site"


@dataclass(frozen=True)
class _Call:
    """Shapes of a call, and what it computed."""

    attend: Attend
    structure: str
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
        self._attends: dict[tuple[str, ...], Attend] = {}
        if program is None:
            return
        # All of them now: none may be made in a trace.
        for joined in ((), (PADDING,), (PACKED,), (PACKED, PADDING)):
            self._attends[joined] = Attend(joined_with(program, joined))

    def attend(self, joined: tuple[str, ...]) -> Attend:
        """Attention by the layer's own program and by data of a call."""
        return self._attends[joined]

    def note(self, attend: Attend, visible: Visible, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Remember a call, for the table of sites."""
        # Where a static cache counts on the device the first query is not asked for.
        q_offset = 0 if isinstance(visible.q_offset, Tensor) else int(visible.q_offset)
        shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
        self.last = _Call(attend, visible.structure, q_offset, *shapes, query.dtype, query.device.type)

    def to_json(self) -> dict[str, Any]:
        """A row of the table; without counts before the first call.

        pairs: computed over batch and heads; share: of all pairs; flops: of a forward; bytes: held beside q, k, v and out, and
        what the scores of an eager layer would be.
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
            "model": self.last.structure,
            "program": repr(self.last.attend.program),
            "lowering": plan.lowering,
            "pairs": plan.cost.pairs,
            "share": plan.cost.pairs / dense if dense else 0.0,
            "flops": plan.cost.kernel_flops,
            "bytes": plan.cost.peak_bytes,
            "bytes_eager": dense * plan.problem.itemsize,
        }
        return row


class Sites(list[Site]):
    """A model's sites; prints as a table."""

    def __repr__(self) -> str:
        rows = []
        for site in self:
            row = site.to_json()
            counts = ["not called yet"] + [""] * 4
            if "pairs" in row:
                counts = [
                    row["lowering"],
                    f"{row['share']:.3f}",
                    f"{row['flops'] / 1e9:.3g}",
                    f"{row['bytes'] / 2**20:.3g}",
                    f"{row['bytes_eager'] / 2**20:.3g}",
                ]
            rows.append([row["path"], row["model"] or "", _short(row["program"] or ""), *counts])
        headers = ["layer", "the model says", "computed", "lowering", "of all pairs", "GFLOP", "MiB held", "MiB of eager scores"]
        return str(tabulate(rows, headers))


def _short(written: str, most: int = 60) -> str:
    written = written.removeprefix("Program((Branch(").removesuffix("),))")
    return written if len(written) <= most else written[: most - 3] + "..."


def put_site(module: nn.Module, site: Site) -> None:
    """Give a layer its site."""
    setattr(module, _ATTRIBUTE, site)


def site_of(module: nn.Module) -> Site | None:
    """The site that `wrap` put on a layer."""
    return getattr(module, _ATTRIBUTE, None)


def sites(model: nn.Module) -> Sites:
    """The attention layers of a wrapped model; `print(sites(model))` after a call is a table of what they computed.

    Raises ValueError for a model that was not wrapped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    of_model = Sites(site for module in model.modules() if (site := site_of(module)) is not None)
    if not of_model:
        raise ValueError(f"{type(model).__name__} has no sites; wrap it first: compiled_dilated.compile(model, attention=...)")
    return of_model
