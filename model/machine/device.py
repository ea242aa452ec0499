"""Owns what a device is and can do: choosing one, preparing it, its number formats, its memory.

Every command takes its device from here, so that a workaround for a device has one place.
"""

import contextlib
import re
import traceback
from collections.abc import Iterator

import torch

GIB = 2**30
GROUPED_ROW_BYTES = 16  # aten/src/ATen/native/GroupedMMUtils.h
DEVICE_TYPES = ("cpu", "cuda", "mps")
PAD_MULTIPLE = 64  # tokens; GPU kernels are chosen for each shape, so use few shapes
# How each allocator's error message begins, and which part of it names the sizes.
OUT_OF_MEMORY = re.compile(
    r"((?:CUDA|HIP|MPS|XPU)(?: backend)? (?:error: )?out of memory|"
    r"DefaultCPUAllocator: (?:can't allocate|not enough) memory|CUBLAS_STATUS_ALLOC_FAILED)"
)
SIZES = re.compile(
    r"(?:CUDA|HIP|MPS|XPU)[^\n]*?out of memory.*?"
    r"(?=\s+(?:Of the allocated|Including non-PyTorch|If reserved|Use PYTORCH)|\n|$)"
)
CPU_BYTES = re.compile(r"you tried to allocate (\d+) bytes")


class OutOfMemory(ValueError):
    """The device has too little memory; the message is one line and names the way out."""


def choose_device(name: str | None = None, *, local_rank: int | None = None) -> torch.device:
    """The named device, or the first of cuda, mps and cpu that this machine has.

    A CUDA device always has an index: `torch.cuda.set_device` and nccl refuse one without.

    Args:
        name: cpu, cuda, cuda:N or mps; plain `cuda` is GPU 0, or that of `local_rank`.
        local_rank: as in torchrun: the number of this process on this machine. It takes the GPU of
            that number even if `name` has an index, for no two may share one.
    Raises:
        ValueError: the name is unknown, or this machine has no such device.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    best = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    found = re.fullmatch(r"([a-z]+)(?::(\d+))?", name or best)
    kind, index = found.groups() if found else (None, None)
    if kind not in DEVICE_TYPES:
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
    """Make a device the current one and set its backends; every command does so once.

    cuDNN attention is off: it builds a plan for each shape, so decoding (one more key each token)
    stalls at every step, and it is known to give silently wrong answers (PyTorch issue 193893).

    Args:
        tf32: compute float32 matrix products in TF32: several times as fast, 10-bit mantissa.
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
    """Whether the device computes in bfloat16 natively; emulated it takes tens of times as long.

    `torch.cuda.is_bf16_supported()` also counts emulation, and looks at the current device.
    """
    if device.type == "cpu":
        has_kernels = torch.backends.mkldnn.is_available()
        return has_kernels and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def default_dtype(device: torch.device) -> str:
    """The dtype for inference: float32 on a CPU, else bfloat16 where it is native, else float16."""
    if device.type == "cpu":
        return "float32"
    return "bfloat16" if has_bfloat16(device) else "float16"


def training_dtype(device: torch.device) -> str:
    """The dtype for training: bfloat16, but on a CPU that only emulates it float32."""
    is_slow = device.type == "cpu" and not has_bfloat16(device)
    return "float32" if is_slow else "bfloat16"


def check_dtype(device: torch.device, dtype: str) -> None:
    """Raise ValueError for a number format that a GPU only emulates."""
    if device.type != "cpu" and dtype == "bfloat16" and not has_bfloat16(device):
        raise ValueError("this GPU has no bfloat16; use --dtype float16 or float32")


def has_grouped_mm(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> bool:
    """Whether grouped matrix products pay: on a CPU, or bfloat16 on compute capability 9 and 10.

    Elsewhere PyTorch copies the group sizes to the host and multiplies group by group.

    Args:
        widths: sizes of the matrices' rows, in elements; a row must be a multiple of 16 bytes.
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
    """Whether the fused optimizers skip a step when `found_inf` is set; on MPS they do not.

    Source: PyTorch's Metal kernels take `found_inf` and never read it.
    """
    return device.type != "mps"


def product_dtype(device: torch.device) -> torch.dtype:
    """The dtype for matrix products that need little precision, such as Muon's."""
    is_fast = device.type == "cuda" and has_bfloat16(device)
    return torch.bfloat16 if is_fast else torch.float32


def pad_multiple(device: torch.device) -> int:
    """The multiple of tokens that batches are padded to; 1 pads to the longest sample."""
    return PAD_MULTIPLE if device.type == "cuda" else 1


def out_of_memory_line(error: BaseException, *, advice: str) -> str | None:
    """One line for an out-of-memory error, with the sizes that it names; None for any other error.

    Args:
        advice: the way out, such as "lower --batch_size".
    """
    text = str(error)
    is_known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if not is_known and not (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(text)):
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
    """Turn an out-of-memory error into `OutOfMemory`.

    The local variables of the error's frames are cleared, so that a program that goes on does not
    hold their tensors.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        line = out_of_memory_line(error, advice=advice)
        if line is None:
            raise
        traceback.clear_frames(error.__traceback__)
        raise OutOfMemory(line) from None
