"""Time and peak memory of functions, their hardware, and result files."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import math
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from passes.allocators import give_back_freed_memory

from . import version

_RESET_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_SAMPLE_SECONDS = 0.001


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes, threads, GPU, versions and date (UTC)."""
    import psutil

    gpu_name, gpu_memory_bytes = None, None
    if torch.cuda.is_available():
        gpu_name = torch.cuda.get_device_name()
        gpu_memory_bytes = torch.cuda.get_device_properties(0).total_memory
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu_name,
        "gpu_memory_bytes": gpu_memory_bytes,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiled_dilated": version.installed(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of every call, by function, the functions called in turn.

    In turn, so that a drift of the machine affects all functions.

    repeats: turns that are measured.
    warmup: turns before them.
    seconds: after this time no further turn starts, but for the first measured one.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    for turn in range(-warmup, repeats):
        if turn > 0 and time.perf_counter() - started > seconds:
            break
        for name, function in functions.items():
            elapsed = timed(function)
            if turn >= 0:
                times[name].append(elapsed)
    return times


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call, with its queued work on a GPU."""
    _synchronize()
    started = time.perf_counter()
    result = function()
    _synchronize()
    elapsed = time.perf_counter() - started
    del result  # freeing it is not the function's work
    return elapsed


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def median(values: Sequence[float]) -> float:
    """The median of some values."""
    return statistics.median(values)


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median time of each function of `interleaved`."""
    return {name: median(seconds) for name, seconds in times.items()}


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """Peak bytes during one call, its result included, above those before it.

    CPU: the resident set of this process, by the kernel's high-water mark on Linux, by samples
    every millisecond elsewhere. GPU: torch's allocator. Memory that is reserved and never touched
    does not count.
    """
    return seconds_and_peak_bytes(function, device)[1]


def seconds_and_peak_bytes(
    function: Callable[[], object], device: str = "cpu"
) -> tuple[float, int]:
    """Seconds and peak bytes of one call, which may be long.

    The peak is that of `peak_bytes`. On a CPU the call gets its memory anew from the system, which
    a short call takes time for.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = timed(function)
        return seconds, torch.cuda.max_memory_allocated() - before
    give_back_freed_memory()  # the call could reuse it without a rise of the resident set
    before = resident_bytes()
    with resident_peak() as peak:
        seconds = timed(function)
    return seconds, max(0, peak() - before)


def resident_bytes() -> int:
    """Resident bytes of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


@contextlib.contextmanager
def resident_peak() -> Iterator[Callable[[], int]]:
    """Peak resident bytes of this process within the block.

    >>> with resident_peak() as peak:  # doctest: +SKIP
    ...     work()
    >>> peak()  # doctest: +SKIP
    """
    try:
        _RESET_PEAK.write_text("5")
    except OSError:
        with _sampled_peak() as peak:
            yield peak
        return
    ends: list[int] = []
    yield lambda: ends[0] if ends else _high_water_mark()
    ends.append(_high_water_mark())


def _high_water_mark() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def _sampled_peak() -> Iterator[Callable[[], int]]:
    most, done = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            most[0] = max(most[0], resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: most[0]
    finally:
        done.set()
        watcher.join()


def write(path: Path, content: bytes | str) -> None:
    """Write a file atomically: an interrupted run leaves the old content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent,
        prefix=f".{path.name}.",
        delete=False,
    ) as file:
        try:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.close()
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as an indented JSON file, atomically."""
    write(path, json.dumps(record, indent=1) + "\n")
