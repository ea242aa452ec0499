"""Owns how log probabilities are told: as chat completions have them, and as completions do.

Source: https://platform.openai.com/docs/api-reference/chat/object and completions/object
"""

from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from model.generation.decoding import TokenScore

LOWEST = -9999.0  # JSON has no infinity; so do the protocol and vLLM tell impossible tokens


class Spelling:
    """Writes tokens of a byte-level vocabulary as the protocol does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._bytes = {character: byte for byte, character in bytes_to_unicode().items()}
        self._texts: dict[int, str] = {}  # decoding one takes 10 us, and a request may have 200,000
        self._special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)

    def text(self, token_id: int) -> str:
        """A token alone; half a character is a replacement character."""
        if token_id not in self._texts:
            text = self._tokenizer.decode(
                [token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            assert isinstance(text, str)
            self._texts[token_id] = text
        return self._texts[token_id]

    def encoded(self, token_id: int) -> list[int]:
        """Its bytes, which may be a part of a character."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # the model has more rows than the vocabulary tokens
            return []
        if token_id in self._special or not set(token) <= self._bytes.keys():
            return list(token.encode())
        return [self._bytes[character] for character in token]


def chat_logprobs(scores: list[TokenScore], spelling: Spelling) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": spelling.text(token_id),
            "logprob": max(logprob, LOWEST),
            "bytes": spelling.encoded(token_id),
        }

    content = [
        entry(score.token_id, score.logprob)
        | {"top_logprobs": [entry(*e) for e in score.likeliest]}
        for score in scores
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    scores: list[TokenScore], offsets: list[int], spelling: Spelling
) -> dict[str, Any]:
    """Of tokens, with the number of characters in front of each.

    The likeliest tokens are an object by their text, to which the chosen one is added. Of several
    that are written alike, halves of characters, the likeliest counts.
    """
    likeliest = []
    for score in scores:
        told: dict[str, float] = {}
        for token_id, logprob in (*score.likeliest, (score.token_id, score.logprob)):
            told.setdefault(spelling.text(token_id), max(logprob, LOWEST))
        likeliest.append(told)
    has_likeliest = any(score.likeliest for score in scores)
    return {
        "tokens": [spelling.text(score.token_id) for score in scores],
        "token_logprobs": [max(score.logprob, LOWEST) for score in scores],
        "top_logprobs": likeliest if has_likeliest else None,
        "text_offset": offsets,
    }
