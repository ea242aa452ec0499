"""If this fails, beam search cannot be asked for in the terminal, on the page or in evaluation, or
its results do not say that they come from it.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from PIL import Image
from support.tiny_parts import make_records
from support.tiny_vlm import make_loaded, never_end, save_tiny

import eval_vlm
from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling
from model.machine.terminal import shown
from model.serving.terminal_chat import Chat
from model.serving.web.conversation import ChatTurn
from model.serving.web.layout import LIMITS
from model.serving.web.page import Page, Wish
from model.serving.web.text import LANGUAGES, text

BEAMS = Sampling(12, temperature=0, num_beams=4, length_penalty=0.0)


@pytest.fixture
def engine(assets) -> VLMEngine:
    loaded = make_loaded(assets)
    never_end(loaded.model)
    return VLMEngine(loaded)


def answer_text(engine: VLMEngine, sampling: Sampling = BEAMS) -> str:
    return engine.generate([(ask("What?", num_images=0), [])], sampling)[0].text


def test_chat_prints_the_best_beam(engine, capsys):
    Chat(engine, BEAMS).run("What?")
    assert capsys.readouterr().out == f"{shown(answer_text(engine))}\n"


def page_of(engine: VLMEngine, defaults: Sampling) -> Page:
    weights = SimpleNamespace(default="a", get=lambda _: engine, names=lambda: {"a": "a"})
    return Page(weights, defaults, examples=[], concurrency=1)


def wish_of(language: str, **values) -> Wish:
    values = {
        "temperature": 0.6, "top_p": 1, "top_k": 0, "repetition_penalty": 1, "max_new_tokens": 12,
    } | values  # fmt: skip
    return Wish("visitor", "a", language, ("5", *(values[name] for name in LIMITS)))


def test_page_has_a_slider_whose_answer_comes_as_a_whole(engine):
    page = page_of(engine, BEAMS)
    (slider,) = (s for s in page.parts.sliders if s.elem_id == "num_beams")
    assert (slider.minimum, slider.maximum, slider.value) == (1, 8, 4)
    labels = {page.parts.texts(code)[slider]["label"] for code in LANGUAGES.values()}
    assert labels == {text("num_beams", code) for code in LANGUAGES.values()} and len(labels) == 2
    for language, note in (("en", " · 4 beams"), ("zh", " · 束宽 4")):
        *_, last = page._answer([ChatTurn("What?")], wish_of(language, num_beams=4), before=[])
        (turn,) = last[page.parts.turns]
        assert turn.answer == answer_text(engine) and note in turn.note
    *_, last = page._answer([ChatTurn("What?")], wish_of("en", num_beams=1), before=[])
    assert "beams" not in last[page.parts.turns][0].note


def test_page_stops_a_search_with_the_best_beam_so_far(engine):
    page, steps = page_of(engine, Sampling()), []

    def stop_at_the_fourth(*_):
        steps.append(1)
        if len(steps) == 4:
            page._stop(SimpleNamespace(session_hash="visitor"))

    engine.model.lm_head.register_forward_hook(stop_at_the_fourth)
    wish = wish_of("en", num_beams=4, max_new_tokens=2000)
    *_, last = page._answer([ChatTurn("What?")], wish, before=[])
    (turn,) = last[page.parts.turns]
    assert len(steps) == 4 and "stopped" in turn.note and turn.note.startswith("3 tokens")
    assert turn.answer and not page._cancels


def test_page_searches_for_one_visitor_at_a_time(engine):
    """A search is no part of a batch; who waits for another's may stop waiting."""
    page, wish = page_of(engine, Sampling()), wish_of("en", num_beams=4)
    with page._searching, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(list, page._answer([ChatTurn("What?")], wish, before=[]))
        while wish.session not in page._cancels:
            time.sleep(0.01)
        time.sleep(0.3)
        assert not waiting.done()
        page._stop(SimpleNamespace(session_hash="visitor"))
        (turn,) = waiting.result(timeout=300)[-1][page.parts.turns]
    assert turn.answer == "" and "stopped" in turn.note and not page._searching.locked()


def flags(assets, folder, **values) -> list[str]:
    values = {
        "save_dir": folder, "vision_model_path": assets / "tower", "device": "cpu",
        "tokenizer_path": assets / "tokenizer", "json": folder / "out.json",
        "max_new_tokens": 12, "num_beams": 4, "length_penalty": 0,
    } | values  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_evaluation_searches_and_says_so(assets, tmp_path, capsys):
    save_tiny(make_loaded(assets), tmp_path / "sft_vlm_32.pth")
    (tmp_path / "images").mkdir()
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (40, 32), colour).save(tmp_path / "images" / f"{i}.png")
    where = {"image_dir": tmp_path / "images", "prompt": "What?"}
    assert eval_vlm.main(flags(assets, tmp_path, **where)) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    decoding = {"temperature": 0, "num_beams": 4, "length_penalty": 0}
    assert report["decoding"] == decoding
    assert eval_vlm.main(flags(assets, tmp_path, **where, batch_size=1)) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == report
    assert eval_vlm.main(flags(assets, tmp_path, **where, num_beams=1, temperature=0)) == 0
    other = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert [s["answer"] for s in other] != [s["answer"] for s in report["samples"]]
    data, images = make_records(tmp_path / "records", num_records=4)
    where = {"data_path": data, "images_path": images, "num_generate": 2}
    assert eval_vlm.main(flags(assets, tmp_path, **where)) == 0
    assert json.loads((tmp_path / "out.json").read_text())["decoding"] == decoding
    capsys.readouterr()
    assert eval_vlm.main(flags(assets, tmp_path, temperature=0.5)) == 1
    error = capsys.readouterr().err
    assert "--num_beams 4" in error and "--temperature 0" in error and error.count("\n") == 1
