"""If this fails, the picture of a record's prompt shows other tokens, or marks others as image or
supervised, than training uses.
"""

import json

import pytest
from PIL import Image, ImageFont
from support.tiny_parts import conversation

from dataset import prompt_picture
from dataset.lm_dataset import IGNORE_INDEX, VLMDataset
from dataset.prompt_spans import PART, spans_of
from model.vision_tower import load_image_processor, load_vision_config
from model.vlm_processor import VLMProcessor, load_tokenizer
from model.weights.build_model import placeholder_config

GREEN, BLUE = (0xB7, 0xE1, 0xCD), (0xAE, 0xCB, 0xFA)


@pytest.fixture
def data(tmp_path):
    """A record of two pictures, one half red, half blue; and one that has none."""
    images = tmp_path / "images"
    images.mkdir()
    half = Image.new("RGB", (32, 32), "red")
    half.paste("blue", (16, 0, 32, 32))
    half.save(images / "half.png")
    Image.new("RGB", (32, 32), "yellow").save(images / "plain.png")
    records = [
        conversation("图像里 <image> <image>?", "龘 picture.", image="half.png, plain.png"),
        conversation("What is a circle?", "Round."),
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return path


@pytest.fixture
def dataset(assets, data):
    tokenizer = load_tokenizer(assets / "tokenizer")
    config = placeholder_config({}, tokenizer, assets / "tower")
    vision = load_vision_config(assets / "tower")
    processor = VLMProcessor(
        tokenizer, load_image_processor(assets / "tower", vision), config=config
    )
    return VLMDataset(data, data.parent / "images", processor)


def arguments(assets, data, *more) -> list[str]:
    own = [
        "--data_path",
        data,
        "--images_path",
        data.parent / "images",
        "--vision_model_path",
        assets / "tower",
        "--tokenizer_path",
        assets / "tokenizer",
        "--out",
        data.parent / "prompt.png",
    ]
    return [str(a) for a in [*own, *more]]


def test_spans_are_the_samples_tokens_in_order(dataset):
    sample = dataset[0]
    spans = spans_of(sample, dataset.processor)
    assert sum(s.num_tokens for s in spans) == len(sample.input_ids)
    num_supervised = sum(s.num_tokens for s in spans if s.kind == "supervised")
    assert num_supervised == (sample.labels != IGNORE_INDEX).sum() > 0
    images = [s for s in spans if s.kind == "image"]
    assert [s.num_tokens for s in images] == [16, 16]
    left, right = (images[0].picture.getpixel((x, 16)) for x in (4, 27))
    assert left[0] > 250 > 5 > left[2] and right[2] > 250 > 5 > right[0]
    assert images[1].picture.getpixel((16, 16))[:2] == (255, 255)
    supervised = "".join(s.text for s in spans if s.kind == "supervised")
    assert supervised.replace(PART, "") == "龘 picture.<|im_end|>\n"
    text = "".join(s.text for s in spans if s.kind == "text").replace(PART, "")
    assert text.startswith("<|im_start|>system\nYou are") and "user\n图像里  ?" in text


def test_command_draws_the_picture(assets, data, capsys):
    assert prompt_picture.main(arguments(assets, data)) == 0
    assert "prompt.png" in capsys.readouterr().out
    first = Image.open(data.parent / "prompt.png")
    colours = {c: n for n, c in first.getcolors(1 << 24)}
    assert colours[GREEN] > 5000 and colours[BLUE] > 5000 and colours[(255, 255, 0)] > 10_000
    assert prompt_picture.main(arguments(assets, data, "--index", 1)) == 0
    colours = {c: n for n, c in Image.open(data.parent / "prompt.png").getcolors(1 << 24)}
    assert BLUE not in colours or colours[BLUE] < 500  # of the legend alone
    assert colours[GREEN] > 2000


def test_command_without_a_chinese_font_shows_codes(assets, data, capsys, monkeypatch):
    monkeypatch.setattr(prompt_picture, "system_fonts", lambda: [])
    assert prompt_picture.main(arguments(assets, data)) == 0
    error = capsys.readouterr().err
    assert "no font here has" in error and "图" in error and error.count("\n") == 1
    writer = prompt_picture.Writer(["图"])
    assert "".join(one for one, _ in writer.pieces("a图")) == "a\\u56fe"


def test_fonts_that_cannot_be_used_are_passed_over(tmp_path, monkeypatch):
    (tmp_path / "damaged.ttf").write_bytes(b"not a font")
    monkeypatch.setattr(prompt_picture, "system_fonts", lambda: [tmp_path / "damaged.ttf"])
    fonts = prompt_picture.choose_fonts({"a", "图"})
    assert fonts.keys() == {"a"} and isinstance(fonts["a"], ImageFont.FreeTypeFont)


def test_command_says_what_is_wrong(assets, data, capsys):
    for more, message in (
        (("--index", 2), "records 0 to 1"),
        (("--index", -1), "records 0 to 1"),
        (("--max_seq_len", 10), "no supervised token"),
        (("--images_path", data.parent), "half.png"),
    ):
        assert prompt_picture.main(arguments(assets, data, *more)) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
