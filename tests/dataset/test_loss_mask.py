"""If this fails, the model is trained on the wrong tokens: questions and padding, or answers
without their end.
"""

import pytest
from support.tiny_parts import TOKENIZER_TEXT, make_tokenizer
from transformers import AutoTokenizer

from dataset.loss_mask import supervised_mask

USER = "What is in the picture?"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"


@pytest.fixture(scope="module", params=["plain", "merging_newlines"])
def tokenizer(request, tmp_path_factory):
    """Our kind of tokenizer, and one that merges several newlines into one token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = TOKENIZER_TEXT
    if request.param == "merging_newlines":
        texts = texts + ["a\n\n\n\nb assistant\n\n\n user"] * 20
    make_tokenizer(folder, texts=texts)
    made = AutoTokenizer.from_pretrained(folder)
    merged = len(made.encode("\n\n\n", add_special_tokens=False)) < 3
    assert merged == (request.param == "merging_newlines")
    return made


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def supervised_texts(tokenizer, text: str) -> list[str]:
    """The supervised stretches of a prompt, as text."""
    ids = encode(tokenizer, text)
    mask = supervised_mask(ids, tokenizer)
    assert len(mask) == len(ids) and set(mask) <= {0, 1}
    stretches, current = [], []
    for token, is_target in zip([*ids, 0], [*mask, 0], strict=True):
        if is_target:
            current.append(token)
        elif current:
            stretches.append(tokenizer.decode(current))
            current = []
    return stretches


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def test_supervised_mask_of_every_turn(tokenizer):
    text = SYSTEM + turn("user", USER) + turn("assistant", "A red circle.")
    text += turn("user", "And now?") + turn("assistant", "图像里有什么？") + turn("user", "Thanks")
    expected = ["A red circle.<|im_end|>\n", "图像里有什么？<|im_end|>\n"]
    assert supervised_texts(tokenizer, text) == expected


def test_supervised_mask_positions_are_exact(tokenizer):
    before = SYSTEM + turn("user", USER) + "<|im_start|>assistant\n"
    head, answer = encode(tokenizer, before), encode(tokenizer, "A red circle.<|im_end|>\n")
    assert encode(tokenizer, before + "A red circle.<|im_end|>\n") == head + answer
    assert supervised_mask(head + answer, tokenizer) == [0] * len(head) + [1] * len(answer)


def test_supervised_mask_adjacent_answers(tokenizer):
    text = turn("user", USER) + turn("assistant", "A") + turn("assistant", "B")
    assert supervised_texts(tokenizer, text) == ["A<|im_end|>\n", "B<|im_end|>\n"]


def test_supervised_mask_of_a_truncated_answer(tokenizer):
    ids = encode(tokenizer, turn("user", USER) + turn("assistant", "A red circle on a blue ground"))
    whole = supervised_mask(ids, tokenizer)
    first = whole.index(1)
    for length in range(len(ids) + 1):  # cutting never changes what stands before the cut
        assert supervised_mask(ids[:length], tokenizer) == whole[:length]
    assert sum(supervised_mask(ids[: first + 2], tokenizer)) == 2
    assert sum(supervised_mask(ids[:first], tokenizer)) == 0


def test_supervised_mask_without_the_last_newline(tokenizer):
    text = turn("user", USER) + turn("assistant", "Red")
    assert supervised_texts(tokenizer, text.removesuffix("\n")) == ["Red<|im_end|>"]


def test_supervised_mask_of_an_empty_answer(tokenizer):
    text = turn("user", USER) + turn("assistant", "") + turn("user", USER)
    assert supervised_texts(tokenizer, text) == ["<|im_end|>\n"]


@pytest.mark.parametrize("newlines", [1, 2, 3])
def test_supervised_mask_of_an_answer_that_begins_with_newlines(tokenizer, newlines):
    answer = "\n" * newlines + "Red"
    (text,) = supervised_texts(tokenizer, turn("user", USER) + turn("assistant", answer))
    assert text.endswith("Red<|im_end|>\n") and text.lstrip("\n") == "Red<|im_end|>\n"
    header = encode(tokenizer, f"<|im_start|>assistant\n{answer}<|im_end|>\n")
    # Only the one token with the header's own line break may swallow some of the answer's.
    mask = supervised_mask(header, tokenizer)
    assert mask.index(1) == len(encode(tokenizer, "<|im_start|>assistant")) + 1


@pytest.mark.parametrize(
    "content", ["assistant\nA red circle", "user assistant\n assistant", "say:\nassistant\n"]
)
def test_supervised_mask_ignores_the_word_assistant_elsewhere(tokenizer, content):
    text = turn("system", content) + turn("user", content) + turn("assistant", content)
    assert supervised_texts(tokenizer, text) == [f"{content}<|im_end|>\n"]


def test_supervised_mask_of_a_conversation_without_answer(tokenizer):
    assert not any(supervised_mask(encode(tokenizer, SYSTEM + turn("user", USER)), tokenizer))
    assert supervised_mask([], tokenizer) == []


def test_supervised_mask_of_other_roles_is_empty(tokenizer):
    for role in ("assistants", "user", "tool", "Assistant"):
        assert supervised_texts(tokenizer, turn(role, "Red")) == []
