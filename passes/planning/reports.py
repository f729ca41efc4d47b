"""Reports on a compiled step: predicted and measured peaks, changes, live storages."""

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
from .candidates import described
from .choose import Choice
from .estimates import Estimate
from .tracing import Traced

_ROWS = 12


@dataclass(frozen=True)
class Report:
    """The choice for each graph of a step.

    Prints as tables; to_json() has the same figures.

    measured_bytes: the peak of a call beyond what was allocated before it; None if not measured
    """

    choices: tuple[Choice, ...]
    measured_bytes: int | None = None

    def __str__(self) -> str:
        parts = [_printed(number, choice) for number, choice in enumerate(self.choices)]
        if self.measured_bytes is not None:
            measured = mebibytes(self.measured_bytes)
            parts.append(f"measured: {measured} beyond what was allocated before the call")
        return "\n\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON value, sizes in bytes, times in seconds."""
        graphs: list[dict[str, Any]] = []
        for choice in self.choices:
            changes: list[dict[str, Any]] = []
            for change in choice.traced.changes:
                changes.append({"by": repr(change.by), "lines": list(change.lines)})
            live: list[dict[str, Any]] = []
            for name, size, source in _live(choice.traced):
                live.append({"name": name, "bytes": size, "source": source})
            graphs.append(
                {
                    "plain": row(choice.estimates[0]),
                    "chosen": row(choice.chosen),
                    "candidates": list(map(row, choice.estimates)),
                    "changes": changes,
                    "live": live,
                }
            )
        return {"graphs": graphs, "measured_bytes": self.measured_bytes}


def report(step: Any, inputs: Sequence[Any] | None = None) -> Report:
    """Report on a step of passes.compile that was called once.

    inputs: if given, the step is run on them and measured; a training step with its backward, of
        the sum of its results. Gradients of parameters are not changed.
    """
    chosen = choices(step)
    if inputs is None:
        return Report(chosen)
    inputs = arguments.inputs("inputs", inputs, getattr(step, "_orig_mod", step))
    training = any(choice.traced.backward is not None for choice in chosen)
    return Report(chosen, allocated_bytes(lambda: _run(step, inputs, training)))


def allocated_bytes(run: Callable[[], object]) -> int:
    """The peak of torch's allocator in a call, beyond the bytes before.

    On a GPU if one is in use. On a CPU by the profiler's memory events: exact, without what kernels
    allocate by other means.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        results = run()
    all_events = profiler.profiler.kineto_results.events()
    events = [event for event in all_events if event.name() == "[memory]"]
    # An event is an allocation, or a release with negative bytes.
    allocated = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        most = max(most, allocated)
    del results  # not freed while the profiler ran
    return most


def timelines(traced: Traced) -> list[Lifetimes]:
    """Lifetimes of a step's forward and backward, if any, before fusion."""
    graphs = [lifetimes(traced.forward)]
    if traced.backward is not None:
        inputs = {node.name for node in traced.forward.graph.find_nodes(op="placeholder")}
        computed = {node.name for node in traced.forward.graph.nodes} - inputs
        # The backward frees the values that the forward computed for it.
        placeholders = traced.backward.graph.find_nodes(op="placeholder")
        saved = [node.name for node in placeholders if node.name in computed]
        graphs.append(lifetimes(traced.backward, donated=saved))
    return graphs


def row(estimate: Estimate) -> dict[str, Any]:
    """An estimate as a JSON value."""
    return {
        "passes": list(map(repr, estimate.passes)),
        "keeps_bits": _keeps_bits(estimate),
        "peak_bytes": estimate.peak_bytes,
        "added_bytes": estimate.added_bytes,
        "seconds": estimate.seconds,
    }


def table(estimates: Sequence[Estimate], chosen: Estimate | None = None) -> str:
    """Candidates as a table, the chosen one marked."""
    rows: list[tuple[str, ...]] = []
    for estimate in estimates:
        mark = "->" if estimate == chosen else ""
        bits = "kept" if _keeps_bits(estimate) else "rounding"
        peaks = (mebibytes(estimate.peak_bytes), mebibytes(estimate.added_bytes))
        seconds = f"{estimate.seconds:.3g}"
        rows.append((mark, described(estimate.passes), bits, *peaks, seconds))
    headers = ("", "passes", "bits", "peak", "beyond inputs", "seconds (model)")
    return str(tabulate(rows, headers=headers, disable_numparse=True))


def _keeps_bits(estimate: Estimate) -> bool:
    return all(member.keeps_bits for member in estimate.passes)


def _printed(number: int, choice: Choice) -> str:
    """The report on one graph as text: peaks, candidates, changes, live storages."""
    # Peaks and candidates.
    kind = "inference" if choice.traced.backward is None else "training"
    before, after = choice.estimates[0].peak_bytes, choice.chosen.peak_bytes
    lines = [f"graph {number}, {kind}: predicted peak {mebibytes(before)} -> {mebibytes(after)}"]
    lines.append(table(choice.estimates, choice.chosen))
    # What each pass changed.
    for change in choice.traced.changes:
        title = f"\n{change.by!r}"
        if not change.lines:
            title += ": changed nothing"
        lines.append(title)
        for line in change.lines:
            lines.append(f"  {line}")
    # The largest storages.
    lines.append("\nlive at the peak, node by node before inductor fuses them:")
    live = _live(choice.traced)
    for name, size, source in live[:_ROWS]:
        lines.append(f"{mebibytes(size):>14}  {name}  {source}".rstrip())
    if smaller := live[_ROWS:]:
        smaller_bytes = sum(size for _, size, _ in smaller)
        lines.append(f"{mebibytes(smaller_bytes):>14}  ({len(smaller)} smaller ones)")
    return "\n".join(lines)


def _live(traced: Traced) -> list[tuple[str, int, str]]:
    """The storages live at the highest peak of a step's graphs.

    Name, bytes and source line, largest first, after the inputs in one row.
    """
    peaks = map(peak.find, timelines(traced))
    highest = max(peaks, key=lambda graph_peak: graph_peak.peak_bytes)
    end = len(highest.lifetimes.steps)
    rows: list[tuple[str, int, str]] = []
    input_bytes = 0
    for storage in highest.live:
        if storage.is_input and storage.upper == end:
            input_bytes += storage.size
        elif storage.size:
            rows.append((storage.name, storage.size, storage.source))
    return [("(inputs)", input_bytes, ""), *rows]


def _run(step: Any, inputs: Sequence[Any], training: bool) -> object:
    """Run a step, with its backward if results require gradients.

    Returns the gradients, or without a backward the results.
    """

    def differentiable(values: Any) -> list[Tensor]:
        tensors: list[Tensor] = []
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                tensors.append(leaf)
        return tensors

    with torch.set_grad_enabled(training):
        results = step(*inputs)
        outputs = differentiable(results)
        if not outputs:
            return results
        # A function has no parameters.
        parameters = list(getattr(step, "parameters", list)())
        sources = differentiable(inputs) + differentiable(parameters)
        losses = [output.sum() for output in outputs]
        return torch.autograd.grad(losses, sources, allow_unused=True)
