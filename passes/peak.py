"""When a graph holds most, and who holds it.

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

from . import arguments
from .liveness import Lifetimes, Storage

_ROWS = 24
_WIDTH = 72
_DRAWN = 40


@dataclass(frozen=True)
class Peak:
    """The first step during which most bytes live. Prints as a table of what lives then, inputs in one line."""

    lifetimes: Lifetimes
    step: int

    @property
    def node(self) -> str:
        return self.lifetimes.steps[self.step]

    @property
    def peak_bytes(self) -> int:
        """Everything that lives, inputs included."""
        return int(self.lifetimes.bytes_at[self.step])

    @property
    def input_bytes(self) -> int:
        """What lived before the first step."""
        return self.lifetimes.input_bytes

    @property
    def added_bytes(self) -> int:
        """What the graph needs beyond its inputs; less than 0 where it frees donated inputs and makes little."""
        return self.peak_bytes - self.input_bytes

    @property
    def nested_bytes(self) -> int:
        """What a subgraph that runs at this step holds."""
        return self.lifetimes.nested[self.step]

    @property
    def live(self) -> tuple[Storage, ...]:
        """What lives then, largest first."""
        return tuple(sorted((each for each in self.lifetimes.storages if _lives(each, self.step)), key=_by_size))

    def __str__(self) -> str:
        made = [each for each in self.live if not each.is_input and each.size]
        width = max((len(each.name) for each in made), default=0)
        lines = [
            f"peak {mebibytes(self.peak_bytes)} at step {self.step} of {len(self.lifetimes.steps)}, {self.node}: "
            f"{mebibytes(self.added_bytes)} beyond {mebibytes(self.input_bytes)} of inputs"
        ]
        lines += [
            f"{mebibytes(each.size):>14}  {each.name:{width}}  {f'[{each.lower}, {each.upper})':12}  {each.source}".rstrip()
            for each in made
        ]
        if self.nested_bytes:
            lines.append(f"{mebibytes(self.nested_bytes):>14}  inside the subgraphs of {self.node}")
        return "\n".join(lines)


def find(lifetimes: Lifetimes) -> Peak:
    """The peak of a graph with at least one step."""
    _check(lifetimes)
    return Peak(lifetimes, int(np.argmax(lifetimes.bytes_at)))


def timeline(lifetimes: Lifetimes, *, rows: int = _ROWS, width: int = _WIDTH) -> str:
    """The largest storages as bars over the steps, above them what lives beyond the inputs, as a figure of ASCII characters.

    rows: storages that are shown, the largest that are not inputs. width: columns of the bars; each stands for one step or more.

              10 B   %@:  beyond the inputs, darkest at the peak
               8 B   ##   a
               2 B    ##  b
    """
    _check(lifetimes)
    arguments.whole("rows", rows, 1)
    arguments.whole("width", width, 1)
    columns = np.array_split(np.arange(len(lifetimes.steps)), min(width, len(lifetimes.steps)))
    beyond = np.maximum(lifetimes.bytes_at - lifetimes.input_bytes, 0)
    most = int(beyond.max(initial=0))
    shades = " .:-=+*#%@"
    curve = "".join(shades[min(9, int(beyond[steps].max()) * 10 // max(most, 1))] for steps in columns)
    lines = [f"{mebibytes(most):>14}  {curve}  beyond the inputs, darkest at the peak"]
    for each in _largest(lifetimes.storages, rows):
        bar = "".join("#" if each.lower <= steps[-1] and steps[0] < each.upper else " " for steps in columns)
        lines.append(f"{mebibytes(each.size):>14}  {bar}  {each.name}")
    return "\n".join(lines)


def draw(lifetimes: Lifetimes, path: str | PathLike[str]) -> None:
    """The same as a picture, in the format that the ending of `path` names: bytes by step, stacked, largest storages apart.

    Raises ValueError as check_picture does.
    """
    _check(lifetimes)
    check_picture("path", path)
    # A picture is rare and its library slow to import. The figure is its own: no window, no state of pyplot's.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = np.arange(len(lifetimes.steps))
    largest = _largest(lifetimes.storages, _DRAWN)
    layers = [_mebibytes_at(each, steps) for each in largest]
    inputs = sum((_mebibytes_at(each, steps) for each in lifetimes.storages if each.is_input), start=np.zeros(len(steps)))
    rest = np.maximum(lifetimes.bytes_at / 2**20 - sum(layers, start=inputs), 0)
    figure = Figure(figsize=(11, 5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.stackplot(steps, inputs, rest, *layers, step="mid", linewidth=0)
    at = find(lifetimes)
    axes.annotate(at.node, (at.step, at.peak_bytes / 2**20))
    axes.set(xlabel="step", ylabel="MiB", title=f"{mebibytes(at.peak_bytes)} at {at.node}")
    figure.savefig(path)


def check_picture(name: str, path: str | PathLike[str]) -> None:
    """Raises TypeError or ValueError unless a picture can be written to `path`: a known ending, in a directory that is there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{name} needs matplotlib to draw; install it with pip install 'compiled-dilated[show]'")
    from matplotlib.backend_bases import FigureCanvasBase

    if not isinstance(path, str | PathLike):
        raise TypeError(f"{name} must be a path; got {type(path).__name__} {arguments.shown(path)}")
    place, endings = Path(path), sorted(FigureCanvasBase.get_supported_filetypes())
    if place.suffix.removeprefix(".").lower() not in endings:
        raise ValueError(f"{name} must end in one of {', '.join(endings)}; got {str(place)!r}")
    if not place.parent.is_dir():
        raise ValueError(f"{name} must lie in a directory that is there; got {str(place)!r}. Make {str(place.parent)!r} first")
    if place.is_dir():
        raise ValueError(f"{name} must be a file; got the directory {str(place)!r}. Add a file's name")


def _check(lifetimes: Lifetimes) -> None:
    arguments.kind("lifetimes", lifetimes, Lifetimes, "Count them first: liveness.lifetimes(graph)")
    if not lifetimes.steps:
        raise ValueError("lifetimes must have at least one step; got those of an empty graph")


def mebibytes(size: int) -> str:
    """Bytes for people: "12.0 MiB", less than one in bytes."""
    return f"{size / 2**20:,.1f} MiB" if abs(size) >= 2**20 else f"{size:,} B"


def _largest(storages: Sequence[Storage], count: int) -> list[Storage]:
    """The largest that are not inputs, in the order in which they are made."""
    made = sorted((each for each in storages if not each.is_input and each.size), key=_by_size)[:count]
    return sorted(made, key=lambda each: each.lower)


def _mebibytes_at(storage: Storage, steps: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return np.where((storage.lower <= steps) & (steps < storage.upper), storage.size / 2**20, 0.0)


def _lives(storage: Storage, step: int) -> bool:
    return storage.lower <= step < storage.upper


def _by_size(storage: Storage) -> int:
    return -storage.size
