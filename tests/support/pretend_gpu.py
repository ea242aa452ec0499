"""Offers a pretend CUDA driver: `torch.cuda` as strict as on a machine with GPUs, on one without.

Only what PyTorch's C side would answer is replaced, so every check of PyTorch's own Python code
runs: `torch.cuda.set_device(torch.device("cuda"))` raises here what it raises there. With
`support.pretend_tensor` tensors live on these GPUs too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

GIB = 2**30
HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)


@dataclass
class Gpu:
    """One pretend GPU. `capability` is its compute capability, (9, 0) for Hopper."""

    capability: tuple[int, int] = HOPPER
    total_gib: float = 80.0
    free_gib: float = 79.0
    name: str = "Pretend GPU"

    @property
    def properties(self) -> SimpleNamespace:
        major, minor = self.capability
        return SimpleNamespace(
            name=self.name,
            major=major,
            minor=minor,
            total_memory=int(self.total_gib * GIB),
            multi_processor_count=100,
            is_integrated=False,
        )


@dataclass
class Driver:
    """What the C side of `torch.cuda` knows."""

    gpus: list[Gpu]
    current: int = 0
    num_synchronized: int = 0
    sync_debug_mode: int = 0  # of `torch.cuda.set_sync_debug_mode`; 2 makes waiting an error
    generators: tuple = field(default_factory=tuple)

    def __post_init__(self):
        self.generators = tuple(torch.Generator() for _ in self.gpus)

    def check(self, index: int) -> int:
        """Raise what CUDA raises for a GPU that is not there."""
        if not 0 <= index < len(self.gpus):
            raise RuntimeError("CUDA error: invalid device ordinal")
        return index

    def set_device(self, index: int) -> None:
        self.current = self.check(index)

    def exchange_device(self, index: int) -> int:
        """Change the current GPU, where `index` is not negative; returns the former one."""
        former = self.current
        if index >= 0:
            self.set_device(index)
        return former

    def synchronize(self) -> None:
        self.num_synchronized += 1

    def set_sync_debug_mode(self, mode: int) -> None:
        self.sync_debug_mode = mode

    def stream(self, *_) -> SimpleNamespace:
        """The one stream of each GPU."""
        return SimpleNamespace(
            is_capturing=lambda: False,
            synchronize=self.synchronize,
            query=lambda: True,
            wait_stream=lambda _: None,
        )

    def memory(self, index: int) -> tuple[int, int]:
        gpu = self.gpus[self.check(index)]
        return int(gpu.free_gib * GIB), int(gpu.total_gib * GIB)

    def memory_stats(self, index: int) -> dict:
        free, total = self.memory(index)
        used = dict.fromkeys(("current", "peak", "allocated", "freed"), total - free)
        return {"allocated_bytes": {"all": used}, "reserved_bytes": {"all": used}}


@contextmanager
def pretend_gpus(*gpus: Gpu) -> Iterator[Driver]:
    """Give this machine GPUs until the block ends: those given, or one of Hopper's kind.

    Global settings of PyTorch that a program changes for its GPU are put back then too.
    """
    with pytest.MonkeyPatch.context() as monkeypatch, kept_settings():
        yield _install(monkeypatch, *gpus)


def _install(monkeypatch, *gpus: Gpu) -> Driver:
    driver = Driver(list(gpus or [Gpu()]))
    c_side = {
        "_cuda_getDeviceCount": lambda: len(driver.gpus),
        "_cuda_init": lambda: None,
        "_cuda_getDevice": lambda: driver.current,
        "_cuda_setDevice": driver.set_device,
        "_cuda_exchangeDevice": driver.exchange_device,
        "_cuda_maybeExchangeDevice": driver.exchange_device,
        "_cuda_synchronize": driver.synchronize,
        "_cuda_memoryStats": driver.memory_stats,
        "_cuda_resetPeakMemoryStats": driver.check,
        "_cuda_emptyCache": lambda: None,
        "_cuda_set_sync_debug_mode": driver.set_sync_debug_mode,
        "_cuda_get_sync_debug_mode": lambda: driver.sync_debug_mode,
        "_cuda_getArchFlags": lambda: None,
    }
    for name, value in c_side.items():
        monkeypatch.setattr(torch._C, name, value, raising=False)
    module = {
        "_cudart": SimpleNamespace(cudaMemGetInfo=driver.memory),
        "_initialized": False,
        "_queued_calls": [],
        "_cached_device_count": None,
        "_device_count_nvml": lambda: -1,  # ask the C side
        "_exchange_device": driver.exchange_device,
        "_maybe_exchange_device": driver.exchange_device,
        "_get_device_properties": lambda index: driver.gpus[driver.check(index)].properties,
        "default_generators": driver.generators,
        "current_stream": driver.stream,
        "default_stream": driver.stream,
        "is_current_stream_capturing": lambda: False,
    }
    for name, value in module.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    accelerator = {
        "is_available": lambda: True,
        "current_accelerator": lambda *_, **__: torch.device("cuda"),
        "device_count": lambda: len(driver.gpus),
        "current_device_index": lambda: driver.current,
        "current_stream": driver.stream,
    }
    for name, value in accelerator.items():
        monkeypatch.setattr(torch.accelerator, name, value)
    torch.cuda._check_bf16_tensor_supported.cache_clear()
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    return driver


@contextmanager
def kept_settings() -> Iterator[None]:
    """Put PyTorch's settings for a GPU back at the end."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    before = cuda.matmul.allow_tf32, cudnn.allow_tf32, cuda.cudnn_sdp_enabled()
    try:
        yield
    finally:
        cuda.matmul.allow_tf32, cudnn.allow_tf32 = before[:2]
        cuda.enable_cudnn_sdp(before[2])
