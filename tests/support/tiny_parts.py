"""Makes the small parts of tests: a tokenizer, a tower, records about plain pictures."""

import json
import zlib
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TINY_MODEL = {"hidden_size": 32, "num_hidden_layers": 2}
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER_TEXT = [
    "system You are a helpful assistant",
    "user assistant user assistant",
    "What is in the picture? A red circle on a blue ground.",
    "图像里有什么？ 一个红色的圆形。 描述一下这个图像的内容。",
] * 4
COLOURS = ("red", "green", "blue", "yellow")


def make_tokenizer(folder: Path, *, texts=TOKENIZER_TEXT, vocab_size: int = 400) -> None:
    """A byte-level BPE whose special ids are 0, 1, 2 and whose `@` is 34."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL_TOKENS[0],
        unk_token=SPECIAL_TOKENS[0],
        bos_token=SPECIAL_TOKENS[1],
        eos_token=SPECIAL_TOKENS[2],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def make_tower(
    folder: Path, *, image_size: int, patch_size: int, hidden_size: int = 24, num_layers: int = 1
) -> None:
    """A CLIP vision tower with seeded random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=hidden_size,
                intermediate_size=32,
                num_hidden_layers=num_layers,
                num_attention_heads=2,
                image_size=image_size,
                patch_size=patch_size,
            )
        ).save_pretrained(folder)


def make_records(
    folder: Path, *, num_records: int = 24, seed: int = 0, multi: bool = False
) -> tuple[Path, Path]:
    """JSONL records about plain coloured pictures; every fourth has no picture, and with
    `multi` every third has two. Answers differ in length. Returns data file and image folder."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(num_records):
        colour = COLOURS[(i + seed) % 4]
        name = f"{seed}_{i}.png"
        Image.new("RGB", (40, 32), colour).save(images / name)
        answer = f"A {colour} picture. " * (1 + i % 3)
        if i % 4 == 3:
            record = conversation("What is a circle?", answer)
        elif multi and i % 3 == 0 and i:
            other = f"{seed}_{i - 1}.png"
            record = conversation("<image> and <image>?", answer, image=f"{name}, {other}")
        else:
            record = conversation("<image>\nWhat is in the picture?", answer, image=name)
        lines.append(json.dumps(record, ensure_ascii=False))
    data = folder / f"data_{seed}.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return data, images


def conversation(question: str, answer: str, **fields) -> dict:
    return {
        "conversations": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    } | fields


def write_png(path, *, width: int, height: int) -> None:
    """A whole black PNG of a bit a pixel, written row by row: no memory is needed for it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + crc

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    packer, row = zlib.compressobj(1), bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
