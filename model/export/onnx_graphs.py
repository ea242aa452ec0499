"""Owns the ONNX graphs of a model: three files that together answer, with nothing but onnxruntime.

1. `vision_encoder.onnx`: pictures to projected features (tower and projection).
2. `embed_tokens.onnx`: ids to embeddings, among which the caller puts the features.
3. `decoder.onnx`: embeddings and the keys and values so far to logits and the new ones.

Shapes: B batch, P past tokens, T new ones, I images, S side in pixels, N tokens of an image,
D hidden, V vocabulary, G heads of keys and values, K head dim; B, P, T and I may be any.
"""

import json
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.export.files import DESCRIPTION
from model.export.source import Source
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig
from model.vision_tower import image_side

VISION, EMBED, DECODER = "vision_encoder", "embed_tokens", "decoder"
PACKAGES = "onnx onnxscript onnxruntime"
BATCH, PAST, NEW = 2, 3, 4  # sizes to trace with; neither 0 nor 1, which would be fixed
FREE = torch.export.Dim.DYNAMIC


@dataclass(frozen=True)
class Graph:
    """A file to be: its module, sample inputs, the dimensions of these that may change, and the
    names of what goes in and comes out."""

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    free: tuple[Any, ...]
    in_names: list[str]
    out_names: list[str]


class VisionGraph(nn.Module):
    """Tower and projection."""

    def __init__(self, model: MiniMindVLM):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:  # (I, 3, S, S) -> (I, N, D)
        return self.model.encode_images(pixel_values)


class _Cache:
    """The keys and values of all layers, as `Attention` asks for them; positions are given."""

    def __init__(self, past: list[Tensor]):  # key and value of each layer, (B, G, P, K)
        self.past = past
        self.present: list[Tensor] = []

    def get_seq_length(self) -> int:
        return 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        past = self.past[2 * layer_idx : 2 * layer_idx + 2]
        joined = [torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True)]
        self.present += joined
        return joined[0], joined[1]


class DecoderGraph(nn.Module):
    """The language model with its cache."""

    def __init__(self, model: MiniMindForCausalLM):
        super().__init__()
        self.model = model

    def forward(
        self,
        inputs_embeds: Tensor,  # (B, T, D)
        attention_mask: Tensor,  # (B, P + T) integers, 0 for padding, which stands on the left
        past: list[Tensor],  # key and value of each layer, (B, G, P, K)
    ) -> tuple[Tensor, ...]:
        """Logits (B, T, V), then key and value (B, G, P + T, K) of each layer."""
        num_new, num_all = inputs_embeds.shape[1], attention_mask.shape[1]
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
        columns = torch.arange(num_all)
        is_past = columns[None, :] <= columns[num_all - num_new :, None]  # (T, P + T)
        is_seen = is_past[None, None] & (attention_mask[:, None, None] > 0)
        hidden_value = torch.finfo(inputs_embeds.dtype).min
        mask = torch.where(is_seen, 0.0, hidden_value).to(inputs_embeds.dtype)
        cache: Any = _Cache(past)
        hidden, _ = self.model.model(
            inputs_embeds, attention_mask=mask, position_ids=positions, cache=cache
        )
        return (self.model.lm_head(hidden), *cache.present)


def write_onnx(source: Source, folder: Path) -> str:
    """Write the graphs, the tokenizer, the preprocessing and the weight's description.

    Returns:
        What it is, in words.
    Raises:
        ValueError: a package is missing, or the model cannot become a graph.
    """
    if source.config.use_moe:
        raise ValueError(
            f"{source.path} has experts, which --to onnx does not write; take --to transformers"
        )
    _check_packages()
    with warnings.catch_warnings():  # of what PyTorch's own exporter will have to change
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        for graph in graphs(source):
            torch.onnx.export(
                graph.module.eval(),
                graph.inputs,
                folder / f"{graph.name}.onnx",
                dynamo=True,
                dynamic_shapes=graph.free,
                external_data=False,
                verbose=False,
                input_names=graph.in_names,
                output_names=graph.out_names,
            )
    assert source.vision is not None
    source.tokenizer.save_pretrained(folder)
    source.vision.image_processor.save_pretrained(folder)
    description = json.dumps(source.metadata, indent=1, ensure_ascii=False)
    (folder / DESCRIPTION).write_text(description, encoding="utf-8")
    return "ONNX"


def _check_packages() -> None:
    """Raise ValueError where what writes ONNX is missing."""
    missing = [name for name in PACKAGES.split()[:2] if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--to onnx needs packages (no {' and no '.join(missing)}): `pip install {PACKAGES}`"
        )


def graphs(source: Source) -> list[Graph]:
    """The three graphs of a model that sees; its attention becomes the plain one."""
    model, own, vision = source.model, source.config, source.vision
    assert isinstance(model, MiniMindVLM) and isinstance(own, VLMConfig) and vision is not None
    model.set_attn_implementation("eager")
    side = own.image_size or image_side(vision.config)
    pairs = [f"{i}.{part}" for i in range(own.num_hidden_layers) for part in ("key", "value")]
    decoder_inputs = (
        torch.zeros(BATCH, NEW, own.hidden_size),
        torch.ones(BATCH, PAST + NEW, dtype=torch.long),
        [torch.zeros(BATCH, own.num_key_value_heads, PAST, own.head_dim) for _ in pairs],
    )
    texts = {0: FREE, 1: FREE}
    return [
        Graph(
            VISION,
            VisionGraph(model),
            (torch.zeros(BATCH, 3, side, side),),
            ({0: FREE},),
            ["pixel_values"],
            ["image_features"],
        ),
        Graph(
            EMBED,
            model.model.embed_tokens,
            (torch.zeros(BATCH, NEW, dtype=torch.long),),
            (texts,),
            ["input_ids"],
            ["inputs_embeds"],
        ),
        Graph(
            DECODER,
            DecoderGraph(model),
            decoder_inputs,
            (texts, texts, [{0: FREE, 2: FREE} for _ in pairs]),
            ["inputs_embeds", "attention_mask", *(f"past.{pair}" for pair in pairs)],
            ["logits", *(f"present.{pair}" for pair in pairs)],
        ),
    ]
