"""If this fails, the web page gives the model another question or history than the visitor sees, or
saves a page that is wrong. No browser is needed.
"""

import argparse
import asyncio
import re
import shutil
import string
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFile
from support.scripts import ROOT
from support.tiny_parts import write_png
from support.tiny_vlm import GREEDY, make_loaded, picture, save_tiny

from model import vlm_processor
from model.generation.engine import VLMEngine, ask
from model.options import add_model_arguments
from model.serving.web import conversation as web_chat
from model.serving.web.attention_picture import SIDE, draw_look
from model.serving.web.conversation import ChatTurn, check_image, new_turn, prompt_of, to_html
from model.serving.web.protection import login
from model.serving.web.protection.privacy import without_paths
from model.serving.web.text import TEXTS, page_language, text
from model.serving.web.weights import MAX_LOADED, Weights
from model.vlm_processor import open_image


@pytest.fixture(scope="module")
def engine(assets) -> VLMEngine:
    return VLMEngine(make_loaded(assets))


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    for i in (6, 9):
        picture(i).save(tmp_path / f"{i}.png")
    return [str(tmp_path / f"{i}.png") for i in (6, 9)]


def test_prompt_holds_every_turn_and_picture(engine, pictures):
    turns = [
        ChatTurn("What is in the picture?", pictures[:1], "A <image> circle.<|im_end|>"),
        ChatTurn("Red?", [], "Yes."),
        ChatTurn("<image> or not?", pictures[1:]),
    ]
    messages, images = prompt_of(engine, turns)
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 + ["user"]
    assert messages[:1] == ask("What is in the picture?", num_images=1)
    assert messages[2]["content"] == "Red?" and messages[4]["content"] == "<image> or not?"
    assert images == pictures
    (answer,) = engine.generate([(messages, images)], GREEDY)  # what the model said does no harm
    turns[0].answer = "Something else."
    (other,) = engine.generate([prompt_of(engine, turns)], GREEDY)
    assert answer.num_prompt_tokens != other.num_prompt_tokens


def test_a_turn_decodes_each_picture_once(engine, pictures, monkeypatch):
    opened = []

    def counted(source, **options):
        opened.append(source)
        return open_image(source, **options)

    for module in (web_chat, vlm_processor):
        monkeypatch.setattr(module, "open_image", counted)
    turn = new_turn("What is in them?", pictures, default_question="?")
    messages, images = prompt_of(engine, [turn])
    (answer,) = engine.generate([(messages, images)], GREEDY)
    assert opened == pictures
    pixels = engine.processor.pixel_values(images)  # as the page looks: the picture is drawn, too
    maps = engine.look(messages, pixels, "A red circle.")
    assert opened == pictures * 2 and len(maps) == len(pictures)
    again = engine.look(messages, images, "A red circle.")
    assert all(torch.equal(a, b) for a, b in zip(maps, again, strict=True))


@pytest.mark.parametrize("said", [
    "cannot identify image file '/home/me/my photos/x.png'",
    f"{ROOT}/out/x.png is not readable", "C:\\Users\\me\\x.png is broken",
    "no file /tmp/minimind-v-abc/uploads/x.png there",
])  # fmt: skip
def test_an_error_loses_its_paths(said):
    shown = without_paths(ValueError(said))
    assert "x.png" in shown and not re.search(r"home|me\b|Users|tmp|uploads", shown), shown
    assert without_paths(FileNotFoundError(2, "No such file", "/home/me/x")) == "No such file"
    assert without_paths("1/2 of <b>text</b> and/or more") == "1/2 of <b>text</b> and/or more"


def test_guesses_from_everywhere_pass_one_by_one(monkeypatch):
    monkeypatch.setattr(login, "ONE_BY_ONE_S", 0.001)
    now_s = 0.0

    async def guess() -> list[bool]:
        nonlocal now_s
        throttle = login.Throttle(clock=lambda: now_s)
        for i in range(login.BUSY_FAILURES - 1):
            throttle.note_attempt(f"address {i}")
        assert await throttle.pass_one_by_one() and throttle.wait_s("address 1") == 0
        throttle.note_attempt("another")
        turns = [throttle.pass_one_by_one() for _ in range(login.MAX_WAITING + 5)]
        passed = await asyncio.gather(*turns)
        throttle.forgive("another")
        now_s += login.BUSY_WINDOW_S + 1
        assert await throttle.pass_one_by_one()
        for _ in range(login.FREE_FAILURES + 20):
            throttle.note_attempt("me")
        assert throttle.wait_s("me") == login.MAX_WAIT_S and throttle.wait_s("you") == 0
        return passed

    assert asyncio.run(guess()).count(False) == 5


