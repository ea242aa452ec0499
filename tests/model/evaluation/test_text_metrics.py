"""Texts beside references: figures worked out by hand, and sacrebleu's own."""

import math

import pytest
import sacrebleu

from model.evaluation.text_metrics import CiderD, bleu_and_chrf, vqa_accuracy, words

LN2 = math.log(2)


def test_words_are_lower_case_and_chinese_is_split():
    assert words("Two dogs, don't  RUN！两只狗。") == ["two", "dogs", "don't", "run", *"两只狗"]
    assert words("３个 in 3D") == ["3", "个", "in", "3d"]
    assert words("…?!") == []


def test_cider_d_of_two_pictures_by_hand():
    """Words: a is in both pictures and weighs nothing; b, c, and the pairs weigh ln 2."""
    cider = CiderD([["a b"], ["a c"]])
    # The same: cosine 1 for single words and for pairs; there are no longer n-grams.
    assert cider.score("a b", ["a b"]) == pytest.approx(10 * (1 + 1) / 4)
    assert cider.score("A, b!", ["a b"]) == pytest.approx(5.0)
    assert cider.score("a c", ["a b"]) == 0
    # "b b a b": b three times, clipped to once, over norms 3 ln2 and ln2: 1/3. Pairs bb, ba, ab
    # over norms sqrt(3) ln2 and ln2: 1/sqrt(3). Two words too many: exp(-2^2 / (2 * 6^2)).
    by_hand = 10 / 4 * math.exp(-4 / 72) * (1 / 3 + 1 / math.sqrt(3))
    assert cider.score("b b a b", ["a b"]) == pytest.approx(by_hand)
    # Several references: the mean.
    assert cider.score("a b", ["a b", "a c"]) == pytest.approx(2.5)


def test_cider_d_weighs_words_by_the_pictures_that_hold_them():
    """d is in two of four pictures (ln 2), e in one (ln 4 = 2 ln 2); f was never seen (ln 4)."""
    cider = CiderD([["d e", "e"], ["d"], ["x"], ["y", "y"]])
    # Single words: (ln2, ln4) against (ln2, 0): ln2^2 / (sqrt(5) ln2 * ln2). No pair in common.
    assert cider.score("d f", ["d"]) == pytest.approx(
        10 / 4 * math.exp(-1 / 72) * LN2**2 / (math.sqrt(5) * LN2 * LN2)
    )
    assert cider.score("", ["d"]) == 0


def test_cider_d_needs_two_pictures():
    with pytest.raises(ValueError, match="references of two images; got 1"):
        CiderD([["a b"]])


def test_bleu_and_chrf_are_sacrebleus():
    answers = ["A dog runs on the grass .", "Two girls play."]
    references = [
        ["A dog runs on grass .", "The dog is running on the grass ."],
        ["Two girls play."],
    ]
    streams = [[r[0] for r in references], [references[0][1], None]]
    expected = sacrebleu.corpus_bleu(answers, streams).score
    assert bleu_and_chrf(answers, references, language="en") == (
        expected,
        sacrebleu.corpus_chrf(answers, streams).score,
    )
    assert 30 < expected < 100


def test_chinese_is_compared_by_characters():
    """Unsplit, a Chinese sentence is one word, and any difference would make BLEU 0."""
    answer, reference = "两只狗在草地上奔跑。", "两只狗在草地上跑步。"
    bleu, chrf = bleu_and_chrf([answer], [[reference]], language="zh")
    assert bleu == sacrebleu.corpus_bleu([answer], [[reference]], tokenize="zh").score > 50
    assert chrf > 50
    assert bleu_and_chrf([reference], [[reference]], language="zh") == pytest.approx((100, 100))


def test_vqa_accuracy():
    assert vqa_accuracy("The first.", ["the first"]) == 1
    assert vqa_accuracy("two", ["2"]) == vqa_accuracy("两", ["二"]) == 1
    assert vqa_accuracy("red", ["blue"]) == 0
    # Ten people, three said so: left out are 3 of them (2 others agree) or 7 (3 do).
    assert vqa_accuracy("cat", ["cat"] * 3 + ["dog"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("cat", ["cat", "dog"]) == pytest.approx(0.5)
