"""Chat and pictures to ids, image mask and pixels; pictures of every kind."""

import io
import weakref

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from PIL import Image

from model import vlm_processor
from model.model_vlm import MiniMindVLM, VLMConfig
from model.vlm_processor import (
    VLMProcessor,
    check_special_tokens,
    load_tokenizer,
    open_image,
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


def grey_ramp(mode: str) -> Image.Image:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    return Image.fromarray(values.astype(np.int32) if mode == "I" else values).convert(mode)


def palette_with_transparency() -> Image.Image:
    image = picture().convert("P", palette=Image.Palette.ADAPTIVE)
    image.info["transparency"] = bytes([255] * 4)
    return image


def test_open_image_of_every_mode_is_rgb():
    red_modes = ["RGB", "RGBA", "CMYK", "YCbCr", "HSV", "P", "RGBX", "PA"]
    images = {m: picture().convert("RGBA" if m == "PA" else m).convert(m) for m in red_modes}
    images["P with transparency"] = palette_with_transparency()
    for mode, image in images.items():
        opened = open_image(image)
        assert opened.mode == "RGB" and opened.size == (40, 32)
        error = np.abs(np.asarray(opened, dtype=int) - np.array(RED)).max()
        assert error <= 3, mode
    for mode in ("L", "LA", "1", "I", "F", "I;16"):
        white = Image.new(mode, (8, 6), (255, 255) if mode == "LA" else 255)
        opened = open_image(white if mode != "1" else Image.new("1", (8, 6), 1))
        assert opened.mode == "RGB" and opened.size == (8, 6)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_open_image_scales_16_bits_to_8(mode):
    grey = np.asarray(open_image(grey_ramp(mode)))[..., 0].flatten()
    expected = np.linspace(0, 255, 64)
    assert np.abs(grey - expected).max() <= 1.5  # clipped, it would be white from value 256 on


def test_open_image_scales_floats_in_0_1():
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    grey = np.asarray(open_image(Image.fromarray(values)))[..., 0].flatten()
    assert np.abs(grey - np.linspace(0, 255, 16)).max() <= 1


def test_open_image_takes_the_first_frame_of_an_animation(tmp_path):
    frames = [picture(RED), picture((0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=50)
    opened = open_image(tmp_path / "a.gif")
    assert opened.mode == "RGB" and opened.getpixel((3, 3)) == RED


def test_open_image_turns_upright_by_exif():
    image = picture((0, 0, 255), size=(40, 20))
    image.paste(RED, (0, 0, 20, 20))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the left half is the top
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    opened = open_image(file.getvalue())
    assert opened.size == (20, 40)
    assert opened.getpixel((10, 5)) == RED and opened.getpixel((10, 35)) == (0, 0, 255)


def noise_bytes(kind: str) -> bytes:
    values = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_open_image_refuses_a_truncated_file(processor, kind):
    data = noise_bytes(kind)
    open_image(data)
    for share in (0.0, 0.01, 0.3, 0.7):
        with pytest.raises(ValueError, match="not a readable image"):
            open_image(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="not a readable image"):
        processor(user("<image>"), [data[: len(data) // 2]])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_open_image_survives_damaged_exif():
    """Whatever the EXIF block holds, the answer is a picture or a ValueError."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x0100], exif[0x011A] = 6, "x" * 20, 40, 72.0
    file = io.BytesIO()
    picture().save(file, "JPEG", exif=exif)
    start = file.getvalue().index(b"Exif")
    for place in range(start + 16, start + 60):
        for value in range(14):  # the types a tag can have, and one that it cannot
            data = bytearray(file.getvalue())
            data[place] = value
            try:
                assert open_image(bytes(data)).mode == "RGB"
            except ValueError:
                pass


def test_open_image_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jpg"):
        open_image(tmp_path / "none.jpg")


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


def test_special_tokens_must_have_the_contracts_ids(assets):
    tokenizer = load_tokenizer(assets / "tokenizer")
    check_special_tokens(tokenizer, vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match=f"has {len(tokenizer)} tokens but the model 200"):
        check_special_tokens(tokenizer, vocab_size=200)
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(ValueError, match="eos token has id 0, MiniMind's has 2"):
        check_special_tokens(tokenizer, vocab_size=len(tokenizer))
