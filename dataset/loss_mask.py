"""Owns which tokens of a ChatML conversation are supervised."""

from functools import lru_cache

from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=8)
def _markers(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of an assistant turn's header (without its line break), and ids of a line break."""
    role = tokenizer.encode("assistant", add_special_tokens=False)
    newline = tokenizer.encode("\n", add_special_tokens=False)
    return [tokenizer.bos_token_id, *role], newline


@lru_cache(maxsize=256)
def _begins_line(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    return str(tokenizer.decode([token_id])).startswith("\n")


def supervised_mask(input_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """1 where a token is a target: each answer, its `<|im_end|>` and the newline after it.

    An answer begins after the token that contains the line break of `<|im_start|>assistant\\n`
    (that token may also contain white space with which the answer begins). An answer whose end
    was cut off is supervised to the last token.

    Args:
        input_ids: ids of a whole conversation, without padding.
        tokenizer: its bos token opens a turn, its eos token ends it.
    Returns:
        A list of 0 and 1, as long as `input_ids`.
    """
    header, newline = _markers(tokenizer)
    mask = [0] * len(input_ids)
    position = 0
    while True:
        try:
            position = input_ids.index(tokenizer.bos_token_id, position)
        except ValueError:
            return mask
        start = position + len(header) + 1
        opens_answer = input_ids[position : start - 1] == header
        is_header = opens_answer and start <= len(input_ids)
        if not is_header or not _begins_line(tokenizer, input_ids[start - 1]):
            position += 1
            continue
        try:
            end = input_ids.index(tokenizer.eos_token_id, start) + 1
        except ValueError:
            end = len(input_ids)
        if input_ids[end : end + len(newline)] == newline:
            end += len(newline)
        mask[start:end] = [1] * (end - start)
        position = end
