"""Offers a tiny processor of generation 3, which needs no tower."""

from pathlib import Path

from support.third_generation import NUM_TOKENS3, VOCAB3, make_tokenizer3
from transformers import CLIPImageProcessorPil

from model.model_vlm import VLMConfig
from model.vlm_processor import VLMProcessor, load_tokenizer


def make_processor3(folder: Path) -> VLMProcessor:
    """Pictures of 32x32 become 16 tokens; the tokenizer is written into the folder."""
    make_tokenizer3(folder)
    config = VLMConfig(generation=3, vocab_size=VOCAB3, image_token_len=NUM_TOKENS3)
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    return VLMProcessor(load_tokenizer(folder), images, config=config)
