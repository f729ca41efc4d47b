"""Returning freed memory to the system, where an allocator would keep it."""

from __future__ import annotations

import contextlib
import ctypes


def give_back_freed_memory() -> None:
    """Return the C library's free memory to the system.

    Only glibc can; elsewhere a no-op.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
