"""If this fails, CIDEr-D, BLEU, chrF or VQA accuracy differ from their published definitions and
cannot be compared with other papers.
"""

import math

import pytest
import sacrebleu

from model.evaluation.text_metrics import (
    CiderD,
    bleu,
    chrf,
    jieba_bleu,
    papers_bleu,
    sentence_bleu,
    vqa_accuracy,
    words,
)

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
    by_order = bleu(answers, references, language="en")
    assert by_order[-1] == pytest.approx(expected)
    assert chrf(answers, references) == sacrebleu.corpus_chrf(answers, streams).score
    assert 30 < expected < 100
    metric = sacrebleu.BLEU(max_ngram_order=2)
    assert by_order[1] == pytest.approx(metric.corpus_score(answers, streams).score)


def test_chinese_is_compared_by_characters():
    """Unsplit, a Chinese sentence is one word, and any difference would make BLEU 0."""
    answer, reference = "两只狗在草地上奔跑。", "两只狗在草地上跑步。"
    score = bleu([answer], [[reference]], language="zh")[-1]
    assert score == pytest.approx(
        sacrebleu.corpus_bleu([answer], [[reference]], tokenize="zh").score
    )
    assert score > 50 and chrf([answer], [[reference]]) > 50
    assert bleu([reference], [[reference]], language="zh") == pytest.approx([100] * 4)


def test_papers_bleu_by_hand():
    """Answer: a dog runs (3 words). References: 3 words, "the dog runs", and 5, with a hyphen.
    Words found: dog, runs, a; pairs: dog runs, a dog of the second; the triple is in neither."""
    references = ["The dog runs!", "A dog on tip-toe, quick."]
    assert papers_bleu(["a dog runs."], [references]) == pytest.approx([100, 100, 0, 0])
    one = papers_bleu(["a cat runs"], [references])
    assert one == pytest.approx([100 * 2 / 3, 0, 0, 0])
    # Punctuation goes without a trace; a word said twice counts once, as the reference has it.
    assert papers_bleu(["tiptoe, TIP-TOE"], [["tip-toe"]])[0] == pytest.approx(50)
    # Two words too few: exp(1 - 5/3); the nearest length is the penalty's.
    short = papers_bleu(["a dog on"], [["a dog on the run"]])
    assert short[0] == pytest.approx(100 * math.exp(1 - 5 / 3))
    near = papers_bleu(["a dog on"], [["a dog on the run", "one dog on"]])
    assert near[:2] == pytest.approx([100, 100])
    # Of a corpus the counts are added: 3 of 3 and 0 of 1.
    both = papers_bleu(["a dog on", "x"], [["a dog on"], ["y"]])
    assert both[0] == pytest.approx(75)


def test_jieba_bleu_compares_words_not_characters():
    assert jieba_bleu(["两只狗在草地上奔跑。"], [["两只狗，在草地上奔跑"]]) == pytest.approx(
        [100] * 4
    )
    # 小狗 and 狗 are different words, though they share a character.
    by_words = jieba_bleu(["小狗奔跑"], [["狗奔跑"]])
    assert by_words[0] == pytest.approx(50)
    assert bleu(["小狗奔跑"], [["狗奔跑"]], language="zh")[0] == pytest.approx(75)


def test_vqa_accuracy():
    assert vqa_accuracy("The first.", ["the first"]) == 1
    assert vqa_accuracy("two", ["2"]) == vqa_accuracy("两", ["二"]) == 1
    assert vqa_accuracy("red", ["blue"]) == 0
    # Ten people, three said so: left out are 3 of them (2 others agree) or 7 (3 do).
    assert vqa_accuracy("cat", ["cat"] * 3 + ["dog"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("cat", ["cat", "dog"]) == pytest.approx(0.5)


def test_bleu_of_a_sentence_is_sacrebleus():
    references = ["a dog runs on the grass", "the brown dog is running"]
    metric = sacrebleu.BLEU(
        tokenize="none", smooth_method="add-k", smooth_value=1, effective_order=False
    )
    for answer in ("a dog is running", "a dog runs on the grass", "grass", "the the the the"):
        expected = metric.sentence_score(answer, references).score / 100
        assert sentence_bleu(answer, references) == pytest.approx(expected)
    assert sentence_bleu("", references) == sentence_bleu("cats", references) == 0
