"""If this fails, people cannot find on the page what to ask, or lose sight of box, answer or
conversation, on a telephone or in the other language. A real Chromium; `-m full` checks access by
axe-core, from npm.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from support.web_visitor import PHONE, Visitor, make_weights, serving, visiting

pytestmark = pytest.mark.slow
LEAST_PX = 40  # of what a finger touches
AXE = "axe-core@4.14.1"
TAUGHT = {
    "languages": ["en", "zh"],
    "about": {"en": "plain colours", "zh": "纯色"},
    "questions": [
        {"picture": "红色-red.png", "en": "What colour is it?", "zh": "这是什么颜色？"},
        {"picture": "蓝色-blue.png", "en": "Is it blue?", "zh": "它是蓝色的吗？"},
        {"picture": "gone.png", "en": "Where is it?", "zh": "它在哪里？"},
    ],
}
# Of parts that can be seen and used: what is smaller than a finger, or has no name.
SMALL_OR_NAMELESS = """([least]) => {
    const small = [], nameless = [];
    for (const e of document.querySelectorAll("button, summary, #language label, img, textarea")) {
        const {width, height} = e.getBoundingClientRect();
        if (!width || !e.checkVisibility({opacityProperty: true, visibilityProperty: true})) {
            continue;
        }
        const named = e.ariaLabel || e.alt || e.labels?.[0]?.innerText || e.innerText;
        if (!named?.trim()) nameless.push(e.outerHTML.slice(0, 200));
        const isPicture = e.tagName == "IMG" || e.closest("#box .thumbnail-item, .message");
        if (!isPicture && Math.min(width, height) < least - 0.5 && e.tagName != "TEXTAREA") {
            small.push([width, height, e.outerHTML.slice(0, 200)]);
        }
    }
    return [small, nameless];
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights of which one says what it was taught, and pictures to ask about."""
    folder = tmp_path_factory.mktemp("flows")
    make_weights(folder)
    beside = folder / "sft_vlm_32.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"taught": TAUGHT}))
    (folder / "examples").mkdir()
    for name in ("红色-red", "蓝色-blue"):
        colour = name.partition("-")[2]
        Image.new("RGB", (64, 48), colour).save(folder / "examples" / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def site(folder):
    with serving(folder, "--max_new_tokens", 60, "--examples", folder / "examples") as site:
        yield site


TOO_EARLY = "Wait for the answer, or stop it first"
# In one go: a toast goes by itself, and a busy machine would ask for the second box too late.
BOXES_WHILE_TOLD = """text => {
  const toast = [...document.querySelectorAll('.toast-body')].find(e => e.innerText.includes(text));
  const others = ['#stage', '#head', '#tools'].map(name => document.querySelector(name));
  return toast && [toast, ...others].map(part => part.getBoundingClientRect().toJSON());
}"""


def box_of(me: Visitor, selector: str) -> dict:
    return me.page.locator(selector).bounding_box()


def inside(me: Visitor, selector: str) -> bool:
    """Whether all of it is in the window."""
    part, window = box_of(me, selector), me.page.viewport_size
    return (
        min(part["x"], part["y"]) >= 0
        and part["x"] + part["width"] <= window["width"]
        and part["y"] + part["height"] <= window["height"]
    )


def test_a_telephone_asks_by_one_click_and_keeps_the_conversation(browser, site):
    num_before = len(site.events("question"))
    with visiting(browser, site, **PHONE) as me:
        title, switch = box_of(me, "#title h1"), box_of(me, "#language")
        assert title["y"] < switch["y"] + switch["height"] / 2 < title["y"] + title["height"]
        assert title["x"] + title["width"] <= switch["x"] and inside(me, "#tools_button")
        about = me.page.locator("#about").inner_text()
        assert "It was taught plain colours." in about and "it only guesses" in about
        assert me.page.evaluate(SMALL_OR_NAMELESS, [LEAST_PX]) == [[], []]
        cards = me.page.locator("#cards button:visible")
        assert cards.all_inner_texts() == ["What colour is it?", "Is it blue?"]
        assert cards.nth(1).locator("img").get_attribute("alt") == "blue"
        cards.nth(1).click()
        me.page.locator("#box .stop-button").wait_for()
        assert me.page.locator("#box .submit-button").count() == 0
        assert me.wait_for_end().startswith("60 tokens") and me.asked() == ["Is it blue?"]
        me.page.locator("#box .submit-button").wait_for()
        me.page.wait_for_timeout(200)  # scrolled to the end
        assert inside(me, "#chat .bot .message-content") and inside(me, "#box")
        assert me.page.locator("#status details").get_attribute("open") is None
        assert me.page.evaluate("document.documentElement.scrollHeight") <= 844
        assert me.page.evaluate(SMALL_OR_NAMELESS, [LEAST_PX]) == [[], []]
        said = me.said()
        me.page.reload()
        me.page.locator("#chat .bot .message-content").wait_for()
        assert me.said() == said and me.asked() == ["Is it blue?"]
        me.ask("And now?")
    first, second = site.events("question")[num_before:]
    (picture,) = first["images"]
    assert Image.open(picture).getpixel((0, 0)) == (0, 0, 255)
    assert [m["role"] for m in second["messages"]] == ["user", "assistant", "user"]
    assert second["images"] == first["images"]


def test_drop_anywhere_edit_copy_and_asking_too_early(browser, site, folder):
    with visiting(browser, site, permissions=["clipboard-read", "clipboard-write"]) as me:
        me.hand_over(folder / "examples" / "红色-red.png", "drop", at="#tools")
        me.set_length(2000)
        me.send("What is it?")
        me.page.locator("#chat .bot .message-content").wait_for()
        me.send("And this?")
        boxes = me.page.wait_for_function(BOXES_WHILE_TOLD, arg=TOO_EARLY).json_value()
        told, stage, head, tools = boxes
        assert told["bottom"] <= stage["top"] and told["top"] >= head["bottom"] - head["top"]
        assert told["right"] <= tools["left"]
        assert me.box.input_value() == "And this?"
        me.stop()
        assert "stopped" in me.wait_for_end()
        me.page.locator("#chat [data-minimind=copy]").last.click()
        me.page.wait_for_function("navigator.clipboard.readText().then(t => t.length > 0)")
        copied = me.page.evaluate("navigator.clipboard.readText()")
        assert copied.split() == me.said()[0].split()
        me.page.locator("#chat [data-minimind=undo]").click()
        me.page.wait_for_function("document.querySelector('#box textarea').value == 'What is it?'")
        assert me.asked() == [] and me.page.locator("#box .thumbnail-item").count() == 1
        assert me.page.locator("#cards").is_visible()
        me.set_length(5)
        me.ask("What colour is it?")
        assert (
            me.asked() == ["What colour is it?"] and len(site.events("question")[-1]["images"]) == 1
        )


@pytest.mark.full
def test_chinese_is_whole_and_the_choice_is_remembered(browser, site, tmp_path):
    with visiting(browser, site) as me:
        me.page.locator("#language label").nth(1).click()
        me.page.wait_for_function("document.querySelector('#clear').innerText == '新对话'")
        assert "它学过：纯色。" in me.page.locator("#about").inner_text()
        me.send("<image>")
        me.is_told("生成失败：有 1 个 <image> 标记和 0 张图片")
        me.box.fill("")
        me.page.locator("#cards button").first.click()
        assert me.wait_for_end().startswith("60 个词元")
        head = "[document.documentElement.lang, document.title]"
        assert me.page.evaluate(head) == ["zh-CN", "和 MiniMind-V 对话"]
        seen = me.page.locator("body").inner_text()
        seen += " ".join(
            me.page.evaluate(
                "[...document.querySelectorAll('#talk button, #talk img, #head button')]"
                ".filter(e => e.checkVisibility()).map(e => (e.ariaLabel || '') + (e.alt || ''))"
            )
        )
        said = "".join(me.said())
        english = re.findall(r"[A-Za-z]{2,}", seen.replace(said, ""))
        assert set(english) <= {*"MiniMind English sft vlm Top HTML".split()}, english
        with me.page.expect_download() as download:
            me.page.locator("#share").click()
        download.value.save_as(tmp_path / "saved.html")
        assert '<html lang="zh">' in (tmp_path / "saved.html").read_text(encoding="utf-8")
        me.page.reload()
        me.page.locator("#chat .bot .message-content").wait_for()
        assert me.page.evaluate(head) == ["zh-CN", "和 MiniMind-V 对话"]
        me.page.locator("#clear").click()
        me.page.locator("#cards").wait_for()
        me.page.reload()
        me.wait_until_whole()
        assert me.asked() == []


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """The script of axe-core."""
    folder = tmp_path_factory.mktemp("axe")
    if shutil.which("npm") is None:
        pytest.skip("npm, which fetches axe-core, is not there")
    got = subprocess.run(["npm", "pack", AXE], cwd=folder, capture_output=True, timeout=120)
    if got.returncode:
        reason = got.stderr.decode(errors="replace").strip().splitlines()[-1:]
        pytest.skip(f"npm cannot fetch axe-core from here: {reason}")
    (package,) = folder.glob("*.tgz")
    shutil.unpack_archive(package, folder, "gztar", filter="data")
    return (folder / "package" / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_axe_finds_nothing_serious(browser, site, axe, locale, scheme):
    screen = {"locale": locale, "color_scheme": scheme, "reduced_motion": "reduce"}

    def check(me: Visitor, when: str) -> None:
        me.page.mouse.move(0, 0)
        me.page.wait_for_timeout(500)
        me.page.evaluate(axe)
        found = me.page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        serious = [v for v in found if v["impact"] in ("serious", "critical")]
        assert not serious, (when, [(v["id"], v["nodes"][0]["html"]) for v in serious])

    for size in ({}, PHONE):
        with visiting(browser, site, **screen, **size) as me:
            check(me, "empty")
            me.send("<image>")
            me.page.locator(".toast-body").wait_for()
            check(me, "error")
            me.box.fill("")
            me.page.locator("#cards button").first.click()
            me.wait_for_end()
            if size:
                me.page.locator("#tools_button").click()
            for part in ("look", "sampling", "pictures"):
                me.open(part)
            me.page.locator("#look_go").click()
            me.page.locator("#look_picture img").wait_for()
            check(me, "answered, all open")


@pytest.mark.full
def test_focus_is_seen_at_every_stop_of_the_tab_key(browser, site):
    with visiting(browser, site) as me:
        for _ in range(12):
            me.page.keyboard.press("Tab")
            width = me.page.evaluate(
                """() => Math.max(...[document.activeElement,
                    document.activeElement.closest("#box, label") || document.body].map(e => {
                        const {outlineStyle, outlineWidth} = getComputedStyle(e);
                        return outlineStyle == "none" ? 0 : parseFloat(outlineWidth);
                    }))"""
            )
            what = me.page.evaluate("document.activeElement.outerHTML.slice(0, 200)")
            assert width >= 2, what
