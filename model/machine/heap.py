"""Owns what the C library does with memory that this process frees: keep it, or give it back.

Both functions do nothing where the C library is not glibc (macOS, Windows, musl).
"""

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
NEVER = -1
USUAL_MMAP_MAX, USUAL_TRIM_THRESHOLD = 65536, 128 * 1024


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, or None where it is another one."""
    try:
        library = ctypes.CDLL(None)
        library.malloc_trim, library.mallopt, library.gnu_get_libc_version  # noqa: B018  # there?
    except (OSError, AttributeError, TypeError):
        return None
    return library


def keep_freed_memory() -> None:
    """Keep freed memory for the next allocation, however large it is.

    By itself the C library maps each block of more than 32 MiB anew and gives it back at once, so
    every large tensor of every step is filled with zeroes by the system, page by page: two thirds
    of the time of a convolutional tower on a CPU.
    """
    if library := _glibc():
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, NEVER)
        library.mallopt(M_TOP_PAD, 64 * 2**20)


def give_back_at_once() -> None:
    """Undo `keep_freed_memory`, in a process that was forked: it would keep its largest picture."""
    if library := _glibc():
        library.mallopt(M_MMAP_MAX, USUAL_MMAP_MAX)
        library.mallopt(M_TRIM_THRESHOLD, USUAL_TRIM_THRESHOLD)
        library.mallopt(M_TOP_PAD, 0)


def release_free_memory() -> None:
    """Give the free pages of the heap back.

    Training on a CPU allocates tensors of ever different lengths; the holes between them are kept
    by the C library, so a process would grow for an hour, and every worker that is forked from it
    would carry the holes too.
    """
    if library := _glibc():
        library.malloc_trim(0)
