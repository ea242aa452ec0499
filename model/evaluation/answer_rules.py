"""Owns the rules by which benchmarks read an option from a generated answer.

A rule takes the answer and the texts of the options, and returns the position of the option that
the answer names, or None where it names none.
"""

import re
from collections.abc import Callable, Sequence

LETTERS = "ABCDEFGHI"
PUNCTUATION = re.compile(r"[.()\[\],:;!*#{}。，：；！（）、]")
ARTICLE_WORDS = 3  # in a longer answer a single A is the article
NO_WORDS = {"No", "no", "not"}

Rule = Callable[[str, Sequence[str]], int | None]


def letter(answer: str, options: Sequence[str]) -> int | None:
    """The one letter that stands in the answer as a word, else the one option whose text does.

    An answer more than twice as long as all options together is not searched for their texts.
    Source: VLMEvalKit's exact matching (`vlmeval/utils/matching_util.py`), by which MMBench and
    MMStar are scored without a judge.
    """
    words = PUNCTUATION.sub(" ", answer).split()
    named = [i for i, name in enumerate(LETTERS[: len(options)]) if name in words]
    is_article = named == [0] and len(words) > ARTICLE_WORDS
    if len(named) == 1 and not is_article:
        return named[0]
    if len(answer) > 2 * sum(map(len, options)):
        return None
    named = [i for i, text in enumerate(options) if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


def first_letter(answer: str, options: Sequence[str]) -> int | None:
    """The letter that is the whole answer, in either case, or begins it as "B. ...".

    Source: LLaVA's evaluation of ScienceQA, as lmms-eval has it
    (`lmms_eval/tasks/scienceqa/utils.py`).
    """
    answer = answer.strip()
    begins = len(answer) > 1 and answer[1] == "." and answer[0].isupper()
    name = answer[0] if begins else answer.upper()
    return LETTERS.index(name) if len(name) == 1 and name in LETTERS[: len(options)] else None


def yes_unless_no(answer: str, options: Sequence[str]) -> int | None:
    """1 (no) where the first sentence has the word no or not, else 0 (yes), whatever it says.

    Source: POPE's own `evaluate.py` (Li et al., "Evaluating Object Hallucination in Large
    Vision-Language Models", EMNLP 2023).
    """
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return int(bool(NO_WORDS & set(words)))


RULES: dict[str, Rule] = {
    "letter": letter,
    "first letter": first_letter,
    "yes unless no": yes_unless_no,
}


def is_clear(answer: str, rule: str, options: Sequence[str]) -> bool:
    """Whether an answer names an option in so many words; POPE's rule takes the rest for a yes."""
    if rule == "yes unless no":
        return bool({"yes", "no", "not"} & set(re.findall(r"[a-z]+", answer.lower())))
    return RULES[rule](answer, options) is not None
