"""If this fails, something that visitors do on the web page does not work in a real Chromium, or
one visitor disturbs another. Screenshots are kept; the test prints where.
"""

import argparse
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.tiny_parts import write_png
from support.tiny_vlm import never_end
from support.web_client import HttpVisitor
from support.web_site import BREAK
from support.web_visitor import (
    PATIENCE_S,
    Visitor,
    make_weights,
    model_flags,
    serving,
    visiting,
)

from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling
from model.options import add_model_arguments

pytestmark = pytest.mark.slow
NUM_VISITORS, NUM_SCREENS = 20, 2
CONCURRENCY = 2  # answers at once
LENGTH = 60  # tokens of an answer, unless a visitor says otherwise
INJECTION = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><b>bold</b> & done'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights of which one is broken, and pictures."""
    folder = tmp_path_factory.mktemp("page")
    make_weights(folder)
    for colour in ("red", "blue", "green"):
        Image.new("RGB", (64, 48), colour).save(folder / f"{colour}.png")
    return folder


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    print(f"\nscreenshots: {folder}")


@pytest.fixture(scope="module")
def site(folder):
    with serving(folder, "--max_new_tokens", LENGTH, "--batch", CONCURRENCY) as site:
        yield site


def test_a_conversation_with_pictures(browser, site, folder, screenshots):
    num_before = len(site.events("answer"))
    with visiting(browser, site) as me:
        me.shoot(screenshots, "1_empty")
        assert "projection" not in me.page.locator("#status").inner_text()
        me.attach_picture(folder / "red.png")
        me.send("What is in the picture?")
        seen = me.watch_the_answer_grow()
        assert len(seen) > 2, "the text came in one piece"
        me.shoot(screenshots, "2_answered")
        me.ask("And what is around it?")
        me.attach_picture(folder / "blue.png")
        me.ask("这张图片呢？")
        me.shoot(screenshots, "3_follow_up")
        assert me.asked() == ["What is in the picture?", "And what is around it?", "这张图片呢？"]
        assert me.page.locator("#chat .user img").count() == 2 and len(me.said()) == 3

    first, second, third = (e["messages"] for e in site.events("question")[num_before:])
    answers = [e["text"] for e in site.wait_for("answer", num_before + 3)[num_before:]]
    assert first == ask("What is in the picture?", num_images=1)
    assert second[0] == third[0] == first[0] and second[1] == third[1]
    assert [m["role"] for m in third] == ["user", "assistant", "user", "assistant", "user"]
    assert third[2]["content"] == "And what is around it?"
    assert third[4:] == ask("这张图片呢？", num_images=1)
    # What the model said before is what it is told it said (an image tag of its own but words).
    assert all(answers) and second[1]["content"][:5] == answers[0][:5]
    colours = [Image.open(i).getpixel((0, 0)) for i in site.events("question")[-1]["images"]]
    assert colours == [(255, 0, 0), (0, 0, 255)]


def test_same_seed_gives_the_text_of_the_engine(browser, site, folder):
    with visiting(browser, site) as me:
        me.open("sampling")
        me.enter(me.page.locator("#seed textarea, #seed input"), "7")
        me.attach_picture(folder / "green.png")
        assert "seed 7" in me.ask("What is it?")
        text = site.events("answer")[-1]["text"]
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    engine = VLMEngine.from_args(parser.parse_args(model_flags(folder)))
    never_end(engine.model)
    sampling = Sampling(max_new_tokens=LENGTH, seed=7)
    images = [folder / "green.png"]
    (answer,) = engine.generate([(ask("What is it?", num_images=1), images)], sampling)
    assert text == answer.text


def test_stop_regenerate_clear_and_save(browser, site, folder, screenshots, tmp_path):
    with visiting(browser, site) as me:
        me.set_length(2000)
        me.send(INJECTION)
        me.page.wait_for_function("document.querySelector('#chat .bot .message-content')")
        me.shoot(screenshots, "4_stop")
        me.stop()
        assert "stopped" in me.wait_for_end()
        assert site.events("answer")[-1]["finish_reason"] == "cancelled"
        assert me.asked() == [INJECTION] and me.page.locator("#chat b").count() == 0
        me.set_length(5)
        me.regenerate()
        me.page.wait_for_function(
            "/Details5 tokens/.test(document.querySelector('#status').textContent)"
        )
        assert len(me.said()) == 1 and site.events("question")[-1]["messages"] == ask(
            INJECTION, num_images=0
        )
        with me.page.expect_download() as download:
            me.page.locator("#share").click()
        download.value.save_as(tmp_path / "saved.html")
        assert "<script" not in (tmp_path / "saved.html").read_text(encoding="utf-8")
        me.page.goto((tmp_path / "saved.html").as_uri())
        assert INJECTION in me.page.locator("section.user").inner_text()
        assert me.page.evaluate("window.hacked") is None
        me.shoot(screenshots, "5_saved")
        me.page.goto(site.url)
        me.wait_until_whole()
        assert me.asked() == [INJECTION]  # this tab's conversation is kept


