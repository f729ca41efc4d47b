"""What became of a step: predicted and measured peaks before and after, what each pass did, and who holds the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import arguments
from ..analysis import peak
from ..analysis.liveness import Lifetimes, lifetimes
from ..analysis.peak import mebibytes
from .backend import choices
from .choose import Choice, Estimate, told
from .tracing import Traced

_ROWS = 12


@dataclass(frozen=True)
class Report:
    """One Choice for each graph of a step. measured_bytes: what a call took beyond what was there before it; None if not asked.

    Prints as tables; to_json() has the same figures.
    """

    choices: tuple[Choice, ...]
    measured_bytes: int | None = None

    def __str__(self) -> str:
        parts = [_printed(number, each) for number, each in enumerate(self.choices)]
        if self.measured_bytes is not None:
            parts.append(f"measured: {mebibytes(self.measured_bytes)} beyond what was there before the call")
        return "\n\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Sizes in bytes, times in seconds."""
        graphs = [
            {
                "plain": row(each.estimates[0]),
                "chosen": row(each.chosen),
                "candidates": [row(estimate) for estimate in each.estimates],
                "changes": [{"by": repr(change.by), "lines": list(change.lines)} for change in each.traced.changes],
                "live": [{"name": name, "bytes": size, "source": source} for name, size, source in _live(each.traced)],
            }
            for each in self.choices
        ]
        return {"graphs": graphs, "measured_bytes": self.measured_bytes}


def report(step: Any, inputs: Sequence[Any] | None = None) -> Report:
    """What passes.compile made of a step that was called once. With `inputs`, the step is run on them again and measured.

    A step that takes gradients runs its backward too, of the sum of its results; gradients of parameters stay as they were.
    """
    made = choices(step)
    if inputs is None:
        return Report(made)
    inputs = arguments.inputs("inputs", inputs, getattr(step, "_orig_mod", step))
    training = any(each.traced.backward is not None for each in made)
    return Report(made, allocated_bytes(lambda: _run(step, inputs, training)))


def allocated_bytes(run: Callable[[], object]) -> int:
    """Most bytes that torch's allocator held at once during a call beyond those before it, on a GPU if there is one in use.

    On a CPU by the profiler's memory events: exact, and whatever a kernel takes past torch's allocator is not in it.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    del kept
    return most


def timelines(traced: Traced) -> list[Lifetimes]:
    """The lifetimes of a step's forward and, in training, of its backward, node by node: what inductor fuses is apart here."""
    found = [lifetimes(traced.forward)]
    if traced.backward is not None:
        own = {node.name for node in traced.forward.graph.find_nodes(op="placeholder")}
        made = {node.name for node in traced.forward.graph.nodes}
        saved = [node.name for node in traced.backward.graph.find_nodes(op="placeholder") if node.name in made - own]
        found.append(lifetimes(traced.backward, donated=saved))
    return found


def row(estimate: Estimate) -> dict[str, Any]:
    """An estimate as a row of a table, for people who read JSON."""
    return {
        "passes": [repr(each) for each in estimate.passes],
        "keeps_bits": all(each.keeps_bits for each in estimate.passes),
        "peak_bytes": estimate.peak_bytes,
        "added_bytes": estimate.added_bytes,
        "seconds": estimate.seconds,
    }


def table(estimates: Sequence[Estimate], chosen: Estimate | None = None) -> str:
    """Candidates as a table; the chosen one marked."""
    rows = [
        (
            "->" if each == chosen else "",
            told(each.passes),
            "kept" if all(by.keeps_bits for by in each.passes) else "rounding",
            mebibytes(each.peak_bytes),
            mebibytes(each.added_bytes),
            f"{each.seconds:.3g}",
        )
        for each in estimates
    ]
    return str(tabulate(rows, headers=("", "passes", "bits", "peak", "beyond inputs", "seconds (model)"), disable_numparse=True))


def _printed(number: int, choice: Choice) -> str:
    kind = "inference" if choice.traced.backward is None else "training"
    before, after = choice.estimates[0].peak_bytes, choice.chosen.peak_bytes
    lines = [f"graph {number}, {kind}: predicted peak {mebibytes(before)} -> {mebibytes(after)}"]
    lines.append(table(choice.estimates, choice.chosen))
    for change in choice.traced.changes:
        lines += [f"\n{change.by!r}" + ("" if change.lines else ": changed nothing"), *(f"  {line}" for line in change.lines)]
    lines.append("\nlive at the peak, node by node before inductor fuses them:")
    live = _live(choice.traced)
    lines += [f"{mebibytes(size):>14}  {name}  {source}".rstrip() for name, size, source in live[:_ROWS]]
    if rest := live[_ROWS:]:
        lines.append(f"{mebibytes(sum(size for _, size, _ in rest)):>14}  ({len(rest)} smaller ones)")
    return "\n".join(lines)


def _live(traced: Traced) -> list[tuple[str, int, str]]:
    """What lives at the highest point of all graphs of a step: names, bytes and lines, largest first; inputs in one row."""
    at = max((peak.find(each) for each in timelines(traced)), key=lambda each: each.peak_bytes)
    kept = [each for each in at.live if each.is_input and each.upper == len(at.lifetimes.steps)]
    made = [(each.name, each.size, each.source) for each in at.live if each not in kept and each.size]
    return [("(inputs)", sum(each.size for each in kept), ""), *made]


def _run(step: Any, inputs: Sequence[Any], training: bool) -> object:
    with torch.set_grad_enabled(training):
        results = step(*inputs)
        wanted = [each for each in pytree.tree_leaves(results) if isinstance(each, Tensor) and each.requires_grad]
        if not wanted:
            return results
        given = [each for each in pytree.tree_leaves(inputs) if isinstance(each, Tensor) and each.requires_grad]
        given += [each for each in getattr(step, "parameters", list)() if each.requires_grad]
        return torch.autograd.grad([each.sum() for each in wanted], given, allow_unused=True)
