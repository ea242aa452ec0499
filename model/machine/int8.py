"""Owns linear layers with int8 weights, for CPUs: by PyTorch's own quantized kernels.

A quarter of float32's bytes are read, which is what a token of an answer takes its time for.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

LARGEST = 127  # of int8
LEAST = 1e-9  # in place of the largest value of a row that is all 0
# Its last argument: inputs take 7 bits, for with 8 sums of two products overflow on AVX2. PyTorch's
# wrapper around the operation takes a tenth of a small product's time.
_linear_dynamic = torch.ops.quantized.linear_dynamic.default
_product: Callable[[Tensor, object, bool], Tensor]
_product = getattr(_linear_dynamic, "_op", _linear_dynamic)


def check_int8(device: torch.device, dtype: str) -> None:
    """Raise ValueError where int8 weights cannot be computed with."""
    if device.type != "cpu":
        raise ValueError(
            f"--quantize int8 is for CPUs, and the model would run on {device.type}; add --device "
            "cpu, or leave it out: a GPU computes in 16 bits"
        )
    if dtype != "float32":
        raise ValueError(
            f"--quantize int8 computes with float32 beside its weights; leave out --dtype {dtype}"
        )
    if torch.backends.quantized.engine == "none":
        raise ValueError(
            "--quantize int8: this build of PyTorch has no kernels for it; leave it out"
        )


class Int8Linear(nn.Module):
    """`nn.Linear` of fixed weights (out, in) without bias; each output's have their own scale.

    The inputs are rounded to 8 bits too, as they come. In a batch each row is scaled by its largest
    value first, so that one does not take another's precision.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self._num_inputs = weight.shape[1]
        weight = weight.detach().float()
        scales = weight.abs().amax(1).clamp(min=LEAST).double() / LARGEST
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():  # PyTorch means to move these tensors to torchao
            warnings.simplefilter("ignore", UserWarning)
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(rounded, None)

    def forward(self, inputs: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if inputs.numel() == self._num_inputs:  # one row
            return _product(inputs, self._packed, True)
        largest = inputs.abs().amax(-1, keepdim=True).clamp(min=LEAST)
        return _product(inputs / largest, self._packed, True) * largest
