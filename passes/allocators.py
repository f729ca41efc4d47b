"""Returning freed memory to the system, where an allocator would keep it."""

from __future__ import annotations

import contextlib
import ctypes

# M_MMAP_THRESHOLD of glibc's malloc.h.
_MMAP_THRESHOLD = -3


def give_back_freed_memory() -> None:
    """Return the C library's free memory to the system.

    Only glibc can; elsewhere a no-op.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def map_buffers(least_bytes: int = 2**20) -> None:
    """Let the C library map every buffer of so many bytes.

    For the rest of this process. Buffers on its heap may leave holes, so that the peak of a call
    depends on the calls before it. Only glibc maps them; elsewhere a no-op.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, least_bytes)
