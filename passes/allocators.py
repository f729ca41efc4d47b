"""What is freed goes back to the system, where an allocator would keep it for requests of its size alone."""

from __future__ import annotations

import contextlib
import ctypes


def give_back_freed_memory() -> None:
    """What the C library holds free leaves the process: glibc can do that, others keep theirs."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