def test_pictures_come_by_example_paste_drop_and_camera(browser, site, folder, screenshots):
    with visiting(browser, site) as me:
        me.open("pictures")
        me.page.locator("#examples button").nth(3).click()
        me.page.locator("#box .thumbnail-item").nth(0).wait_for()
        me.hand_over(folder / "red.png", "paste")
        me.hand_over(folder / "blue.png", "drop")
        me.open("camera")
        me.page.locator("#camera .wrap button, #camera [data-testid=webcam] button").first.click()
        # A photo can be taken once the camera's first frame is there.
        me.page.wait_for_function("document.querySelector('#camera video')?.videoWidth > 0")
        me.page.get_by_label("capture photo").click()
        me.page.locator("#box .thumbnail-item").nth(3).wait_for()
        me.shoot(screenshots, "6_four_pictures")
        me.ask("What are they?")
    question = site.events("question")[-1]
    assert question["messages"] == ask("What are they?", num_images=4)
    sizes = [Image.open(path).size for path in question["images"]]
    assert sizes[1:3] == [(64, 48), (64, 48)] and min(sizes[0]) >= 200 and min(sizes[3]) >= 200


def test_where_it_looks_and_the_other_language(browser, site, folder, screenshots):
    with visiting(browser, site, locale="zh-CN") as me:
        me.attach_picture(folder / "red.png")
        me.ask("图里有什么？")
        me.open("look")
        me.page.locator("#look_go").click()
        picture = me.page.locator("#look_picture img")
        picture.wait_for()
        assert picture.evaluate("e => e.decode().then(() => e.naturalWidth)") == 448
        me.page.get_by_text("的注意力落在这张图片上").wait_for()
        me.shoot(screenshots, "7_look")
        me.page.locator("#language label").first.click()
        me.page.wait_for_function("document.querySelector('#clear').innerText.includes('New')")
        me.page.locator("#clear").click()
        me.page.wait_for_function("!document.querySelector('#chat .bot')")
        me.shoot(screenshots, "8_english")


def test_switching_weights(browser, site, folder, screenshots):
    for suffix in (".pth", ".json"):
        shutil.copy(folder / f"sft_vlm_32{suffix}", folder / f"late_32{suffix}")
    with visiting(browser, site) as me:
        me.choose_weight("other_32_moe")
        me.page.get_by_text("Now talking: other_32_moe").wait_for()
        assert "other_32_moe" in me.ask("What is a circle?")
        # One that does not load is not offered; this one breaks while the page is open.
        (folder / "late_32.pth").write_bytes(b"no longer a weight")
        me.page.locator("#weight input").click()
        late = me.page.get_by_role("option", name=re.compile("^late_32"))
        late.wait_for()
        assert me.page.get_by_role("option", name=re.compile("^broken_32")).count() == 0
        late.click()
        shot = (screenshots, "9_weights")
        me.is_told("late_32 was not loaded, the one before stays", shot=shot)
        me.page.wait_for_function(
            "document.querySelector('#weight input').value.startsWith('other_32_moe')"
        )
        me.ask("What is a circle?")
        assert [e["weight"] for e in site.events("question")[-2:]] == ["other_32_moe"] * 2


def test_two_visitors_do_not_see_each_other(browser, site, folder, screenshots):
    with visiting(browser, site) as me, visiting(browser, site) as you:
        me.attach_picture(folder / "red.png")
        you.attach_picture(folder / "blue.png")
        me.send("Mine, what is it?")
        you.send("Yours, what is it?")
        me.wait_for_end()
        you.wait_for_end()
        for visitor, own, other in ((me, "red", "blue"), (you, "blue", "red")):
            assert f"{own}.png" in visitor.page.content()
            assert f"{other}.png" not in visitor.page.content()
            assert len(visitor.said()) == len(visitor.asked()) == 1
        you.shoot(screenshots, "10_you")
        questions = {e["messages"][0]["content"]: e for e in site.events("question")[-2:]}
    for question, colour in (("Mine", (255, 0, 0)), ("Yours", (0, 0, 255))):
        (event,) = (e for text, e in questions.items() if question in text)
        (image,) = event["images"]
        assert len(event["messages"]) == 1 and Image.open(image).getpixel((0, 0)) == colour


def test_what_must_not_be_sent_is_refused_and_the_page_goes_on(browser, site, folder, screenshots):
    (folder / "text.jpg").write_text("I am no picture")
    write_png(folder / "bomb.png", width=30_000, height=30_000)
    with (folder / "huge.png").open("wb") as file:
        file.truncate(100 << 20)
    num_before = len(site.events("question"))
    with visiting(browser, site) as me:
        for name, message in (("text.jpg", "not a readable image"), ("bomb.png", "pixels")):
            me.attach(folder / name)
            shot = (screenshots, f"11_{Path(name).stem}")
            me.is_told(f"Not taken: {name}: .*{message}", shot=shot)
            assert me.page.locator("#box .thumbnail-item").count() == 0
        me.attach(folder / "huge.png")
        me.is_told("exceed the maximum allowed size of 20")
        me.box.fill("")
        me.send(f"{INJECTION} <image>")
        me.is_told(re.escape("1 <image> tag(s) but 0 image(s)"))
        assert len(site.events("question")) == num_before + 1  # the engine refused it, not the page
        for _ in range(3):  # more often than answers may run at once: the slot is free again
            me.send(BREAK)
            me.is_told("something broke")
        assert me.box.input_value() == BREAK and me.asked() == []
        assert me.ask("What is a circle?").startswith(f"{LENGTH} tokens")


