"""Owns rewards: how well an answer agrees with what people answered about the same picture."""

from collections.abc import Iterable
from hashlib import sha256

from dataset.evaluation.language import detect_language
from dataset.lm_dataset import VLMDataset
from dataset.records.conversation import BadRecordError, Record
from model.evaluation.text_metrics import CiderD, sentence_bleu
from trainer.ranks.group import Logger, warn

BLEU_SHARE = 8  # BLEU is below 1 and CIDEr-D below 10: so both count about alike
# Ends answer and references alike: else an answer that breaks off ("a man on a") costs nothing.
END = " endofanswer"
Key = tuple[tuple[str, ...], str]  # pictures, or a question without any, and language


class AnswerRewards:
    """CIDEr-D, and BLEU-4 of a sentence, against all first answers in one language about the same
    pictures.

    Args:
        answers: of each record, where it stands, its pictures and its answer.
    Raises:
        ValueError: no language has answers about two pictures, which CIDEr-D needs, or two records
            are called the same.
    """

    def __init__(self, answers: Iterable[tuple[str, tuple[str, ...], str]]):
        self._keys: dict[str, Key] = {}
        self._references: dict[Key, list[str]] = {}
        for where, about, text in answers:
            if where in self._keys:
                raise ValueError(
                    f"--data_path: two records are called {where}, so their rewards cannot be told "
                    "apart; rename one of the files"
                )
            key = about, detect_language(text)
            self._keys[where] = key
            self._references.setdefault(key, []).append(text + END)
        by_language: dict[str, list[list[str]]] = {}
        for (_, language), texts in self._references.items():
            by_language.setdefault(language, []).append(texts)
        self._ciders = {
            language: CiderD(texts) for language, texts in by_language.items() if len(texts) > 1
        }
        if not self._ciders:
            raise ValueError(
                "--data_path: rewards compare answers over pictures, and no language has answers "
                "about two of them"
            )

    @property
    def summary(self) -> str:
        """What answers are compared with, for the header of a run."""
        num_texts = sum(map(len, self._references.values()))
        return (
            f"rewards: CIDEr-D and BLEU-4 against {num_texts} answers about "
            f"{len(self._references)} pictures, in {', '.join(sorted(self._ciders))}"
        )

    def knows(self, where: str) -> bool:
        """Whether answers to a record's first question can be compared with others."""
        return where in self._keys and self._keys[where][1] in self._ciders

    def of(self, where: str, answer: str, *, is_whole: bool) -> float:
        """The reward of an answer to the first question of a record; 0 to 18.

        Args:
            is_whole: whether it came to its end.
        """
        key = self._keys[where]
        text, references = answer + (END if is_whole else ""), self._references[key]
        cider = self._ciders[key[1]].score(text, references)
        return cider + BLEU_SHARE * sentence_bleu(text, references)


def read_rewards(dataset: VLMDataset) -> AnswerRewards:
    """Those of a data set, in one pass over its records; no picture is decoded.

    Raises:
        ValueError: the records cannot be compared.
    """
    answers, num_bad = [], 0
    for index in range(dataset.num_records):
        try:
            record = dataset.records[index]
        except BadRecordError:
            num_bad += 1
            continue
        answers.append((record.where, _about(record), _first_answer(record)))
    if num_bad:
        warn(f"{num_bad} bad record(s) give no rewards; --on_bad_sample says what becomes of them")
    rewards = AnswerRewards(answers)
    Logger(rewards.summary)
    return rewards


def _about(record: Record) -> tuple[str, ...]:
    """Names of the pictures, or hashes of those a record holds; without any, the question."""
    names = tuple(i if isinstance(i, str) else sha256(i).hexdigest() for i in record.images)
    return names or tuple(m["content"] for m in record.messages if m["role"] == "user")[:1]


def _first_answer(record: Record) -> str:
    return next(m["content"] for m in record.messages if m["role"] == "assistant")
