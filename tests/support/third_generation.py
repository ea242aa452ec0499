"""Offers what belongs to a tiny model of generation 3: tokenizer, SigLIP tower, weight."""

from pathlib import Path

import torch
from support.tiny_parts import TINY_MODEL, TOKENIZER_TEXT
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

from model.model_vlm import MiniMindVLM, VLMConfig
from model.vlm_processor import VLMProcessor, load_tokenizer
from model.weights.build_model import LoadedModel

NUM_TOKENS3, VOCAB3 = 16, 420
SPECIAL_TOKENS3 = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|reserved_{i}|>" for i in range(3, 12)),
    "<|image_pad|>", *(f"<|reserved_{i}|>" for i in range(13, 21)),
]  # fmt: skip
ADDED_TOKENS3 = [
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
    *(f"<|buffer_{i}|>" for i in range(27, 36)),
]  # fmt: skip
# What the published template does: no default system message, tools behind the system message,
# each answer behind its think block, and a generation prompt that closes or opens one.
CHAT_TEMPLATE3 = (
    "{% if tools or messages[0].role == 'system' %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% if tools %}{{ '\n' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}"
    "<|im_start|>user\n{{ message.content }}<|im_end|>\n"
    "{% elif message.role == 'assistant' %}"
    "{% set said = message.content.split('</think>') %}"
    "<|im_start|>assistant\n<think>\n"
    "{% if said | length > 1 %}{{ said[0].split('<think>')[-1].strip('\n') }}{% endif %}"
    "{{ '\n' }}</think>\n\n{{ said[-1].lstrip('\n') }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if open_thinking is defined and open_thinking is true %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make_tokenizer3(folder: Path, *, texts=TOKENIZER_TEXT) -> None:
    """A byte-level BPE with the ids of generation 3: 0 to 20 special (12 is the image's), 21 to 35
    added but ordinary (25 and 26 open and close a think block)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB3,
            special_tokens=SPECIAL_TOKENS3 + ADDED_TOKENS3,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    ordinary = [AddedToken(text, special=False, normalized=False) for text in ADDED_TOKENS3]
    bpe.add_tokens(ordinary)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL_TOKENS3[0],
        unk_token=SPECIAL_TOKENS3[0],
        bos_token=SPECIAL_TOKENS3[1],
        eos_token=SPECIAL_TOKENS3[2],
        chat_template=CHAT_TEMPLATE3,
    ).save_pretrained(folder)


def make_tower3(folder: Path, *, image_size: int = 32, patch_size: int = 8) -> None:
    """A SigLIP vision tower with seeded random weights: 16 tokens, 24 wide."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch_size,
            vision_use_head=False,
        )
        SiglipVisionModel(config).save_pretrained(folder)


def make_assets3(folder: Path) -> None:
    """Tokenizer and tower, in `tokenizer` and `tower`."""
    make_tokenizer3(folder / "tokenizer")
    make_tower3(folder / "tower")


def make_loaded3(assets: Path, **fields) -> LoadedModel:
    """As `tiny_vlm.make_loaded`, of generation 3."""
    torch.manual_seed(0)
    own = {"generation": 3, "vocab_size": VOCAB3, "vision_hidden_size": 24}
    config = VLMConfig(
        **(TINY_MODEL | own | {"initializer_range": 0.3, "image_token_len": NUM_TOKENS3} | fields)
    )
    model = MiniMindVLM(config, vision_model_path=assets / "tower").eval().requires_grad_(False)
    processor = VLMProcessor(
        load_tokenizer(assets / "tokenizer"), model.image_processor, config=config
    )
    return LoadedModel(model, processor, assets, can_see=True)


def make_it_say(loaded: LoadedModel, *parts: str) -> list[int]:
    """Every answer of the model becomes this text, of which each part is tokenized on its own.

    What it computes of given texts stays as it is. The answers of one batch go in step; batches at
    the same time would not.

    Returns:
        The ids of an answer, the end token included.
    """
    tokenizer = loaded.processor.tokenizer
    ids = [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)]
    ids.append(tokenizer.eos_token_id)
    position, is_in_forward = 0, False

    def say(logits):
        said = torch.full_like(logits, -100.0)
        said[..., ids[min(position, len(ids) - 1)]] = 100.0
        return said

    def begin(_module, _args):
        nonlocal is_in_forward
        is_in_forward = True

    def script(_module, _args, inputs, output):
        nonlocal position, is_in_forward
        is_in_forward = False
        is_prompt = "input_ids" in inputs or inputs["inputs_embeds"].shape[1] > 1
        position = 0 if is_prompt else position + 1
        output.logits = say(output.logits)
        return output

    def script_token(_module, _args, logits):
        nonlocal position
        if is_in_forward:
            return logits
        position += 1
        return say(logits)

    loaded.model.register_forward_pre_hook(begin)
    loaded.model.register_forward_hook(script, with_kwargs=True)
    loaded.model.lm_head.register_forward_hook(script_token)
    return ids
