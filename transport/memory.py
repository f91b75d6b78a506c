"""How the C library gives memory back: in large steps, for processes through which large messages flow."""

from __future__ import annotations

import ctypes
import sys

KEPT_BYTES = 128 << 20
"""Freed memory at the end of a heap that is kept for the next message"""
MAPPED_FROM_BYTES = 32 << 20
"""Larger blocks are mapped one by one and go back at once; the largest value that glibc takes"""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let the memory of one message serve the next, in this process from now on.

    By default glibc hands the end of its heap back to the system as soon as some 2 MiB of it are free, and messages of
    that size then cost hundreds of page faults each. Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
