"""Owns compiling modules with `torch.compile`, and what this needs of a machine."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import nn

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")
C_COMPILERS = ("g++", "clang++", "gcc", "clang", "cl")


def check_compiler(device: torch.device) -> None:
    """Raise ValueError if a device's kernels cannot be built here; nothing is compiled yet.

    Args:
        device: on a CPU a C++ compiler is needed, on a GPU a C compiler and the triton package.
    """
    names = tuple(filter(None, [os.environ.get("CXX"), os.environ.get("CC"), *C_COMPILERS]))
    if not any(map(shutil.which, names)):
        raise ValueError(
            "--compile 1 needs a C++ compiler, and there is none on PATH; install one (Debian and "
            "Ubuntu: apt install g++) or leave the flag out"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError(
            "--compile 1 needs triton on a GPU: pip install triton (on Windows: triton-windows), "
            "or leave the flag out"
        )


def compile_modules(modules: Iterable[nn.Module]) -> None:
    """Compile each module in place: its parameters keep their names, and are saved as ever.

    One kernel serves all modules of a kind and all lengths: compiled at the first call, and anew
    where a call is of another kind (no gradients, another mode, other arguments).
    """
    for module in modules:
        module.compile(dynamic=True)


def compiled(function: Callable[Inputs, Output]) -> Callable[Inputs, Output]:
    """The function by one kernel for all numbers of rows but one, and another for a single row;
    each is compiled when it is first needed."""
    kernel: Callable[Inputs, Output] = torch.compile(function, dynamic=True)
    return kernel
