"""Owns metrics of a text against references: BLEU, chrF, CIDEr-D and VQA accuracy.

No model is involved: texts go in, numbers come out.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{HAN}]|[^\W{HAN}_]+(?:'[^\W{HAN}_]+)*")
NUM_NGRAMS = 4  # orders of BLEU and of CIDEr-D
CIDER_SIGMA = 6.0  # width of CIDEr-D's penalty for another length, in words
Gram = tuple[str, ...]
ARTICLES = {"a", "an", "the"}
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten".split(),
    "零 一 二 三 四 五 六 七 八 九 十".split(),
)
DIGITS = {word: str(i) for words in NUMBER_WORDS for i, word in enumerate(words)} | {"两": "2"}


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; each Chinese character is one."""
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


def bleu(answers: list[str], references: list[list[str]], *, language: str) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus as sacrebleu gives them (0 to 100), smoothing "exp" included.

    Args:
        references: one or more for each answer, not necessarily as many for each.
        language: "zh" is split into characters; all else is tokenized as mteval-v13a does.
    """
    tokenize = "zh" if language == "zh" else "13a"
    return _corpus_bleu(answers, references, tokenize=tokenize, smooth_method="exp")


def papers_bleu(answers: list[str], references: list[list[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 as papers on captions give them (0 to 100): lower case, punctuation deleted
    (a T-shirt is a tshirt), words as spaces divide them, the whole corpus, no smoothing.

    An answer counts as long as the reference whose length is nearest.
    Source: Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation"
    (ACL 2002); Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image
    Descriptions" (CVPR 2015).
    """
    return _bleu_of_words(lambda text: _bare(text).split(), answers, references)


