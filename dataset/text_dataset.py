"""Owns `TextDataset`: text packed into blocks of equal length, for next-token pretraining."""

import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.lm_dataset import BadSample, Sample
from dataset.records import BadRecordError, check_conversation, file_fingerprint

TOKENIZE_AT_ONCE = 1000  # documents handed to the tokenizer together


class TextDataset(Dataset):
    """A `.txt` file (a document a line) or JSONL (`{"text"}` or `{"conversations"}` records).

    Documents are tokenized, each between the tokenizer's bos and eos, a conversation as the chat
    template writes it, laid end to end and cut into blocks of `max_length`. Every token but a
    block's first is a target, so nothing is spent on padding.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no text in it.
    """

    def __init__(self, data_path: str | Path, tokenizer, *, max_length: int = 512):
        self.data_path = Path(data_path)
        if not self.data_path.is_file():
            raise FileNotFoundError(f"no text {self.data_path}; name it by --data_path")
        self.max_length = max_length
        self.num_blank = 0
        self._bad: list[BadSample] = []
        documents = self._documents(tokenizer)
        ends = np.array([tokenizer.bos_token_id, tokenizer.eos_token_id], dtype=np.int32)
        pieces = []
        for start in range(0, len(documents), TOKENIZE_AT_ONCE):
            some = documents[start : start + TOKENIZE_AT_ONCE]
            for ids in tokenizer(some, add_special_tokens=False)["input_ids"]:
                pieces += [ids] if ids[:1] == [ends[0]] else [ends[:1], ids, ends[1:]]
        if not pieces:
            raise ValueError(f"{self.data_path}: no text in it")
        self.tokens = torch.from_numpy(np.concatenate(pieces).astype(np.int32))

    def _documents(self, tokenizer) -> list[str]:
        is_json = self.data_path.suffix == ".jsonl"
        documents = []
        with open(self.data_path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{self.data_path.name}:{number}"
                try:
                    text = self._text(line, tokenizer, where=where) if is_json else line.strip()
                except BadRecordError as error:
                    self._bad.append(BadSample(number - 1, str(error)))
                    continue
                if text:
                    documents.append(text)
                else:
                    self.num_blank += 1
        return documents

    @staticmethod
    def _text(line: str, tokenizer, *, where: str) -> str:
        if not line.strip():
            return ""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRecordError(f"{where}: not valid JSON ({error}); mend or delete it") from None
        if isinstance(record, dict) and isinstance(record.get("text"), str):
            return record["text"].strip()
        if isinstance(record, dict) and "conversations" in record:
            messages = check_conversation(record["conversations"], where=where)
            return tokenizer.apply_chat_template(messages, tokenize=False)
        raise BadRecordError(f"{where}: a record needs 'text' or 'conversations'")

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.max_length) or 1

    def __getitem__(self, index: int) -> Sample:
        """Block `index`; its last token is the next one's first, so that each is once a target."""
        if not 0 <= index < len(self):
            raise IndexError(index)  # also what ends a for loop over the data set
        start = index * self.max_length
        input_ids = self.tokens[start : start + self.max_length + 1].long()
        return Sample(
            index=index,
            where=f"{self.data_path.name}:block {index}",
            input_ids=input_ids,
            labels=input_ids,
            image_mask=torch.zeros_like(input_ids, dtype=torch.bool),
            pixel_values=torch.zeros(0, 3, 1, 1),
            is_truncated=False,
        )

    @property
    def fingerprint(self) -> str:
        """Identifies the text, wherever the file lies."""
        return file_fingerprint(self.data_path, len(self.tokens))

    def find_bad_records(self) -> list[BadSample]:
        """Lines that hold no usable record; they are not among the blocks."""
        return self._bad