def test_twenty_visitors_wait_their_turn(browser, site):
    """Some at a screen, most as plain HTTP: their screens would cost more than the answers."""
    num_before = len(site.record.read_text().splitlines()) if site.record.is_file() else 0
    with ExitStack() as stack:
        screens = [stack.enter_context(visiting(browser, site)) for _ in range(NUM_SCREENS)]
        like = HttpVisitor(site)
        others = [HttpVisitor(site, like=like, length=LENGTH) for _ in range(NUM_VISITORS)]
        questions = [f"I am number {i}." for i in range(NUM_VISITORS)]
        pool = stack.enter_context(ThreadPoolExecutor(NUM_VISITORS))
        asking = [
            pool.submit(visitor.follow, visitor.question(question))
            for visitor, question in list(zip(others, questions, strict=True))[NUM_SCREENS:]
        ]
        for visitor, question in zip(screens, questions[:NUM_SCREENS], strict=True):
            visitor.send(question)
        for answer, question in zip(asking, questions[NUM_SCREENS:], strict=True):
            done = answer.result()
            (_, shown, _, status), seen = done["output"]["data"][:4], json.dumps(done)
            assert done["success"] and f"{LENGTH} tokens" in status, done
            assert [m["role"] for m in shown] == ["user", "assistant"]
            assert [q for q in questions if q in seen] == [question]
        for visitor, question in zip(screens, questions[:NUM_SCREENS], strict=True):
            assert visitor.wait_for_end().startswith(f"{LENGTH} tokens")
            assert visitor.asked() == [question] and len(visitor.said()) == 1
    events = [json.loads(e)["event"] for e in site.record.read_text().splitlines()[num_before:]]
    at_once = list(accumulate(1 if event == "question" else -1 for event in events))
    assert events.count("answer") == NUM_VISITORS and max(at_once) == CONCURRENCY


def test_who_finds_the_queue_full_is_told(browser, tmp_path):
    make_weights(tmp_path)
    with ExitStack() as stack:
        small = stack.enter_context(serving(tmp_path, "--concurrency", 1, "--queue", 1))
        first, *others = [stack.enter_context(visiting(browser, small)) for _ in range(3)]
        first.set_length(2048)
        first.send("Tell me a long story.")
        first.page.wait_for_function("document.querySelector('#chat .bot .message-content')")
        for visitor in others:
            visitor.send("And me?")
        # One of them waits, whichever came first.
        deadline_s = time.monotonic() + PATIENCE_S
        while not any(
            visitor.page.locator(".toast-body", has_text="busy").count() for visitor in others
        ):
            assert time.monotonic() < deadline_s, "nobody is told that the queue is full"
            others[0].page.wait_for_timeout(100)


def test_a_visitor_who_leaves_frees_the_slot(browser, site):
    num_before = len(site.events("answer"))
    for _ in range(2):  # as many as answers run at once
        visitor = Visitor(browser, site)
        visitor.set_length(2048)
        visitor.send("Tell me a long story.")
        visitor.page.wait_for_function("document.querySelector('#chat .bot .message-content')")
        visitor.context.close()
    with visiting(browser, site) as me:
        me.ask("Is somebody there?")
    whole = [e for e in site.events("answer")[num_before:] if e["finish_reason"] == "length"]
    assert len(whole) == 1  # mine; the long stories ended when nobody listened any more


def test_sliders_begin_with_whatever_the_flags_say(browser, tmp_path):
    make_weights(tmp_path)
    flags = {
        "max_new_tokens": 4096,
        "temperature": 3,
        "top_k": 500,
        "repetition_penalty": 0.9,
        "top_p": 0.01,
        "seed": 2**62,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    with serving(tmp_path, *words) as site, visiting(browser, site) as me:
        me.send("What is a circle?")
        me.page.wait_for_function("document.querySelector('#chat .bot .message-content')")
        me.stop()
        assert f"seed {2**62}" in me.wait_for_end()


def test_page_of_a_weight_that_cannot_see_says_so_from_the_start(browser, tmp_path):
    make_weights(tmp_path)
    state = torch.load(tmp_path / "sft_vlm_32.pth", weights_only=True)
    language = {k: v for k, v in state.items() if not k.startswith("vision_proj")}
    torch.save(language, tmp_path / "llm_32.pth")
    with serving(tmp_path, "--weight", "llm") as site:
        log = (tmp_path / "log.txt").read_text()
        assert "llm_32.pth has no projection, so this model cannot see" in log
        for locale, words in (
            ("en-US", "llm_32 has no projection: it cannot see"),
            ("zh-CN", "llm_32 没有投影层"),
        ):
            with visiting(browser, site, locale=locale) as me:
                me.page.locator("#status", has_text=words).wait_for()
