"""Owns the language and the number of words of a text: English or Chinese, by its script."""

import re

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
LATIN_WORD = re.compile(r"[A-Za-zÀ-ɏ]+")


def detect_language(*texts: str) -> str:
    """The language of the first text with Chinese or Latin letters: "zh", "en", else "other"."""
    for text in texts:
        num_han, num_latin = len(HAN.findall(text)), len(LATIN_WORD.findall(text))
        if num_han or num_latin:
            return "zh" if num_han > num_latin else "en"
    return "other"


def num_words(answer: str) -> int:
    """Words of an answer; each Chinese character is one."""
    return len(LATIN_WORD.findall(answer)) + len(HAN.findall(answer))
