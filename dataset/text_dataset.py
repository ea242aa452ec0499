"""Owns `TextDataset`: text packed into blocks of equal length, for next-token pretraining."""

import json
import re
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import IGNORE_INDEX, BadSample, Sample
from dataset.loss_mask import supervised_mask
from dataset.records.conversation import BadRecordError, check_conversation, decode, parse_json
from dataset.records.data_file import check_file, check_text
from dataset.records.fingerprint import ends_fingerprint, file_fingerprint

LOSS_ON = ("all", "answers")
PROSE = (".txt", ".md", ".text", ".markdown")
TOKENIZE_AT_ONCE = 1000  # documents handed to the tokenizer together


class TextDataset(Dataset[Sample]):
    """A `.txt` or `.md` file (a document a line) or JSONL (`{"text"}` or `{"conversations"}`).

    Each document is tokenized between the tokenizer's bos and eos, a conversation as the chat
    template renders it. A line may contain bos and eos itself, if they enclose each of its
    documents; any other special token makes it a bad line.

    Args:
        loss_on: "all" concatenates the documents and cuts them into blocks of `max_length`, so
            that there is no padding; every token but a block's first is a target.
            "answers" makes each document a sample, cut at `max_length`; in a conversation only
            the answers are targets, as in the stages with images.
    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, no usable text, or an unknown `loss_on`.
    """

    def __init__(
        self,
        data_path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 512,
        loss_on: str = "all",
    ):
        if loss_on not in LOSS_ON:
            raise ValueError(f"loss_on {loss_on!r} is not one of {', '.join(LOSS_ON)}")
        self.data_path = Path(data_path)
        check_file(self.data_path, what="text", flag="--data_path")
        self._is_json = _is_jsonl(self.data_path)
        check_text(self.data_path)
        self.max_length = max_length
        self.num_blank = self.num_records = 0
        self._bad: list[BadSample] = []
        documents = self._documents(tokenizer)
        if not documents:
            why = f" that can be used; the first fault: {self._bad[0].reason}" if self._bad else ""
            raise ValueError(f"{self.data_path}: no text in it{why}")
        pieces, masks = _tokenize(documents, tokenizer, loss_on=loss_on)
        self.tokens = torch.from_numpy(np.concatenate(pieces))
        self.is_target = torch.from_numpy(np.concatenate(masks))
        self.ends = np.cumsum([len(piece) for piece in pieces]) if loss_on == "answers" else None

    def _documents(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
        documents: list[str] = []
        with open(self.data_path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{self.data_path.name}:{number}"
                try:
                    text = decode(line, where=where).strip()
                    if self._is_json:
                        text = _text_of(text, tokenizer, special, where=where)
                    elif not documents:
                        _check_prose(text, path=self.data_path)
                    _check_characters(text, tokenizer, special, where=where)
                except BadRecordError as error:
                    self._bad.append(BadSample(number - 1, str(error)))
                    continue
                if text:
                    documents.append(text)
                else:
                    self.num_blank += 1
        self.num_records = len(documents) + len(self._bad)
        return documents

    def __len__(self) -> int:
        if self.ends is not None:
            return len(self.ends)
        return -(-(len(self.tokens) - 1) // self.max_length) or 1

    def _span(self, index: int) -> slice:
        """Where sample `index` stands in `tokens`. A block's last token is also the next block's
        first, so that each token is a target once."""
        if self.ends is None:
            return slice(index * self.max_length, (index + 1) * self.max_length + 1)
        start = int(self.ends[index - 1]) if index else 0
        return slice(start, min(int(self.ends[index]), start + self.max_length))

    def __getitem__(self, index: int) -> Sample:
        """Block or document `index`."""
        if not 0 <= index < len(self):
            raise IndexError(index)  # also what ends a for loop over the data set
        span = self._span(index)
        input_ids = self.tokens[span].long()
        return Sample(
            index=index,
            where=self.where(index),
            input_ids=input_ids,
            labels=input_ids.masked_fill(~self.is_target[span], IGNORE_INDEX),
            image_mask=torch.zeros_like(input_ids, dtype=torch.bool),
            pixel_values=torch.zeros(0, 3, 1, 1),
            is_truncated=self.ends is not None and span.stop < self.ends[index],
        )

    def for_epoch(self, epoch: int) -> "TextDataset":
        """The samples of an epoch: nothing about them is random."""
        return self

    def where(self, index: int) -> str:
        """What a sample is called in messages: file and number."""
        return f"{self.data_path.name}:{'block' if self.ends is None else 'document'} {index}"

    @property
    def is_packed(self) -> bool:
        """Whether samples are blocks, so that another `max_length` gives other samples."""
        return self.ends is None

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the text and its targets, not the path."""
        return file_fingerprint(self.data_path, int(self.is_target.sum()))

    @property
    def former_fingerprint(self) -> str:
        """The fingerprint in states of earlier versions."""
        return ends_fingerprint(self.data_path, int(self.is_target.sum()))

    def find_bad_records(self) -> list[BadSample]:
        """Lines without a usable text; they are in no sample."""
        return self._bad


def _tokenize(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, *, loss_on: str
) -> tuple[list[npt.NDArray[np.int32]], list[npt.NDArray[np.bool_]]]:
    """The ids of each document between bos and eos, and which of them are targets."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    header = f"{tokenizer.bos_token}assistant\n"
    pieces, masks = [], []
    for start in range(0, len(documents), TOKENIZE_AT_ONCE):
        some = documents[start : start + TOKENIZE_AT_ONCE]
        encoded = tokenizer(some, add_special_tokens=False)["input_ids"]
        for text, ids in zip(some, encoded, strict=True):
            is_marked = ids[:1] == [bos]
            whole = ids if is_marked else [bos, *ids, eos]
            pieces.append(np.array(whole, dtype=np.int32))
            only_answers = loss_on == "answers" and is_marked and header in text
            mask = supervised_mask(whole, tokenizer) if only_answers else [1] * len(whole)
            masks.append(np.array(mask, dtype=bool))
    return pieces, masks


def _is_jsonl(path: Path) -> bool:
    """Whether a file holds records, not prose; `ValueError` for another suffix."""
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", *PROSE):
        raise ValueError(
            f"{path}: text is read from .jsonl (a record a line) and from {' '.join(PROSE)} (a "
            "document a line); rename it if it is one of these, else convert it"
        )
    return suffix == ".jsonl"


def _check_prose(first: str, *, path: Path) -> None:
    """Raise `ValueError` if a file named as prose begins with a record."""
    if not first.startswith("{"):
        return
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return
    raise ValueError(
        f"{path} begins with a JSON object: were it read as prose, its braces and field names "
        f"would be learnt; name it {path.stem}.jsonl"
    )


def _text_of(
    line: str, tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str], *, where: str
) -> str:
    """The document in a line of JSON."""
    if not line:
        return ""
    record = parse_json(line, where=where)
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        text: str = record["text"]
        return text.strip()
    if isinstance(record, dict) and "conversations" in record:
        messages = check_conversation(record["conversations"], where=where)
        for number, message in enumerate(messages, 1):
            if found := special.search(message["content"]):
                raise BadRecordError(
                    f"{where}: message {number} holds the special token {found[0]}; take it out"
                )
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    raise BadRecordError(f"{where}: a record needs 'text' or 'conversations'")


def _check_characters(
    text: str, tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str], *, where: str
) -> None:
    """Raise `BadRecordError` for characters and special tokens that a document cannot have."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(f"{where}: half a character ({error}); mend or delete it") from None
    if "\0" in text:
        raise BadRecordError(f"{where}: a NUL character; mend or delete it")
    found = special.findall(text)
    pairs = [tokenizer.bos_token, tokenizer.eos_token] * (len(found) // 2)
    outside = special.split(text)[::2]
    if found != pairs or found and "".join(outside).strip():
        raise BadRecordError(
            f"{where}: the text holds the special token {found[0]}; take it out, or put each "
            f"document whole between {tokenizer.bos_token} and {tokenizer.eos_token}"
        )
