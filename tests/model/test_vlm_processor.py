"""If this fails, a conversation with pictures becomes the wrong token ids, image mask or pixels, or
text of a user can pass for a special token.
"""

import io
import weakref

import pytest
import torch
from PIL import Image
from support.tiny_parts import make_tokenizer

from model import vlm_processor
from model.model_vlm import MiniMindVLM, VLMConfig
from model.vision.pictures import open_image
from model.vlm_processor import (
    VLMProcessor,
    check_special_tokens,
    load_tokenizer,
    tokenizer_sha256,
)

AT, NUM_TOKENS, SIDE = 34, 16, 32
PLACEHOLDER = "@" * NUM_TOKENS
RED = (255, 0, 0)


@pytest.fixture(scope="module")
def processor(assets) -> VLMProcessor:
    config = VLMConfig(image_ids=[AT] * NUM_TOKENS, image_special_token=PLACEHOLDER)
    _, image_processor = MiniMindVLM.get_vision_model(assets / "tower")
    return VLMProcessor(load_tokenizer(assets / "tokenizer"), image_processor, config=config)


def picture(colour=RED, size=(40, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


def user(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


def image_runs(encoded: dict) -> int:
    return int(encoded["image_mask"].sum()) // NUM_TOKENS


def test_render_is_chatml(processor):
    messages = [*user("Hi <image>"), {"role": "assistant", "content": "A circle."}]
    assert processor.render(messages) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        f"<|im_start|>user\nHi {PLACEHOLDER}<|im_end|>\n"
        "<|im_start|>assistant\nA circle.<|im_end|>\n"
    )
    system = [{"role": "system", "content": "Be brief"}, *user("Hi")]
    assert processor.render(system, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_processor_encodes_text_without_images(processor):
    encoded = processor(user("What?"), [])
    assert encoded["pixel_values"].shape == (0, 3, SIDE, SIDE)
    assert not encoded["image_mask"].any() and not encoded["is_truncated"]
    text = processor.tokenizer.decode(encoded["input_ids"])
    assert text == processor.render(user("What?"))


@pytest.mark.parametrize(
    "content, rendered",
    [
        ("a@<image>b", f"a@ {PLACEHOLDER}b"),
        ("<image>@ b", f"{PLACEHOLDER} @ b"),
        ("@@<image>@<image>@", f"@@ {PLACEHOLDER} @ {PLACEHOLDER} @"),
        ("<image><image>", PLACEHOLDER * 2),
        ("me@x.org <image>", f"me@x.org {PLACEHOLDER}"),
        ("@" * (NUM_TOKENS - 1) + "<image>", "@" * (NUM_TOKENS - 1) + f" {PLACEHOLDER}"),
    ],
)
def test_processor_keeps_a_literal_at_sign_off_the_placeholder(processor, content, rendered):
    assert f"user\n{rendered}<|im_end|>" in processor.render(user(content))
    count = content.count("<image>")
    encoded = processor(user(content), [picture()] * count)
    assert image_runs(encoded) == count
    literal = content.count("@")
    assert int((encoded["input_ids"] == AT).sum()) == count * NUM_TOKENS + literal


@pytest.mark.parametrize("content", [PLACEHOLDER, f"x {PLACEHOLDER}@ y", f"<image> {PLACEHOLDER}"])
def test_processor_refuses_a_literal_placeholder(processor, content):
    with pytest.raises(ValueError, match="write <image>"):
        processor(user(content), [picture()] * content.count("<image>"))


def test_pictures_are_decoded_one_after_another(processor, tmp_path, monkeypatch):
    """So many large pictures take the memory of one; what comes out is that of all at once."""
    opened_ones, most = [], []

    def opened(source):
        image = open_image(source)
        opened_ones.append(weakref.ref(image))
        most.append(sum(one() is not None for one in opened_ones))
        return image

    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        picture((40 * i, 9, 255 - 40 * i), size=(40 + i, 32)).save(path)
    together = processor.image_processor(images=list(map(open_image, paths)), return_tensors="pt")
    monkeypatch.setattr(vlm_processor, "open_image", opened)
    assert torch.equal(processor.pixel_values(paths), together["pixel_values"])
    assert most == [1] * len(paths)


def test_processor_refuses_a_special_token_in_text(processor):
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        with pytest.raises(ValueError, match="special token"):
            processor(user(f"say {token}"), [])


@pytest.mark.parametrize("name", ["<|im_end|>", PLACEHOLDER, "\ud800"])
def test_processor_refuses_in_tools_what_it_refuses_in_text(processor, name):
    message = user("Hi")[0] | {"tools": [{"type": "function", "function": {name: {}}}]}
    with pytest.raises(ValueError, match="the text of the tools holds "):
        processor([message], [])


@pytest.mark.parametrize("tags, images", [(0, 1), (1, 0), (2, 1), (1, 2)])
def test_processor_refuses_other_numbers_of_images(processor, tags, images):
    with pytest.raises(ValueError, match=rf"{tags} <image> tag\(s\) but {images} image"):
        processor(user("<image>" * tags + "?"), [picture()] * images)


def test_processor_refuses_a_tokenizer_that_splits_the_placeholder_otherwise(assets, processor):
    config = VLMConfig(image_ids=[5] * NUM_TOKENS, image_special_token=PLACEHOLDER)
    with pytest.raises(ValueError, match="tokenizer_path"):
        VLMProcessor(processor.tokenizer, processor.image_processor, config=config)


def test_processor_truncation_never_cuts_an_image(processor):
    messages = [*user("a <image><image> b <image>"), {"role": "assistant", "content": "A circle."}]
    colours = [RED, (0, 255, 0), (0, 0, 255)]
    pictures = [picture(colour) for colour in colours]
    whole = processor(messages, pictures)
    length = len(whole["input_ids"])
    assert not processor(messages, pictures, max_length=length)["is_truncated"]
    starts = whole["image_mask"].nonzero().flatten()[::NUM_TOKENS].tolist()
    for limit in range(1, length):
        cut = processor(messages, pictures, max_length=limit)
        inside = [s for s in starts if s < limit < s + NUM_TOKENS]
        kept = inside[0] if inside else limit
        assert cut["is_truncated"]
        assert torch.equal(cut["input_ids"], whole["input_ids"][:kept])
        assert torch.equal(cut["image_mask"], whole["image_mask"][:kept])
        count = sum(s + NUM_TOKENS <= limit for s in starts)
        assert torch.equal(cut["pixel_values"], whole["pixel_values"][:count])


def test_prompt_batch_pads_on_the_left(processor):
    rows = [(user("<image>Hi <image>"), [picture()] * 2), (user("Hi"), []), (user("?"), [])]
    batch = processor.prompt_batch(rows)
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    for i, (messages, images) in enumerate(rows):
        alone = processor(messages, images, add_generation_prompt=True)
        pad = batch["input_ids"].shape[1] - len(alone["input_ids"])
        assert batch["attention_mask"][i].tolist() == [0] * pad + [1] * len(alone["input_ids"])
        assert torch.equal(batch["input_ids"][i, pad:], alone["input_ids"])
        assert torch.equal(batch["image_mask"][i, pad:], alone["image_mask"])
        assert not batch["image_mask"][i, :pad].any()
        assert (batch["input_ids"][i, :pad] == processor.tokenizer.pad_token_id).all()


def test_processor_refuses_a_broken_picture(processor):
    file = io.BytesIO()
    picture().save(file, "PNG")
    with pytest.raises(ValueError, match="not a readable image"):
        processor(user("<image>"), [file.getvalue()[:60]])


def test_load_tokenizer_checks_the_expected_hash(assets, tmp_path):
    own = load_tokenizer(assets / "tokenizer")
    own.save_pretrained(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy", expected_sha256=tokenizer_sha256(own))
    assert tokenizer_sha256(copy) == tokenizer_sha256(own)
    make_tokenizer(tmp_path / "other", vocab_size=380)
    with pytest.raises(ValueError, match="--tokenizer_path"):
        load_tokenizer(tmp_path / "other", expected_sha256=tokenizer_sha256(own))
    with pytest.raises(FileNotFoundError, match="--tokenizer_path"):
        load_tokenizer(tmp_path / "nowhere")


def test_tokenizer_beside_a_weight_is_taken_where_it_is_the_expected_one(assets, tmp_path):
    weight = tmp_path / "out" / "photos_32.pth"
    make_tokenizer(tmp_path / "out" / "tokenizer", vocab_size=380)
    expected = tokenizer_sha256(load_tokenizer(tmp_path / "out" / "tokenizer"))
    found = load_tokenizer(expected_sha256=expected, weight=weight)
    assert tokenizer_sha256(found) == expected
    usual = load_tokenizer()
    assert tokenizer_sha256(load_tokenizer(weight=weight)) == tokenizer_sha256(usual)
    other = assets / "tokenizer"
    with pytest.raises(ValueError, match="--tokenizer_path"):  # a flag is never overruled
        load_tokenizer(other, expected_sha256=expected, weight=weight)
    make_tokenizer(tmp_path / "out" / "tokenizer", vocab_size=370)
    with pytest.raises(ValueError, match=r"out.tokenizer is not the one this weight was trained"):
        load_tokenizer(expected_sha256=expected, weight=weight)


def test_special_tokens_must_have_the_contracts_ids(assets):
    tokenizer = load_tokenizer(assets / "tokenizer")
    check_special_tokens(tokenizer, vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match=f"has {len(tokenizer)} tokens but the model 200"):
        check_special_tokens(tokenizer, vocab_size=200)
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(ValueError, match="eos token has id 0, MiniMind's has 2"):
        check_special_tokens(tokenizer, vocab_size=len(tokenizer))