def test_question_is_checked(tmp_path, pictures):
    assert new_turn(" Hi \n", [], default_question="?") == ChatTurn("Hi", [])
    assert new_turn("", pictures, default_question="What?") == ChatTurn("What?", pictures)
    for question, images, message in (
        ("  ", [], "no question"),
        ("a" * 20_001, [], "20000 characters"),
        ("Hi", pictures * 5, "10 pictures at once, 8 at most"),
        ("Hi", [str(tmp_path / "gone.png")], "gone.png is no longer here"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            new_turn(question, images, default_question="?")


def test_image_is_checked_before_it_is_decoded(tmp_path, monkeypatch):
    (tmp_path / "text.jpg").write_text("I am no picture")
    write_png(tmp_path / "bomb.png", width=30_000, height=30_000)
    write_png(tmp_path / "wide.png", width=10_000, height=6000)
    Image.new("L", (5000, 5)).save(tmp_path / "thin.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(100 << 20)
    whole = picture(3)
    whole.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-60])
    for name, message in (
        ("text.jpg", "not a readable image"),
        ("bomb.png", "is over 50,000,000 pixels"),
        ("wide.png", "10000x6000 is over 50,000,000 pixels"),
        ("thin.png", "too thin"),
        ("huge.png", "larger than 20 MB"),
        ("cut.png", "not a readable image"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*({message})"):
            check_image(tmp_path / name)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="pixels"):
        check_image(tmp_path / "bomb.png")


def test_saved_page_is_one_file_of_escaped_words(pictures):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)> & {braces}"
    turns = [ChatTurn(evil, pictures, evil, note=evil), ChatTurn("你好", [], "好")]
    page = to_html(turns, language="zh", text=text)
    assert page.count("&lt;script&gt;") == 3 and "<script" not in page and "你好" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2 and all(s.startswith("data:image/jpeg;base64,") for s in sources)
    Path(pictures[0]).unlink()  # deleted after some hours
    again = to_html(turns, language="en", text=text)
    assert "[the picture is no longer here]" in again and again.count("data:image/jpeg") == 1
    assert "default-src 'none'" in page and "{braces}" in page


def test_every_text_is_there_in_both_languages():
    for key, translations in TEXTS.items():
        assert len(translations) == 2 and all(translations), key
        english, chinese = (
            {name for _, name, *_ in string.Formatter().parse(words) if name}
            for words in translations
        )
        assert english == chinese, key
    assert text("loaded", "zh", weight="x{y}") == "当前权重：x{y}"
    assert [page_language(h) for h in ("zh-CN,en;q=0.5", "en-US", None)] == ["zh", "en", "en"]


def test_look_glows_where_the_attention_is():
    attention = torch.full((4, 4), 0.001)
    attention[0, 3] = 0.2
    drawn = draw_look(Image.new("RGB", (32, 32), "blue"), attention)
    assert drawn.size == (SIDE, SIDE)
    bright, dark = drawn.getpixel((SIDE - 30, 30)), drawn.getpixel((30, SIDE - 30))
    assert bright[0] > 180 and dark[0] < 40 and dark[2] > bright[2]


@pytest.fixture
def weights_args(assets, tmp_path) -> argparse.Namespace:
    """Four weights, a broken one, a description without a weight, a weight without one."""
    for i in range(4):
        save_tiny(make_loaded(assets, num_hidden_layers=1 + i), tmp_path / f"w{i}_32.pth")
    shutil.copy(tmp_path / "w0_32.json", tmp_path / "broken_32.json")
    (tmp_path / "broken_32.pth").write_bytes(b"not a weight")
    (tmp_path / "scores.json").write_text("{}")
    shutil.copy(tmp_path / "w0_32.pth", tmp_path / "bare_32.pth")
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return parser.parse_args(
        [
            "--save_dir",
            str(tmp_path),
            *"--weight w1 --device cpu".split(),
            "--vision_model_path",
            str(assets / "tower"),
            "--tokenizer_path",
            str(assets / "tokenizer"),
        ]
    )


def test_weights_are_found_and_loaded_on_demand(weights_args):
    weights = Weights(weights_args)
    assert weights.default == "w1_32"
    assert set(weights.names()) == {f"w{i}_32" for i in range(4)}
    assert weights.names()["w3_32"] == "w3_32 (32 x 4)"
    layers = [weights.get(f"w{i}_32").model.config.num_hidden_layers for i in range(4)]
    assert layers == [1, 2, 3, 4]
    assert weights.get("w3_32") is weights.get("w3_32")
    assert len(weights._loaded) == MAX_LOADED
    assert weights.get("w1_32").model.config.num_hidden_layers == 2  # loaded again after it left
    for name, message in (("broken_32", "no weight 'broken_32'"), ("../x", "no weight '../x'")):
        with pytest.raises(ValueError, match=message):
            weights.get(name)
