"""If this fails, thinking is taken for an answer or an answer for thinking, or a model that does
not think has its text changed.
"""

import argparse
from itertools import product

import pytest
from support.third_generation import make_assets3, make_it_say, make_loaded3
from support.tiny_vlm import GREEDY, conversations, make_loaded

from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling, add_sampling_arguments, sampling_from
from model.generation.thinking import ThinkingSplitter, without_thinking

QUESTION = ask("What is in the picture?", num_images=0)
CLOSED, OPEN = Sampling(60, 0), Sampling(60, 0, open_thinking=True)
# What is written, whether the prompt opened the block: thinking and answer.
TEXTS = {
    ("A red circle.", False): (None, "A red circle."),
    (" \nA circle <think> of", False): (None, " \nA circle <think> of"),
    ("<think>\nIt is red.\n</think>\n\nRed.", False): ("It is red.", "Red."),
    ("\n <think>\n\n</think>\n\n红色", False): ("", "红色"),
    ("<think>\nIt is", False): ("It is", ""),
    ("<thin", False): (None, "<thin"),
    ("a</think>\n\nb", False): (None, "a</think>\n\nb"),
    ("\nIt is\n\nred.\n\n</think>\n\n Red.\n", True): ("It is\n\nred.", " Red.\n"),
    ("<think>\nIt is red.</think>Red.", True): ("It is red.", "Red."),
    ("It is </thin> red\n</thin", True): ("It is </thin> red\n</thin", ""),
    ("It is red.\n\n", True): ("It is red.", ""),
    ("\n</think>\n", True): ("", ""),
    ("a</think>b</think>c <think>", True): ("a", "b</think>c <think>"),
    ("", True): ("", ""),
    ("", False): (None, ""),
}


def split(pieces: list[str], *, is_open: bool) -> tuple[str | None, str]:
    """By the pieces that come out, which must be what the splitter says at the end."""
    splitter = ThinkingSplitter(can_think=True, is_open=is_open)
    out = [piece for text in pieces for piece in splitter.push(text)]
    out += splitter.finish()
    assert splitter.finish() == [] and all(piece.text for piece in out)
    thought, said = ("".join(p.text for p in out if p.is_thinking is x) for x in (True, False))
    assert said == splitter.answer and thought == (splitter.reasoning or "")
    assert [p.is_thinking for p in out] == sorted((p.is_thinking for p in out), reverse=True)
    return splitter.reasoning, said


@pytest.mark.parametrize(("written", "expected"), TEXTS.items(), ids=lambda value: repr(value))
def test_text_is_split_the_same_however_it_is_cut(written, expected):
    text, is_open = written
    for size in range(1, len(text) + 2):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert split(pieces, is_open=is_open) == expected, size
    for end in range(len(text)):
        assert split([text[:end], text[end:]], is_open=is_open) == expected, end


def test_thinking_comes_out_before_it_ends():
    splitter = ThinkingSplitter(can_think=True, is_open=True)
    assert [p.text for p in splitter.push("It is \n")] == ["It is "]
    assert [p.text for p in splitter.push("red </")] == ["\nred "]
    assert [p.text for p in splitter.push("b>")] == ["</b>"]


def test_a_model_that_does_not_think_keeps_its_text():
    for text in ("<think>\na\n</think>\n\nb", "\n\n</think>", "<thin"):
        splitter = ThinkingSplitter(can_think=False)
        assert [p for c in text for p in splitter.push(c)] == [(c, False) for c in text]
        assert splitter.finish() == [] and splitter.answer == text and splitter.reasoning is None


def test_history_uses_what_follows_the_block():
    for text, answer in {
        "<think>\na\n</think>\n\nb": "b",
        "a</think>b</think>\nc": "c",
        " <think>\na": "",
        "a <think> b": "a <think> b",
        "</think>": "",
    }.items():
        assert without_thinking(text) == answer


@pytest.fixture(scope="module")
def assets3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets3")
    make_assets3(folder)
    return folder