def jieba_bleu(answers: list[str], references: list[list[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of Chinese (0 to 100), over the words of the segmenter jieba; the rest as
    `papers_bleu`."""
    from rjieba import cut

    return _bleu_of_words(lambda text: cut(_bare(text)), answers, references)


def _bare(text: str) -> str:
    """Lower case, without the characters that Unicode calls punctuation or symbols."""
    kept = (c for c in text.lower() if unicodedata.category(c)[0] not in "PS")
    return "".join(kept)


def _bleu_of_words(
    split: Callable[[str], list[str]], answers: list[str], references: list[list[str]]
) -> list[float]:
    return _corpus_bleu(
        [" ".join(split(answer)) for answer in answers],
        [[" ".join(split(text)) for text in texts] for texts in references],
        tokenize="none",
        smooth_method="none",
    )


def _corpus_bleu(
    answers: list[str], references: list[list[str]], *, tokenize: str, smooth_method: str
) -> list[float]:
    """BLEU-n for n from 1 to 4: brevity penalty times the geometric mean of the first n
    precisions."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=tokenize, smooth_method=smooth_method, max_ngram_order=NUM_NGRAMS)
    found = metric.corpus_score(answers, _streams(references))
    scores = []
    for n in range(1, NUM_NGRAMS + 1):
        some = found.precisions[:n]
        mean = math.exp(sum(map(math.log, some)) / n) if all(some) else 0.0
        scores.append(found.bp * mean)
    return scores


def sentence_bleu(answer: str, references: list[str]) -> float:
    """BLEU-4 of one answer (0 to 1) over `words`, with one more hit and one more n-gram counted for
    each n above 1, so that an answer without a common 4-gram is not worth 0.

    Source: Lin and Och, "ORANGE: a Method for Evaluating Automatic Evaluation Metrics for Machine
    Translation" (2004).
    """
    tokens, others = words(answer), [words(text) for text in references]
    most: list[Counter[Gram]] = [Counter() for _ in range(NUM_NGRAMS)]
    for other in others:
        for counts, own in zip(most, _ngrams(other), strict=True):
            counts |= own  # the largest count of any reference
    logs = 0.0
    for n, counts in enumerate(_ngrams(tokens)):
        more = float(n > 0)
        hits = sum(min(count, most[n][gram]) for gram, count in counts.items()) + more
        if not hits:
            return 0.0
        logs += math.log(hits / (counts.total() + more))
    nearest = min((abs(len(other) - len(tokens)), len(other)) for other in others)[1]
    return math.exp(logs / NUM_NGRAMS + min(0.0, 1 - nearest / len(tokens)))


def chrf(answers: list[str], references: list[list[str]]) -> float:
    """chrF2 of a corpus, as sacrebleu gives it (0 to 100)."""
    from sacrebleu.metrics import CHRF

    score: float = CHRF().corpus_score(answers, _streams(references)).score
    return score


def _streams(references: list[list[str]]) -> list[list[str | None]]:
    """The first reference of every answer, then the second, ...; None where there is none."""
    most = max(map(len, references))
    return [[r[i] if i < len(r) else None for r in references] for i in range(most)]


def _ngrams(tokens: list[str]) -> list[Counter[Gram]]:
    """Counts of a text's n-grams, for n from 1 to 4."""
    return [
        Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        for n in range(1, NUM_NGRAMS + 1)
    ]


class CiderD:
    """Consensus of an answer with the references of its image.

    The weight of an n-gram is TF-IDF: its count times log(images / images whose references contain
    it). As in the authors' published program, counts are not divided by the text's length, so the
    figures are comparable with published ones.

    Source: Vedantam, Zitnick, Parikh, "CIDEr: Consensus-based Image Description Evaluation"
    (CVPR 2015), section 6 for CIDEr-D.

    Args:
        references: of every image of the data set, for the document frequencies.
    Raises:
        ValueError: fewer than two images, where every inverse document frequency is 0.
    """

    def __init__(self, references: list[list[str]]):
        if len(references) < 2:
            raise ValueError(f"CIDEr-D needs references of two images; got {len(references)}")
        self._num_images = len(references)
        self._num_holding: Counter[Gram] = Counter()  # n-gram -> images
        for texts in references:
            seen = {g for text in texts for counts in _ngrams(words(text)) for g in counts}
            self._num_holding.update(seen)

    def _vectors(self, tokens: list[str]) -> list[dict[Gram, float]]:
        """TF-IDF of the n-grams, for each n."""
        return [
            {
                gram: count * math.log(self._num_images / max(1, self._num_holding[gram]))
                for gram, count in counts.items()
            }
            for counts in _ngrams(tokens)
        ]

    def score(self, answer: str, references: list[str]) -> float:
        """Mean over the references and n; 10 where the answer is the one reference."""
        tokens = words(answer)
        vectors = self._vectors(tokens)
        total = 0.0
        for text in references:
            others = words(text)
            spread = (len(tokens) - len(others)) ** 2 / (2 * CIDER_SIGMA**2)
            pairs = zip(vectors, self._vectors(others), strict=True)
            total += math.exp(-spread) * sum(_clipped_cosine(a, b) for a, b in pairs)
        return 10 * total / (NUM_NGRAMS * len(references))


def _clipped_cosine(answer: dict[Gram, float], reference: dict[Gram, float]) -> float:
    """Cosine similarity; a count above the reference's is clipped to it, so repeating a word does
    not help."""
    norms = [math.sqrt(sum(x * x for x in vector.values())) for vector in (answer, reference)]
    if not all(norms):
        return 0.0
    pairs = ((weight, reference.get(gram, 0.0)) for gram, weight in answer.items())
    dot = sum(min(ours, theirs) * theirs for ours, theirs in pairs)
    return dot / (norms[0] * norms[1])


def _plain(answer: str) -> str:
    """An answer without case, punctuation, articles and number words."""
    return " ".join(DIGITS.get(w, w) for w in words(answer) if w not in ARTICLES)


def vqa_accuracy(answer: str, references: list[str]) -> float:
    """Agreement with people's answers, 0 to 1.

    With ten references this is VQA accuracy: min(1, n / 3), where n of the references agree,
    averaged over leaving out each reference in turn. Where fewer than three are left, n is divided
    by their number instead; a single reference is compared for equality.

    Source: Antol et al., "VQA: Visual Question Answering" (ICCV 2015); https://visualqa.org.
    """
    same = [_plain(answer) == _plain(reference) for reference in references]
    if len(same) == 1:
        return float(same[0])
    needed = min(3, len(same) - 1)
    return sum(min(1.0, (sum(same) - x) / needed) for x in same) / len(same)
