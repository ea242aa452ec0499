"""Owns how EfficientNet-Lite0 becomes the library's EfficientNet, with equal features.

EfficientNet-Lite is EfficientNet with ReLU6 for swish, without squeeze-and-excite, and with a stem
and a head that do not scale. The library has no switch for squeeze-and-excite, so that here
multiplies by exactly one: its last convolution gives 64 whatever the picture, whose sigmoid is 1 in
any floating-point type, and a ratio of 0 makes it one channel wide. Padding is the same for
pictures whose side is a multiple of 32, such as the 224 that it was trained on.

Source: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from transformers import EfficientNetConfig, EfficientNetForImageClassification

LITE0: dict[str, Any] = {
    "image_size": 224,
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "hidden_dim": 1280,
    "hidden_act": "relu6",
    "squeeze_expansion_ratio": 0.0,
    "dropout_rate": 0.2,
    "num_labels": 1000,
}
ONE_BY_SIGMOID = 64.0  # 1 + exp(-64) is 1, in float64 too
# A pixel of 0 to 255 becomes (pixel - 127) / 128.
MEAN, STD = 127 / 255, 128 / 255
# The package's name of a layer -> the library's, at the top and in a block.
TOP = {
    "_conv_stem": "efficientnet.embeddings.convolution",
    "_bn0": "efficientnet.embeddings.batchnorm",
    "_conv_head": "efficientnet.encoder.top_conv",
    "_bn1": "efficientnet.encoder.top_bn",
    "_fc": "classifier",
}
BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def read_state(weights: bytes) -> dict[str, Tensor]:
    """The tensors of a PyTorch file.

    Raises:
        ValueError: it holds anything else, or cannot be read.
    """
    try:
        state = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError("the weights of the package are no PyTorch file; fetch again") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError("the weights of the package are no state dict; fetch again")
    return dict(state)


def convert(
    state: dict[str, Tensor], fields: dict[str, Any]
) -> tuple[EfficientNetConfig, dict[str, Tensor]]:
    """The config and the tensors of the library's classifier, whose tower gives the features.

    Args:
        state: the package's tensors.
        fields: of the config.
    Raises:
        ValueError: a tensor is missing, unknown or of another size.
    """
    config = EfficientNetConfig(**fields)
    config.architectures = [EfficientNetForImageClassification.__name__]
    with torch.device("meta"):
        model = EfficientNetForImageClassification(config)
    converted = {_library_name(name): tensor for name, tensor in state.items()}
    for name, tensor in model.state_dict().items():
        if ".squeeze_excite." in name:
            value = ONE_BY_SIGMOID if name.endswith(".expand.bias") else 0.0
            converted[name] = torch.full(tensor.shape, value)
    try:
        model.load_state_dict(converted, strict=True, assign=True)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"the package holds another network ({told[:200]})") from error
    return config, converted


def _library_name(name: str) -> str:
    """`_blocks.3._bn1.bias` -> `efficientnet.encoder.blocks.3.depthwise_conv...bias`; a name that
    is unknown stays."""
    match name.split("."):
        case ["_blocks", index, layer, tensor] if layer in BLOCK:
            return f"efficientnet.encoder.blocks.{index}.{BLOCK[layer]}.{tensor}"
        case [layer, tensor] if layer in TOP:
            return f"{TOP[layer]}.{tensor}"
    return name


def preprocessing(side: int) -> dict[str, Any]:
    """What `preprocessor_config.json` says.

    The whole picture becomes a square, so that nothing at its edges is cut off. The network was
    trained on crops whose sides were stretched by up to 4 to 3.
    """
    return {
        "image_processor_type": "EfficientNetImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "rescale_offset": False,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "include_top": False,  # True would divide by the deviation twice
    }


def write_folder(folder: Path, config: EfficientNetConfig, state: dict[str, Tensor]) -> None:
    """Write config, tensors and preprocessing as transformers does."""
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(
        safetensors.torch.save({n: t.contiguous() for n, t in state.items()}, {"format": "pt"})
    )
    steps = json.dumps(preprocessing(config.image_size), indent=1) + "\n"
    (folder / "preprocessor_config.json").write_text(steps, encoding="utf-8")