@pytest.mark.parametrize(
    ("parts", "sampling", "expected"),
    [
        (["It is red.\n", "</think>", "\n\n红色 it is"], OPEN, ("It is red.", "红色 it is")),
        (["It is red.\n</", "th", "ink>\n", "\nRed."], OPEN, ("It is red.", "Red.")),
        (["<think>", "\na", "</think>", "b"], CLOSED, ("a", "b")),
        (["A red circle."], CLOSED, (None, "A red circle.")),
    ],
)
def test_stream_and_generate_split_alike(assets3, parts, sampling, expected):
    loaded = make_loaded3(assets3)
    ids = make_it_say(loaded, *parts)
    engine = VLMEngine(loaded)
    (answer,) = engine.generate([(QUESTION, [])], sampling)
    assert (answer.reasoning, answer.text) == expected and answer.finish_reason == "stop"
    assert answer.num_new_tokens == len(ids)
    stream = engine.stream(QUESTION, [], sampling)
    pieces = [(piece, stream.is_thinking) for piece in stream]
    assert stream.answer == answer and len(pieces) > 1
    assert "".join(p for p, is_thinking in pieces if is_thinking) == (expected[0] or "")
    assert "".join(p for p, is_thinking in pieces if not is_thinking) == expected[1]


def test_thinking_that_does_not_end_is_an_empty_answer(assets3):
    loaded = make_loaded3(assets3)
    make_it_say(loaded, "It is red and round and red")
    engine = VLMEngine(loaded)
    sampling = Sampling(5, 0, open_thinking=True)
    (answer,) = engine.generate([(QUESTION, [])], sampling)
    assert answer.text == "" and answer.reasoning and answer.finish_reason == "length"
    assert answer.num_new_tokens == 5
    stream = engine.stream(QUESTION, [], Sampling(50, 0, open_thinking=True))
    next(stream)
    stream.close()
    assert stream.answer.text == "" and stream.answer.finish_reason == "cancelled"


def test_prompt_closes_or_opens_the_block(assets3, monkeypatch):
    engine, prompts = VLMEngine(make_loaded3(assets3)), []
    real, decode = engine.processor.prompt_batch, engine.processor.tokenizer.decode

    def recorded(*args, **options):
        batch = real(*args, **options)
        prompts.append(decode(batch["input_ids"][0]))
        return batch

    monkeypatch.setattr(engine.processor, "prompt_batch", recorded)
    history = engine.remember(QUESTION, "<think>\na secret\n</think>\n\nRed.")
    assert history[-1] == {"role": "assistant", "content": "Red."}
    for sampling in (Sampling(1, 0), Sampling(1, 0, open_thinking=True)):
        (answer,) = engine.generate([(history + QUESTION, [])], sampling)
        assert answer.num_prompt_tokens == engine.context._num_tokens(
            history + QUESTION, open_thinking=sampling.open_thinking
        )
    closed, opened = prompts
    assert closed.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert opened.endswith("<|im_start|>assistant\n<think>\n") and "secret" not in opened
    assert "assistant\n<think>\n\n</think>\n\nRed.<|im_end|>" in closed


def test_second_generation_is_never_split(assets):
    loaded = make_loaded(assets)
    text = "<think>\nIt is red.\n</think>\n\nRed."
    make_it_say(loaded, text)
    engine = VLMEngine(loaded)
    (answer,) = engine.generate([(QUESTION, [])], CLOSED)
    assert (answer.text, answer.reasoning) == (text, None)
    assert "".join(engine.stream(QUESTION, [], CLOSED)) == text
    assert engine.remember([], text) == [{"role": "assistant", "content": text}]
    for begin in (engine.stream, lambda m, i, s: engine.generate([(m, i)], s)):
        with pytest.raises(ValueError, match="generation 2 does not think.*of generation 3"):
            begin(QUESTION, [], OPEN)


def test_defaults_of_sampling_follow_the_generation():
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)

    def chosen(*flags: str, generation: int | None = None) -> tuple[float, ...]:
        found = sampling_from(parser.parse_args(flags), generation)
        return found.temperature, found.top_p, found.top_k

    assert chosen() == chosen(generation=2) == (0.65, 0.85, 0)
    assert chosen(generation=3) == (0.7, 0.85, 50)
    given = ("--temperature", "0", "--top_p", "0.5", "--top_k", "0")
    for generation, more in product((2, 3), ([], ["--open_thinking", "0"])):
        assert chosen(*given, *more, generation=generation) == (0, 0.5, 0)
    assert sampling_from(parser.parse_args(["--open_thinking", "1"]), 3).open_thinking
    with pytest.raises(ValueError, match="--open_thinking 1: .*generation 2 does not think"):
        chosen("--open_thinking", "1", generation=2)


def test_answers_to_pictures_think_too(assets3):
    loaded = make_loaded3(assets3)
    make_it_say(loaded, "rings", "</think>", "\n\nA circle.")
    answers = VLMEngine(loaded).generate(conversations(), Sampling(60, 0, open_thinking=True))
    assert {(a.reasoning, a.text) for a in answers} == {("rings", "A circle.")}
    assert GREEDY.open_thinking is False
