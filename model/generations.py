"""Owns what differs between the generations of published models: a table, read by everything else.

Generation 2 is MiniMind-V's second (2025: CLIP, 196 `@`, linear projection), generation 3 is
minimind-3v (2026: SigLIP2, 64 `<|image_pad|>`, MLP projection, norms of queries and keys).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_DIR = Path(__file__).resolve().parent
DEFAULT_GENERATION = 2


@dataclass(frozen=True)
class Generation:
    """One generation of models.

    config: defaults of the fields of `MiniMindConfig` and `VLMConfig`.
    intermediate_size: width of the MLP, from the hidden size.
    yarn_factor: by which YaRN stretches the positions.
    has_qk_norm: whether an RMSNorm over each head's queries and keys precedes RoPE.
    scales_in_float32: whether RMSNorm multiplies by its weight before it casts back.
    image_token: text whose repetition stands for an image.
    vision_dir: default folder of the tower. tokenizer_dirs: the tokenizer's, the first that fits.
    vision, tokenizer: what `dataset/download.py` calls them.
    sampling: defaults of generation, `temperature`, `top_p` and `top_k`.
    lr_peak: where the learning rate begins, in units of `--learning_rate`.
    prompt: the question about each picture of `eval_vlm.py`.
    draws: defaults of training's flags of the same names: the share of samples that get a system
        message, and of those that keep their empty think blocks.
    can_think: whether an answer may stand behind a think block.
    shows_speed: whether `eval_vlm.py` tells the tokens per second where no flag says so.
    """

    config: dict[str, Any]
    intermediate_size: Callable[[int], int]
    yarn_factor: float
    has_qk_norm: bool
    scales_in_float32: bool
    image_token: str
    vision_dir: Path
    tokenizer_dirs: tuple[Path, ...]
    vision: str
    tokenizer: str
    sampling: dict[str, float]
    lr_peak: float
    prompt: str
    draws: dict[str, float]
    can_think: bool
    shows_speed: bool


GENERATIONS = {
    2: Generation(
        config={
            "hidden_size": 512,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "aux_loss_alpha": 0.01,
            "seq_aux": True,
            "image_ids": [34] * 196,
            "image_token_len": 196,
            "projector": "linear",
        },
        intermediate_size=lambda hidden: 64 * math.ceil(int(hidden * 8 / 3) / 64),
        yarn_factor=4.0,
        has_qk_norm=False,
        scales_in_float32=False,
        image_token="@",
        vision_dir=MODEL_DIR / "vision_model" / "clip-vit-base-patch16",
        tokenizer_dirs=(MODEL_DIR / "minimind_tokenizer", MODEL_DIR),  # the published one, ours
        vision="vision",
        tokenizer="tokenizer",
        lr_peak=1.1,
        sampling={"temperature": 0.65, "top_p": 0.85, "top_k": 0},
        prompt="仔细看一下这张图：\n\n<image>\n\n描述一下这个图像的内容。",
        draws={"system_share": 0.0, "empty_think_share": 1.0},
        can_think=False,
        shows_speed=False,
    ),
    3: Generation(
        config={
            "hidden_size": 768,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "num_experts_per_tok": 1,
            "n_shared_experts": 0,
            "aux_loss_alpha": 5e-4,
            "seq_aux": False,
            "image_ids": [12],
            "image_token_len": 64,
            "projector": "mlp",
        },
        intermediate_size=lambda hidden: 64 * math.ceil(hidden * math.pi / 64),
        yarn_factor=16.0,
        has_qk_norm=True,
        scales_in_float32=True,
        image_token="<|image_pad|>",
        vision_dir=MODEL_DIR / "siglip2-base-p32-256-ve",
        tokenizer_dirs=(MODEL_DIR / "minimind3_tokenizer",),
        vision="vision3",
        tokenizer="tokenizer3",
        lr_peak=1.0,
        sampling={"temperature": 0.7, "top_p": 0.85, "top_k": 50},
        prompt="<image>\n请描述这张图中的主要物体和场景。",
        draws={"system_share": 0.2, "empty_think_share": 0.2},
        can_think=True,
        shows_speed=True,
    ),
}
