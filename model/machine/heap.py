"""Owns giving freed memory of this process back to the system."""

import ctypes
from functools import cache
from typing import Any


@cache
def _malloc_trim() -> Any:
    """glibc's function, or None where the C library has none (macOS, Windows, musl)."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def release_free_memory() -> None:
    """Give the free pages of the heap back.

    Training on a CPU allocates tensors of ever different lengths; the holes between them are kept
    by the C library, so a process would grow for an hour, and every worker that is forked from it
    would carry the holes too.
    """
    if trim := _malloc_trim():
        trim(0)
