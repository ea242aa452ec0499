"""Owns leaving the think block in front of an answer out of its score.

The template of a model that thinks writes a block in front of every answer, and training supervises
it. A score is of what follows the block, which the generation prompt gives.
"""

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.generation.thinking import CLOSE, OPEN
from model.model_minimind import IGNORE_INDEX

NEWLINES = 2  # that the template writes behind a block


def without_blocks(labels: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Labels (T,) in which the block that an answer begins with is not supervised."""
    ids, opened, closed = labels.tolist(), *tokenizer.convert_tokens_to_ids([OPEN, CLOSE])
    labels = labels.clone()
    for start in (i for i, token in enumerate(ids) if token == opened):
        if start > 0 and ids[start - 1] != IGNORE_INDEX:
            continue  # words of an answer
        end = start
        while end < len(ids) and ids[end] not in (IGNORE_INDEX, closed):
            end += 1
        if end == len(ids) or ids[end] == IGNORE_INDEX:
            continue  # cut within the block
        end += 1
        num_newlines = 0
        while end < len(ids) and ids[end] != IGNORE_INDEX and num_newlines < NEWLINES:
            text = str(tokenizer.decode(ids[end : end + 1]))
            if not text or text.strip("\n"):
                break
            num_newlines, end = num_newlines + len(text), end + 1
        labels[start:end] = IGNORE_INDEX
    return labels
