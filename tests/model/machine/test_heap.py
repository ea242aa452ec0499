"""If this fails, a long training run on a CPU grows until the machine has no memory left."""

import platform
import subprocess
import sys

import pytest
from support.scripts import ROOT, train_flags
from support.tiny_parts import make_records

from model.machine import heap
from trainer import train_pretrain_vlm
from trainer.loop import train_loop

HOLES = """
import ctypes
from pathlib import Path
from model.machine.heap import release_free_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 100_000  # below the size that the C library maps on its own
blocks = [libc.malloc(size) for _ in range(2000)]
for block in blocks:
    ctypes.memset(block, 1, size)
for block in blocks[::2]:  # every other block stays, so the heap cannot shrink from its end
    libc.free(block)
before = resident_mib()
release_free_memory()
print(before - resident_mib())
"""


KEPT = """
import resource
import torch
from model.machine.heap import keep_freed_memory, release_free_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(25_000_000) for _ in range(4)]  # 100 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print([page_faults() for _ in range(4)][-1])
release_free_memory()
print(page_faults())
"""
needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc"
)


@pytest.mark.slow
@needs_glibc
def test_large_tensors_are_allocated_from_kept_memory():
    """Else the system fills their pages with zeroes at every step, which costs more than it."""
    command = [sys.executable, "-c", KEPT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    kept, given_back = map(int, done.stdout.split())
    assert kept < 50
    assert given_back > 100, "pages of up to 2 MiB"


@needs_glibc
def test_holes_in_the_heap_are_given_back():
    command = [sys.executable, "-c", HOLES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 60, "of 95 MiB that were free"


def test_another_c_library_is_left_alone(monkeypatch):
    heap._glibc.cache_clear()
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    heap.release_free_memory()
    heap.keep_freed_memory()
    heap._glibc.cache_clear()


def test_training_on_a_cpu_gives_memory_back(assets, tmp_path, monkeypatch):
    """Before each epoch, whose workers are forked from this process, and every few steps."""
    calls = []
    monkeypatch.setattr(train_loop, "release_free_memory", lambda: calls.append(1))
    monkeypatch.setattr(train_loop, "TRIM_STEPS", 2)
    data, images = make_records(tmp_path, num_records=16)
    flags = train_flags(assets, tmp_path, data, images, batch_size=4, epochs=2)
    assert train_pretrain_vlm.main(flags) == 0
    assert len(calls) == 2 + 4, "two epochs, eight steps"
