"""If this fails, the terminal chat or the web page shows thinking as an answer, keeps it in the
history, or offers it for a model that does not think.
"""

import argparse

import pytest
from support.third_generation import make_assets3, make_it_say, make_loaded3
from support.tiny_vlm import make_loaded, save_tiny

from model.generation.engine import VLMEngine
from model.generation.sampling import Sampling, add_sampling_arguments, sampling_from
from model.options import add_model_arguments
from model.serving.terminal_chat import Chat
from model.serving.web.conversation import ChatTurn, chat_messages, prompt_of, to_html
from model.serving.web.layout import LIMITS
from model.serving.web.page import Page, Wish
from model.serving.web.text import text
from model.serving.web.weights import Weights

EVIL = "<b onclick=x>It</b> is red."
SAID = (f"{EVIL}\n", "</think>", "\n\nRed.")
THINKS = Sampling(80, 0, open_thinking=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces3")
    make_assets3(folder)
    return folder


@pytest.fixture
def engine(folder) -> VLMEngine:
    loaded = make_loaded3(folder)
    make_it_say(loaded, *SAID)
    return VLMEngine(loaded)


def test_chat_names_the_thinking_and_forgets_it(engine, capsys):
    chat = Chat(engine, THINKS, show_speed=True)
    assert chat.run("What is it?")
    captured = capsys.readouterr()
    assert captured.out == f"[thinking / 思考]\n{EVIL}\n[answer / 回答]\nRed.\n"
    assert "tokens/s" in captured.err and captured.err.count("\n") == 1
    assert chat.messages[1:] == [{"role": "assistant", "content": "Red."}]


def test_chat_says_that_thinking_did_not_end(engine, capsys):
    Chat(engine, Sampling(8, 0, open_thinking=True)).run("What is it?")
    captured = capsys.readouterr()
    assert "no answer: the thinking did not end; raise --max_new_tokens" in captured.out
    assert captured.err == ""


def test_chat_of_the_second_generation_is_as_ever(assets, capsys):
    loaded = make_loaded(assets)
    make_it_say(loaded, *SAID)
    Chat(VLMEngine(loaded), Sampling(80, 0)).run("What is it?")
    assert capsys.readouterr().out == "".join(SAID) + "\n"


def test_page_folds_thinking_escaped_and_forgets_it(engine):
    turns = [ChatTurn("What?", [], "Red.", reasoning=EVIL), ChatTurn("And?")]
    question, thought, answer, _ = chat_messages(turns, thinking="思考")
    assert thought["metadata"] == {"title": "思考", "status": "done"}
    assert thought["content"] == "&lt;b onclick=x&gt;It&lt;/b&gt; is red."
    assert (question["role"], answer) == ("user", {"role": "assistant", "content": "Red."})
    messages, _ = prompt_of(engine, turns)
    assert "is red" not in str(messages)
    for language, title in (("en", "Thinking"), ("zh", "思考")):
        page = to_html(turns, language=language, text=text)
        folded = f"<details><summary>{title}</summary>{thought['content']}</details>Red."
        assert folded in page and page.count("<details>") == 1


@pytest.fixture
def page(assets, folder, monkeypatch) -> Page:
    """Of a weight of each generation; that of the second is the first that is shown."""
    save_tiny(make_loaded(assets), folder / "a_32.pth")
    save_tiny(make_loaded3(folder), folder / "b_32.pth")
    make = VLMEngine.__init__

    def scripted(self, loaded):
        make(self, loaded)
        make_it_say(loaded, *SAID)

    monkeypatch.setattr(VLMEngine, "__init__", scripted)
    # One flag names one tokenizer and one tower; here each weight has its own.
    own = {"a_32": assets, "b_32": folder}
    load = VLMEngine.from_args.__func__

    def with_own(cls, args):
        place = own["b_32" if "/b_32" in args.weight else "a_32"]
        args.tokenizer_path, args.vision_model_path = place / "tokenizer", place / "tower"
        return load(cls, args)

    monkeypatch.setattr(VLMEngine, "from_args", classmethod(with_own))
    monkeypatch.setattr(Weights, "names", lambda _: dict.fromkeys(own, "x"))
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    flags = {"save_dir": folder, "weight": "a", "device": "cpu", "top_p": 0.5}
    args = parser.parse_args([w for n, v in flags.items() for w in (f"--{n}", str(v))])
    weights = Weights(args)
    defaults = sampling_from(args, weights.get(weights.default).generation)
    return Page(weights, defaults, examples=[], concurrency=1)


def test_page_has_a_switch_where_the_weight_can_think(page):
    at = page.parts
    assert at.thinking.visible is False
    updates = page._switch("b_32", "a_32", "English")
    assert updates[at.thinking]["visible"] is True and updates[at.thinking]["value"] is False
    values = dict(zip(LIMITS, (updates[slider] for slider in at.sliders), strict=True))
    assert values["temperature"] == 0.7 and values["top_k"] == 50
    assert values["top_p"] == 0.5  # as the flag says
    assert at.thinking not in page._switch("b_32", "b_32", "English")  # settings stay
    back = page._switch("a_32", "b_32", "English")
    assert back[at.thinking]["visible"] is False and back[at.sliders[0]] == 0.65

    settings = ("5", 0, 1, 0, 1, 80, 1)
    for weight, wanted, expected in (
        ("b_32", True, (EVIL, "Red.")),
        ("a_32", True, ("", "".join(SAID))),
    ):
        wish = Wish("visitor", weight, "zh", settings, wanted)
        *_, last = page._answer([ChatTurn("What?")], wish, before=[])
        (turn,) = last[at.turns]
        assert (turn.reasoning, turn.answer) == expected
    titles = [m["metadata"]["title"] for m in last[at.chat] if "metadata" in m]
    assert titles == []
