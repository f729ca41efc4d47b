"""The step of a graph with most live bytes, and its storages.

print(peak.find(liveness.lifetimes(graph)))

peak 18.1 MiB at step 9 of 15, gelu: 16.0 MiB beyond 2.1 MiB of inputs
       8.0 MiB  addmm  [7, 10)       model.py:12 in forward: return self.down(F.gelu(self.up(x)))
       8.0 MiB  gelu   [9, 13)       model.py:12 in forward: return self.down(F.gelu(self.up(x)))
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .. import arguments
from .liveness import Lifetimes, Storage

_ROWS = 24
_WIDTH = 72
_LAYERS = 40
_SHADES = " .:-=+*#%@"


@dataclass(frozen=True)
class Peak:
    """The first step at which most bytes are live.

    Prints as a table of the live storages.
    """

    lifetimes: Lifetimes
    step: int

    @property
    def node(self) -> str:
        return self.lifetimes.steps[self.step]

    @property
    def peak_bytes(self) -> int:
        """Live bytes at the peak, inputs included."""
        return int(self.lifetimes.bytes_at[self.step])

    @property
    def input_bytes(self) -> int:
        """Live bytes before the first step."""
        return self.lifetimes.input_bytes

    @property
    def added_bytes(self) -> int:
        """The peak beyond the inputs.

        Negative if the graph frees inputs and allocates little.
        """
        return self.peak_bytes - self.input_bytes

    @property
    def nested_bytes(self) -> int:
        """Peak bytes of a subgraph that runs at this step."""
        return self.lifetimes.nested[self.step]

    @property
    def live(self) -> tuple[Storage, ...]:
        """The storages live at the peak, largest first."""
        live = [storage for storage in self.lifetimes.storages if _is_live(storage, self.step)]
        return tuple(sorted(live, key=_by_size))

    def __str__(self) -> str:
        allocated = [storage for storage in self.live if not storage.is_input and storage.size]
        width = max((len(storage.name) for storage in allocated), default=0)
        lines = [
            f"peak {mebibytes(self.peak_bytes)} at step {self.step} of "
            f"{len(self.lifetimes.steps)}, {self.node}: "
            f"{mebibytes(self.added_bytes)} beyond {mebibytes(self.input_bytes)} of inputs"
        ]
        for storage in allocated:
            lifetime = f"[{storage.lower}, {storage.upper})"
            columns = (f"{mebibytes(storage.size):>14}", f"{storage.name:{width}}")
            lines.append("  ".join((*columns, f"{lifetime:12}", storage.source)).rstrip())
        if self.nested_bytes:
            lines.append(f"{mebibytes(self.nested_bytes):>14}  inside the subgraphs of {self.node}")
        return "\n".join(lines)


def find(lifetimes: Lifetimes) -> Peak:
    """The peak of a graph with at least one step."""
    _check(lifetimes)
    return Peak(lifetimes, int(np.argmax(lifetimes.bytes_at)))


def timeline(lifetimes: Lifetimes, *, rows: int = _ROWS, width: int = _WIDTH) -> str:
    """Draw storages as bars over the steps, in ASCII.

    Above them a curve of the live bytes beyond the inputs.

    rows: the largest storages that are not inputs, one a row
    width: columns of the bars; a column is one step or more

              10 B   %@:  beyond the inputs, darkest at the peak
               8 B   ##   a
               2 B    ##  b
    """
    _check(lifetimes)
    arguments.whole("rows", rows, 1)
    arguments.whole("width", width, 1)
    count = len(lifetimes.steps)
    columns = np.array_split(np.arange(count), min(width, count))
    beyond = np.maximum(lifetimes.bytes_at - lifetimes.input_bytes, 0)
    most = int(beyond.max(initial=0))
    # The curve: one of ten shades a column, by the highest of its steps.
    curve = ""
    for steps in columns:
        shade = int(beyond[steps].max()) * 10 // max(most, 1)
        curve += _SHADES[min(9, shade)]
    lines = [f"{mebibytes(most):>14}  {curve}  beyond the inputs, darkest at the peak"]
    for storage in _largest(lifetimes.storages, rows):
        bar = ""
        for steps in columns:
            is_live = storage.lower <= steps[-1] and steps[0] < storage.upper
            bar += "#" if is_live else " "
        lines.append(f"{mebibytes(storage.size):>14}  {bar}  {storage.name}")
    return "\n".join(lines)


def draw(lifetimes: Lifetimes, path: str | PathLike[str]) -> None:
    """Draw live bytes over the steps as a picture, stacked by storage.

    path: a file whose suffix names the format; raises as check_picture does
    """
    _check(lifetimes)
    check_picture("path", path)
    # Imported here, because it is slow and pictures are rare. Without pyplot: no window, no state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = np.arange(len(lifetimes.steps))
    # Layers from below: all inputs, the small storages, then each large one.
    inputs = np.zeros(len(steps))
    for storage in lifetimes.storages:
        if storage.is_input:
            inputs += _mebibytes_at(storage, steps)
    layers = [_mebibytes_at(storage, steps) for storage in _largest(lifetimes.storages, _LAYERS)]
    small = np.maximum(lifetimes.bytes_at / 2**20 - sum(layers, start=inputs), 0)
    figure = Figure(figsize=(11, 5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.stackplot(steps, inputs, small, *layers, step="mid", linewidth=0)
    peak = find(lifetimes)
    axes.annotate(peak.node, (peak.step, peak.peak_bytes / 2**20))
    axes.set(xlabel="step", ylabel="MiB", title=f"{mebibytes(peak.peak_bytes)} at {peak.node}")
    figure.savefig(path)


def check_picture(name: str, path: str | PathLike[str]) -> None:
    """Raise TypeError or ValueError unless a picture can be written to `path`.

    name: of the argument, for the message
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{name} needs matplotlib. Run pip install 'compiled-dilated[show]'")
    from matplotlib.backend_bases import FigureCanvasBase

    if not isinstance(path, str | PathLike):
        raise TypeError(f"{name} must be a path; got {type(path).__name__} {arguments.shown(path)}")
    file = Path(path)
    suffixes = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix.removeprefix(".").lower() not in suffixes:
        raise ValueError(f"{name} must end in one of {', '.join(suffixes)}; got {str(file)!r}")
    if not file.parent.is_dir():
        raise ValueError(
            f"{name} must be in an existing directory; got {str(file)!r}. "
            f"Make {str(file.parent)!r} first"
        )
    if file.is_dir():
        raise ValueError(
            f"{name} must be a file; got the directory {str(file)!r}. Add a file's name"
        )


def _check(lifetimes: Lifetimes) -> None:
    arguments.kind("lifetimes", lifetimes, Lifetimes, "Count them first: liveness.lifetimes(graph)")
    if not lifetimes.steps:
        raise ValueError("lifetimes must have at least one step; got those of an empty graph")


def mebibytes(size: int) -> str:
    """Format bytes: "12.0 MiB", or "512 B" below one MiB."""
    if abs(size) < 2**20:
        return f"{size:,} B"
    return f"{size / 2**20:,.1f} MiB"


def _largest(storages: Sequence[Storage], count: int) -> list[Storage]:
    """The largest storages that are not inputs, in order of allocation."""
    allocated = [storage for storage in storages if not storage.is_input and storage.size]
    largest = sorted(allocated, key=_by_size)[:count]
    return sorted(largest, key=lambda storage: storage.lower)


def _mebibytes_at(storage: Storage, steps: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The storage's live MiB at each step, (steps,)."""
    is_live = (storage.lower <= steps) & (steps < storage.upper)
    return np.where(is_live, storage.size / 2**20, 0.0)


def _is_live(storage: Storage, step: int) -> bool:
    return storage.lower <= step < storage.upper


def _by_size(storage: Storage) -> int:
    return -storage.size
