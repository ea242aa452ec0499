"""Owns the speed of matrix products: what a machine can do at best, at this moment."""

import time
from statistics import median

import torch

SIDES = {"cpu": 1024, "cuda": 8192}  # of square matrices that keep the device busy
PRODUCTS, ROUNDS = 10, 3


def matrix_rate(dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> float:
    """Speed of matrix products in GFLOP/s, the median of a few rounds."""
    device = device or torch.device("cpu")
    side = SIDES.get(device.type, 2048)
    left = torch.ones(side, side, dtype=dtype, device=device)
    left @ left
    return median(_round(left) for _ in range(ROUNDS))


def _round(left: torch.Tensor) -> float:
    wait_for(left.device)
    started_s = time.perf_counter()
    for _ in range(PRODUCTS):
        left @ left
    wait_for(left.device)
    return 2e-9 * PRODUCTS * len(left) ** 3 / (time.perf_counter() - started_s)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
