"""If this fails, one answer that runs out of memory takes down the server, the page, the chat or
the evaluation with it.
"""

import json
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from support.api_site import MODEL, post, question, served_thread
from support.cuda_errors import CUDA_ERROR
from support.tiny_parts import make_records
from support.tiny_vlm import make_loaded, never_end, picture, save_tiny

import eval_vlm
from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling
from model.machine.device import OutOfMemory
from model.model_vlm import MiniMindVLM
from model.serving.terminal_chat import Chat
from model.serving.web.conversation import ChatTurn
from model.serving.web.layout import LIMITS
from model.serving.web.page import Page, Wish
from trainer.ranks.group import Ranks

SIZES = "Tried to allocate 20.00 GiB"
SHORT = Sampling(max_new_tokens=4, temperature=0)
NO_ROOM = 3  # tokens after which memory runs out, while it does


@pytest.fixture
def engine(assets, monkeypatch) -> VLMEngine:
    """Answers without end; while `engine.has_room` is false it runs out of memory on the way."""
    loaded = make_loaded(assets)
    never_end(loaded.model)
    loaded.path = assets.parent / f"{MODEL}.pth"
    save_tiny(loaded, loaded.path)
    engine, forward, steps = VLMEngine(loaded), loaded.model.lm_head.forward, []
    engine.has_room, engine.room_for = True, NO_ROOM

    def tight(*args, **options):
        steps.append(1)
        if not engine.has_room and len(steps) > engine.room_for:
            steps.clear()
            raise torch.OutOfMemoryError(CUDA_ERROR)
        return forward(*args, **options)

    monkeypatch.setattr(loaded.model.lm_head, "forward", tight)
    return engine


@pytest.mark.parametrize("room_for", [0, NO_ROOM])
def test_answer_out_of_memory_lets_go_of_its_cache(room_for, engine):
    expected = engine.generate([(ask("What is red?", num_images=0), [])], SHORT)
    engine.has_room, engine.room_for = False, room_for
    stream = engine.stream(ask("What is red?", num_images=0), [], SHORT)
    with pytest.raises(OutOfMemory, match=SIZES):
        list(stream)
    assert stream.answer.finish_reason == "cancelled"
    assert stream._decoder._cache is None and not stream._decoder._inputs
    with pytest.raises(OutOfMemory, match=SIZES):
        engine.generate([(ask("What is red?", num_images=0), [])], SHORT)
    engine.has_room = True
    assert engine.generate([(ask("What is red?", num_images=0), [])], SHORT) == expected


def test_server_tells_the_request_and_answers_the_next(engine):
    body = json.dumps(question("What is red?", max_tokens=8)).encode()
    with served_thread(engine, concurrency=1) as address:
        engine.has_room, engine.room_for = False, 0
        status, reply = post(address, body)
        assert status == 503 and SIZES in reply["error"]["message"]
        engine.has_room = True
        assert post(address, body)[0] == 200


def test_page_tells_the_visitor_and_answers_the_next(engine, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(gr, "Warning", told.append)
    weights = SimpleNamespace(default=MODEL, get=lambda _: engine, names=lambda: {MODEL: MODEL})
    page = Page(weights, SHORT, examples=[], concurrency=1)
    values = {
        "max_new_tokens": 4,
        "temperature": 0,
        "top_p": 1,
        "top_k": 0,
        "repetition_penalty": 1,
        "num_beams": 1,
    }
    wish = Wish("visitor", MODEL, "en", ("5", *(values[name] for name in LIMITS)))
    engine.has_room = False
    *_, last = page._answer([ChatTurn("What is red?")], wish, before=[])
    assert last[page.parts.turns] == [] and SIZES in told[0] and not page._cancels
    engine.has_room = True
    *_, last = page._answer([ChatTurn("What is red?")], wish, before=[])
    assert last[page.parts.turns][0].answer and len(told) == 1


def test_chat_goes_on(engine, capsys):
    chat = Chat(engine, SHORT)
    engine.has_room = False
    with pytest.raises(ValueError, match=SIZES):  # the loop of the chat prints it
        chat.run("What is red?")
    engine.has_room = True
    assert chat.run("What is red?") and chat.messages


def test_look_out_of_memory_is_one_line(engine, monkeypatch):
    def encode(*_):
        raise torch.OutOfMemoryError(CUDA_ERROR)

    monkeypatch.setattr(engine.model, "encode_images", encode)
    with pytest.raises(OutOfMemory, match=SIZES):
        engine.look(ask("What?", num_images=1), [picture(6)], "red")


def test_evaluation_out_of_memory_ends_in_one_line(engine, assets, tmp_path, monkeypatch, capsys):
    def forward(*_, **__):
        raise torch.OutOfMemoryError(CUDA_ERROR)

    data, images = make_records(tmp_path, num_records=4)
    flags = [
        "--save_dir",
        engine.path.parent,
        "--vision_model_path",
        assets / "tower",
        "--tokenizer_path",
        assets / "tokenizer",
        "--device",
        "cpu",
        "--weight",
        engine.path,
    ]
    tasks = (["--image_dir", images], ["--data_path", data, "--images_path", images])
    monkeypatch.setattr(MiniMindVLM, "encode_images", forward)
    for task in tasks:
        assert eval_vlm.main([*map(str, flags), *map(str, task)]) == 1
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
        assert SIZES in line and "--batch_size" in line


def test_every_rank_hears_of_one_that_ran_out_of_memory(monkeypatch):
    """Else the others would wait for it at the next collective."""

    def work() -> list:
        raise torch.OutOfMemoryError(CUDA_ERROR)

    shared = []
    monkeypatch.setattr(
        Ranks, "gather", lambda _self, value: shared.append(value) or [([], None), value]
    )
    with pytest.raises(ValueError, match=SIZES):
        Ranks(1, 2, torch.device("cpu")).collect(work)
    ((_, failure),) = shared
    assert isinstance(failure, OutOfMemory)
