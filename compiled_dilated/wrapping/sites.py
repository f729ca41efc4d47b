"""Sites: a model's attention layers, their programs and last calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from .. import planner, text
from ..attend import Attend
from ..masks.bounds import upper_bound
from ..plans import Plan, problem_of
from ..programs import Program
from ..symbolic import example_size

# The attribute of a layer, or of a model, with its sites.
_ATTRIBUTE = "attention_sites"
_HEADERS = ("layer", "model's mask", "computed", "lowering", "million pairs", "GFLOP", "MiB")
# The counts of a row, and the unit that the table prints them in.
_UNITS = {"pairs": 1e6, "flops": 1e9, "bytes": 2**20}
_LEGEND = "<=: the program reads data that only a call has; counted are all pairs it may allow"
_LONGEST_MASKS = 60


@dataclass(frozen=True)
class _Call:
    """Shapes of a call, and its program."""

    attend: Attend
    model_mask: str
    q_offset: int
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def plan(self) -> Plan:
        """The plan of the call."""
        operands: list[Tensor] = []
        program = self.attend.program
        # Programs per length are only made by variants, which no layer has.
        assert isinstance(program, Program)
        _, program = text.traced(program, operands)
        shapes = self.q_shape, self.k_shape, self.v_shape
        problem = problem_of(program, *shapes, self.dtype, self.device, self.q_offset, False)
        return planner.exact_plan_for(problem)


class Site:
    """One attention layer.

    path: of its module in the model.
    kind: name of the module's class.
    program: the layer's own; None for the model's own mask.
    """

    def __init__(self, path: str, kind: str, program: Program | None) -> None:
        self.path, self.kind, self.program = path, kind, program
        self.last: _Call | None = None

    def note(
        self,
        attend: Attend,
        model_mask: str,
        q_offset: int,
        q_shape: Sequence[Any],
        k_shape: Sequence[Any],
        v_shape: Sequence[Any],
        dtype: torch.dtype,
        device: str,
    ) -> None:
        """Record a call for the table; symbolic sizes by their example.

        model_mask: the model's own mask, as text.
        """
        q, k, v = [tuple(map(example_size, shape)) for shape in (q_shape, k_shape, v_shape)]
        self.last = _Call(attend, model_mask, q_offset, q, k, v, dtype, device)

    def to_json(self) -> dict[str, Any]:
        """A row of the table; without counts before the first call.

        model, program: the model's own mask, and the program that was computed.
        pairs: computed, over batch and heads.
        share: `pairs` divided by all pairs.
        at_most: whether the program reads data, so that pairs, share and flops are upper bounds.
        flops: of a forward.
        bytes: allocated beside q, k, v and out.
        pairs_eager, flops_eager, bytes_eager: of eager attention, with all pairs and their scores.
        """
        row: dict[str, Any] = {"path": self.path, "kind": self.kind, "model": None, "program": None}
        if self.program is not None:
            row["program"] = repr(self.program)
        if self.last is None:
            return row
        plan = self.last.plan()
        program = plan.problem.program
        batch, heads, q_len, head_dim = self.last.q_shape
        dense = batch * heads * q_len * self.last.k_shape[2]
        return row | {
            "model": self.last.model_mask,
            "program": repr(self.last.attend.program),
            "lowering": plan.lowering,
            "pairs": plan.cost.pairs,
            "share": plan.cost.pairs / dense if dense else 0.0,
            "at_most": program.map(upper_bound) != program,
            "flops": plan.cost.kernel_flops,
            "bytes": plan.cost.peak_bytes,
            "pairs_eager": dense,
            "flops_eager": 2 * dense * (head_dim + self.last.v_shape[3]),
            "bytes_eager": dense * plan.problem.itemsize,
        }


class Sites(list[Site]):
    """A model's sites, printed as a table of counts.

    Counts are printed as those of eager attention -> those of the computed program.
    """

    def __repr__(self) -> str:
        cells, has_bounds = [], False
        for site in self:
            row = site.to_json()
            has_bounds |= row.get("at_most", False)
            cells.append([row["path"], row["model"] or "", _masks_of(site), *_counts(row)])
        table = str(tabulate(cells, _HEADERS, disable_numparse=True))
        if has_bounds:
            return f"{table}\n{_LEGEND}"
        return table


def _counts(row: dict[str, Any]) -> list[str]:
    """The lowering, and counts of eager attention and of what was computed."""
    if "pairs" not in row:
        return ["not called yet", *[""] * len(_UNITS)]
    cells = [row["lowering"]]
    for name, unit in _UNITS.items():
        bound = ""
        if row["at_most"] and name != "bytes":
            bound = "<= "
        cells.append(f"{row[f'{name}_eager'] / unit:.3g} -> {bound}{row[name] / unit:.3g}")
    return cells


def _masks_of(site: Site) -> str:
    """The masks of a site's branches, shortened."""
    program: object = site.program
    if site.last is not None:
        program = site.last.attend.program
    if not isinstance(program, Program):
        return ""
    masks = "; ".join(str(branch.mask) for branch in program.branches)
    if len(masks) > _LONGEST_MASKS:
        return masks[: _LONGEST_MASKS - 3] + "..."
    return masks


def put_sites(module: nn.Module, of_module: Sequence[Site]) -> None:
    """Attach sites to a layer, or all sites to a model."""
    setattr(module, _ATTRIBUTE, Sites(of_module))


def sites_of(module: nn.Module) -> Sites | None:
    """The sites that are attached to a module itself."""
    return getattr(module, _ATTRIBUTE, None)


def sites(model: nn.Module) -> Sites:
    """The attention layers of a wrapped model.

    Printed, they are a table of what the last call computed.

    Raises ValueError for a model that was not wrapped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    of_model = Sites()
    is_wrapped = False
    for module in model.modules():
        of_module = sites_of(module)
        if of_module is not None:
            is_wrapped = True
            of_model += of_module
    if not is_wrapped:
        raise ValueError(
            f"{type(model).__name__} has no sites; wrap it first: "
            "compiled_dilated.compile(model, attention=...)"
        )
    return of_model
