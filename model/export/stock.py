"""Owns the folders of stock classes: LLaVA, InternVL, Llama, Qwen2-MoE, Qwen3 and Qwen3-MoE.

Nothing of this repository is needed to load them, and no remote code.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from model.export.chat_template import with_parts
from model.export.files import save_common, save_config
from model.export.names import to_stock
from model.export.source import Source, Vision
from model.model_minimind import MiniMindConfig
from model.model_vlm import VLMConfig
from model.vision_tower import count_prefix_tokens, image_side
from model.vlm_processor import IMAGE_TAG

# (generation, has experts) -> the library's name of the language model.
TEXT_CLASSES = {
    (2, False): "Llama", (2, True): "Qwen2Moe", (3, False): "Qwen3", (3, True): "Qwen3Moe",
}  # fmt: skip
TEXT_GENERATION = {"llama": 2, "qwen3": 3}
# InternVL's config takes every tower that it reads from a file for InternVL's own, and would leave
# it random. As a kind of norm, which SigLIP has not, this makes it an error that says what to do.
LOAD_INTERNVL = "from_pretrained(F, vision_config=SiglipVisionConfig.from_pretrained(F))"


@dataclass(frozen=True)
class VisionFormat:
    """A stock model that sees: the library's class, and what of ours it computes.

    projector: ours that its projector is. towers: kinds whose features it reads as ours does.
    """

    class_name: str
    projector: str
    towers: tuple[str, ...]


VISION_FORMATS = {
    "llava": VisionFormat("Llava", "linear", ("clip_vision_model",)),
    "internvl": VisionFormat("InternVL", "mlp", ("siglip_vision_model",)),
}


def write_stock(
    source: Source, folder: Path, *, format_name: str, dtype: str, projector_gelu: bool
) -> str:
    """Write a folder of a stock class.

    Args:
        format_name: a key of `names.PREFIXES`. dtype: of the tensors.
    Returns:
        The name of the class that loads it.
    Raises:
        ValueError: no stock class computes the same.
    """
    text = stock_text_config(source.config)
    tokenizer = copy.deepcopy(source.tokenizer)
    if source.vision is None:
        wanted = TEXT_GENERATION[format_name]
        if source.config.generation != wanted:
            right = {n: name for name, n in TEXT_GENERATION.items()}[source.config.generation]
            raise ValueError(
                f"{source.path} is of generation {source.config.generation}, --to {format_name} "
                f"of {wanted}; take --to {right}"
            )
        config, image_id = text, None
        config.architectures = [f"{_class_of(source.config)}ForCausalLM"]
        tokenizer.save_pretrained(folder)
    else:
        config = _vision_config(source, text, tokenizer, format_name, projector_gelu=projector_gelu)
        image_id = config.image_token_id
        _save_processor(source.vision, source.config, tokenizer, config, folder)
    tensors = to_stock(
        source.state, format_name, num_rows=text.vocab_size, with_gelu=projector_gelu
    )
    is_added = image_id is not None and source.config.vocab_size <= image_id
    save_config(config, folder, dtype=dtype)
    save_common(
        source,
        tensors,
        folder,
        dtype=getattr(torch, dtype),
        never=image_id if is_added else None,
    )
    assert config.architectures
    return str(config.architectures[0])


def stock_text_config(config: MiniMindConfig) -> PreTrainedConfig:
    """The library's config of the language model that computes what ours does.

    Raises:
        ValueError: there is none.
    """
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": config.rope_parameters,
        "attention_dropout": config.dropout,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    if config.use_moe:
        num_shared = 1 if config.generation == 2 else 0
        if config.n_shared_experts != num_shared:
            raise ValueError(
                f"{config.n_shared_experts} shared experts: the stock {_class_of(config)} has "
                f"{num_shared}, so no stock class computes the same; export by --to transformers"
            )
        fields |= {
            "num_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            "shared_expert_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob
            and (config.num_experts_per_tok > 1 or config.generation > 2),
            "decoder_sparse_step": 1,
            "router_aux_loss_coef": config.aux_loss_alpha,
            "qkv_bias": False,
        }
        if config.generation == 2 and config.head_dim * config.num_attention_heads != (
            config.hidden_size
        ):
            raise ValueError(
                f"head_dim {config.head_dim}: the stock Qwen2Moe takes hidden_size / heads alone, "
                "so no stock class computes the same; export by --to transformers"
            )
    made: PreTrainedConfig = getattr(transformers, f"{_class_of(config)}Config")(**fields)
    return made


def _class_of(config: MiniMindConfig) -> str:
    return TEXT_CLASSES[config.generation, config.use_moe]


def _vision_config(
    source: Source,
    text: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    format_name: str,
    *,
    projector_gelu: bool,
) -> PreTrainedConfig:
    """The config of the whole; gives the tokenizer a token for images, where it needs one."""
    own, vision = source.config, source.vision
    assert isinstance(own, VLMConfig) and vision is not None
    _check_computable(own, vision, format_name, path=source.path)
    is_single = len(own.image_ids) == 1
    token = own.image_special_token if is_single else IMAGE_TAG
    if not is_single:
        tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    image_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(image_id, int)
    text.vocab_size = max(text.vocab_size, image_id + 1)
    num_prefix = count_prefix_tokens(vision.config)
    num_states = vision.config.num_hidden_layers + 1
    fields: dict[str, Any] = {
        "text_config": text.to_dict(),
        "vision_config": vision.config.to_dict(),
        "image_token_id": image_id,
        "image_seq_length": own.num_image_tokens,
        "vision_feature_layer": -1 if own.vision_layer is None else own.vision_layer % num_states,
        "vision_feature_select_strategy": "full" if own.keep_cls or not num_prefix else "default",
        "projector_hidden_act": "linear",
        "tie_word_embeddings": True,
    }
    if format_name == "internvl":
        fields |= {"downsample_ratio": 1.0, "projector_hidden_act": "gelu"}
        fields["vision_config"] = copy.deepcopy(vision.config)
        fields["vision_config"].norm_type = LOAD_INTERNVL
    elif projector_gelu:
        fields |= {"projector_hidden_act": "gelu"}
    name = VISION_FORMATS[format_name].class_name
    config: PreTrainedConfig = getattr(transformers, f"{name}Config")(**fields)
    config.architectures = [f"{name}ForConditionalGeneration"]
    return config


def _check_computable(own: VLMConfig, vision: Vision, format_name: str, *, path: Path) -> None:
    """Raise ValueError where the format's class would compute something else."""
    form = VISION_FORMATS[format_name]
    found = {
        "projector": (own.projector, (form.projector,)),
        "vision tower": (vision.config.model_type, form.towers),
        "token_merge": (own.token_merge, (1,)),
        "image_size": (own.image_size, (image_side(vision.config), None)),
    }
    for what, (value, possible) in found.items():
        if value not in possible:
            others = [
                name for name, other in VISION_FORMATS.items() if own.projector == other.projector
            ]
            way_out = f"--to {others[0]}" if what == "projector" else "--to transformers"
            raise ValueError(
                f"{path} has {what} {value!r}, but a stock {form.class_name} has "
                f"{possible[0]!r}; export it by {way_out}"
            )


def _save_processor(
    vision: Vision,
    own: MiniMindConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    folder: Path,
) -> None:
    """Write processor, tokenizer and chat template.

    It is LLaVA's for InternVL too: that one's cuts pictures into tiles and frames each image by two
    tokens, neither of which our models know.
    """
    is_full = config.vision_feature_select_strategy == "full"
    image_processor: Any = copy.deepcopy(vision.image_processor)
    if not getattr(image_processor, "crop_size", None):
        image_processor.crop_size = image_processor.size  # by it vLLM counts an image's tokens
    image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    assert isinstance(image_token, str)
    processor = transformers.LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=count_prefix_tokens(vision.config),
        image_token=image_token,
        chat_template=with_parts(tokenizer.chat_template, image=image_token),
    )
    grid = image_side(vision.config) // vision.config.patch_size
    num_prefix = count_prefix_tokens(vision.config)
    assert own.num_image_tokens == grid**2 + (num_prefix if is_full else 0)
    processor.save_pretrained(folder)
