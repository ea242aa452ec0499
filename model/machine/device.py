"""Owns what a device is and can do: choosing one, preparing it, its number formats, its memory.

Every command takes its device from here, so that a fault of one kind of device has one place.
"""

import contextlib
import re
import traceback
from collections.abc import Iterator

import torch

GIB = 2**30
GROUPED_ROW_BYTES = 16  # aten/src/ATen/native/GroupedMMUtils.h
KINDS = ("cpu", "cuda", "mps")
PAD_MULTIPLE = 64  # tokens; shapes that a GPU plans for, instead of one for every length
# How each allocator begins to say that there is no room, and which part of it names the sizes.
NO_ROOM = re.compile(
    r"((?:CUDA|HIP|MPS|XPU)(?: backend)? (?:error: )?out of memory|"
    r"DefaultCPUAllocator: (?:can't allocate|not enough) memory|CUBLAS_STATUS_ALLOC_FAILED)"
)
SIZES = re.compile(
    r"(?:CUDA|HIP|MPS|XPU)[^\n]*?out of memory.*?"
    r"(?=\s+(?:Of the allocated|Including non-PyTorch|If reserved|Use PYTORCH)|\n|$)"
)
CPU_BYTES = re.compile(r"you tried to allocate (\d+) bytes")


class OutOfMemory(ValueError):
    """What was asked for does not fit into the device's memory; one line that says the way out."""


def choose_device(name: str | None = None, *, local_rank: int | None = None) -> torch.device:
    """The named device, or the first of cuda, mps and cpu that this machine has.

    A CUDA device always has an index: `torch.cuda.set_device` and nccl refuse one without.

    Args:
        name: cpu, cuda, cuda:N or mps; plain `cuda` is the GPU 0, or that of `local_rank`.
        local_rank: which of several processes on this machine this is. Each takes the GPU of its
            number, also where `name` has an index: no two may share one.
    Raises:
        ValueError: it is no device, or not there.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    best = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    found = re.fullmatch(r"([a-z]+)(?::(\d+))?", name or best)
    kind, index = found.groups() if found else (None, None)
    if kind not in KINDS:
        raise ValueError(f"--device {name!r} is not a device; try cpu, cuda, cuda:1 or mps")
    if not {"cpu": True, "cuda": has_cuda, "mps": has_mps}[kind]:
        raise ValueError(f"--device {name}: this machine or torch build has no {kind.upper()}")
    if kind != "cuda":
        if int(index or 0):
            raise ValueError(f"--device {name}: there is one {kind} only; write --device {kind}")
        return torch.device(kind)
    count = torch.cuda.device_count()
    if local_rank is not None and local_rank >= count:
        raise ValueError(
            f"process {local_rank + 1} of this machine has no GPU of its own: there are "
            f"{count}; start as many processes as GPUs, or use --device cpu"
        )
    if int(index or 0) >= count:
        raise ValueError(f"--device {name}: there are {count} CUDA device(s), counted from cuda:0")
    return torch.device("cuda", int(index or 0) if local_rank is None else local_rank)


def prepare_device(device: torch.device, *, tf32: bool = False) -> torch.device:
    """Make a chosen device this process's own and set how it computes; every command does so once.

    cuDNN's attention stays off: it plans anew for each shape, so decoding (one key more a token)
    stalls at every step, and silently wrong answers of it are known (PyTorch issue 193893).

    Args:
        tf32: float32 products in TF32, several times as fast with 10 bits of mantissa.
    Raises:
        ValueError: the driver refuses it, for example because another process owns it.
    """
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            first_line = str(error).splitlines()[0]
            raise ValueError(f"--device {device} cannot be used: {first_line}") from error
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself.

    `torch.cuda.is_bf16_supported()` also counts emulation, and looks at the current device.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def default_dtype(device: torch.device) -> str:
    """In which numbers a model answers there: float32 on a CPU, else bfloat16 where there is one,
    else float16."""
    if device.type == "cpu":
        return "float32"
    return "bfloat16" if has_bfloat16(device) else "float16"


def check_dtype(device: torch.device, dtype: str) -> None:
    """Raise ValueError for a number format that the device only emulates."""
    if dtype == "bfloat16" and not has_bfloat16(device):
        raise ValueError("this GPU has no bfloat16; use --dtype float16 or float32")


def has_grouped_mm(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> bool:
    """Whether grouped matrix products pay: on a CPU, or bfloat16 on compute capability 9 and 10.

    Elsewhere PyTorch copies the group sizes to the host and multiplies group by group.

    Args:
        widths: of the matrices, in numbers; rows that are no multiple of 16 bytes are refused.
    Source: `_grouped_mm_cuda` in aten/src/ATen/native/cuda/GroupedBlas.cpp.
    """
    if any(width * dtype.itemsize % GROUPED_ROW_BYTES for width in widths):
        return False
    if device.type == "cpu":
        return dtype == torch.bfloat16 or not torch.compiler.is_compiling()
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def heeds_found_inf(device: torch.device) -> bool:
    """Whether the fused optimizers leave a step out there when `found_inf` says so.

    Source: the Metal kernels of PyTorch take `found_inf` and never read it.
    """
    return device.type != "mps"


def product_dtype(device: torch.device) -> torch.dtype:
    """In what to multiply matrices whose product may be rough, such as an optimizer's."""
    is_fast = device.type == "cuda" and has_bfloat16(device)
    return torch.bfloat16 if is_fast else torch.float32


def pad_multiple(device: torch.device) -> int:
    """To which multiple of tokens batches are padded there; 1 pads to the longest sample."""
    return PAD_MULTIPLE if device.type == "cuda" else 1


def out_of_memory_line(error: BaseException, *, advice: str) -> str | None:
    """One line for an error of an allocator, with the sizes that it names; None for any other.

    Args:
        advice: the way out, such as "lower --batch_size".
    """
    text = str(error)
    is_known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if not is_known and not (isinstance(error, RuntimeError) and NO_ROOM.search(text)):
        return None
    sizes = SIZES.search(text)
    if sizes:
        what = f" ({sizes[0].rstrip('.')})"
    elif num_bytes := CPU_BYTES.search(text):
        what = f" (tried to allocate {int(num_bytes[1]) / GIB:.2f} GiB on the CPU)"
    else:
        what = ""
    return f"out of memory{what}; {advice}"


@contextlib.contextmanager
def memory_guard(advice: str) -> Iterator[None]:
    """Turn running out of memory into `OutOfMemory`, and let go of what was allocated on the way:
    who goes on afterwards must not hold it through the error's frames."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        line = out_of_memory_line(error, advice=advice)
        if line is None:
            raise
        traceback.clear_frames(error.__traceback__)
        raise OutOfMemory(line) from None
