"""If this fails, the page tells wrongly what a weight can be asked, hands a conversation to another
page, or tells an error in the wrong language.
"""

import argparse
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from support.scripts import ROOT
from support.tiny_vlm import make_loaded, save_tiny

from model.generation.engine import VLMEngine
from model.options import add_model_arguments
from model.serving.web.conversation import check_image, new_turn
from model.serving.web.errors import reason
from model.serving.web.protection.keeping import Kept
from model.serving.web.protection.quota import OverQuota, Quota
from model.serving.web.suggestions import MAX_SUGGESTIONS, Taught
from model.serving.web.text import text
from model.serving.web.weights import Weights
from model.serving.web.wish import Wish
from trainer.chain.taught import TAUGHT

DEMO = ROOT / "out" / "sft_vlm_demo_128.json"
EXAMPLES = sorted((ROOT / "dataset" / "eval_images").glob("*.png"))


def taught_of(metadata, *, can_see=True) -> Taught:
    return Taught.of(metadata, can_see=can_see, generation=2)


def test_the_demo_says_what_it_was_taught_and_its_pictures_are_there():
    metadata = json.loads(DEMO.read_text(encoding="utf-8"))
    assert metadata["taught"] == TAUGHT  # as a chain that is published writes it
    taught = taught_of(metadata)
    for language, words in (("en", "shapes colours how many corner"), ("zh", "形状 颜色 个数 角")):
        told = taught.told(language, text)
        assert all(word in told for word in words.split()), told
        shown = taught.suggestions(EXAMPLES, language, text)
        assert len(shown) == MAX_SUGGESTIONS == len({s.picture for s in shown})
        assert [s.question for s in shown] == [q[language] for q in TAUGHT["questions"]]


def test_a_weight_that_says_nothing_has_its_pictures_described():
    for stage, words in (
        ("sft", "its weight does not say"),
        ("pretrain", "begun"),
        (None, "guess"),
    ):
        taught = taught_of({"stage": stage})
        assert words in taught.told("en", text)
        shown = taught.suggestions(EXAMPLES[:2], "zh", text)
        assert [s.picture for s in shown] == EXAMPLES[:2]
        assert {s.question for s in shown} == {text("describe_2", "zh")}
    blind = taught_of({"taught": TAUGHT}, can_see=False)
    assert "cannot see" in blind.told("en", text)
    assert blind.suggestions(EXAMPLES, "en", text) == []
    assert len(taught_of({"taught": TAUGHT}).suggestions([Path("other.png")], "en", text)) == 1


@pytest.mark.parametrize("taught", [[], {"about": "shapes"}, {"questions": ["What?"]}, "shapes"])
def test_a_wrong_description_is_told_at_the_start(assets, tmp_path, taught):
    path = tmp_path / "sft_vlm_32.pth"
    save_tiny(make_loaded(assets), path)
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"taught": taught}))
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    flags = {
        "weight": path, "save_dir": tmp_path, "device": "cpu",
        "vision_model_path": assets / "tower", "tokenizer_path": assets / "tokenizer",
    }  # fmt: skip
    args = parser.parse_args([w for k, v in flags.items() for w in (f"--{k}", str(v))])
    assert VLMEngine.from_args(args).can_see  # the model itself is whole
    with pytest.raises(ValueError, match='"taught" in .*mend or remove it'):
        Weights(args)


def test_conversations_are_kept_for_their_tickets_and_a_time():
    now_s = 0.0
    kept = Kept[str](max_kept=2, clock=lambda: now_s)
    tickets = [kept.new_ticket() for _ in range(3)]
    assert len(set(tickets)) == 3 and min(map(len, tickets)) >= 20
    for i, ticket in enumerate(tickets):
        now_s = float(i)
        kept.put(ticket, f"talk {i}")
    assert [kept.get(t) for t in tickets] == [None, "talk 1", "talk 2"]  # two at most
    assert kept.get("") is None
    now_s = 11.5
    kept.forget_older(10)
    assert [kept.get(t) for t in tickets] == [None, None, "talk 2"]
    kept.drop(tickets[2])
    assert kept.get(tickets[2]) is None


def failures(tmp_path, engine) -> list[Exception]:
    """What visitors are told most, raised for real."""
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("L", (5000, 5)).save(tmp_path / "thin.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(30 << 20)
    quota = Quota(tmp_path / "uploads", visitor_bytes=1 << 20, all_bytes=3 << 20)
    red = str(tmp_path / "red.png")
    Image.new("RGB", (16, 16), "red").save(red)
    seed = Wish("me", "w", "en", ("x", 0, 1, 0, 1, 5, 1))
    attempts = [
        *(lambda name=name: check_image(tmp_path / name) for name in ("text.jpg", "thin.png")),
        lambda: check_image(tmp_path / "huge.png"),
        lambda: new_turn("a" * 30_000, [], default_question="?"),
        lambda: new_turn("", [], default_question="?"),
        lambda: new_turn("Hi", [red] * 9, default_question="?"),
        lambda: new_turn("Hi", ["gone.png"], default_question="?"),
        lambda: quota.charge("me", "here", 2 << 20),
        lambda: [quota.charge(str(i), "here", 1 << 20) for i in range(4)],
        seed.sampling,
        lambda: engine.processor.prompt_batch([([{"role": "user", "content": "<image>"}], [])]),
        lambda: engine.context.fit([{"role": "user", "content": "a " * 70_000}], max_new_tokens=5),
        lambda: engine.context.fit(
            [{"role": "user", "content": "a " * 2_000_000}], max_new_tokens=5
        ),
    ]
    told = []
    for attempt in attempts:
        with pytest.raises((ValueError, OverQuota)) as raised:
            attempt()
        told.append(raised.value)
    return told


def test_errors_are_told_in_chinese(tmp_path, assets):
    path = tmp_path / "w_32.pth"
    loaded = make_loaded(assets)
    save_tiny(loaded, path)
    loaded.path.touch()
    for error in failures(tmp_path, VLMEngine(loaded)):
        english, chinese = reason(error, "en"), reason(error, "zh")
        assert re.search("[a-z]{4}", english) and re.search("[\u4e00-\u9fff]", chinese)
        assert not re.search(r"\b[a-z]{2,}\b(?<!image)(?<!MB)", re.sub(r"\w+\.\w+", "", chinese)), (
            chinese
        )
