"""Time of calls on a GPU, by CUDA events.

The host's own time is measured apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# About 15 ms of an H100, in which the host queues the calls that events measure.
_CYCLES = 25_000_000
_QUEUED_SECONDS = 0.012
_MOST_CALLS = 50
_LEAST_CALLS = 3


def first_call(function: Callable[[], Any]) -> float:
    """Seconds of a first call, compilation included."""
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measured(function: Callable[[], Any], turns: int = 3) -> dict[str, float]:
    """Times and memory of a function that has been called before.

    gpu_us: the GPU's time for a call, by events, the host ahead of it; least of some turns.
    host_us: the host's time to queue a call; median.
    peak_bytes: most memory allocated in a call beyond what was allocated before.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    host = [_host_seconds(function) for _ in range(_LEAST_CALLS)]
    peak = torch.cuda.max_memory_allocated() - before
    # As many calls as the host queues while the GPU is kept busy.
    calls = int(_QUEUED_SECONDS / max(min(host), 1e-6))
    calls = max(1, min(_MOST_CALLS, calls))
    milliseconds = [_gpu_milliseconds(function, calls) / calls for _ in range(turns)]
    return {
        "gpu_us": round(1e3 * min(milliseconds), 2),
        "host_us": round(1e6 * statistics.median(host), 2),
        "peak_bytes": peak,
    }


def _host_seconds(function: Callable[[], Any]) -> float:
    """Time until a call returns, the GPU idle before it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _gpu_milliseconds(function: Callable[[], Any], calls: int) -> float:
    """Time of the GPU between two events around some calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_CYCLES)
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))
