"""Owns the examination of one record: what it holds, or what is wrong with it.

It is done with the real parts: the reader, the processor's prompt, the loss mask and the decoder of
pictures, so that what passes here is what training takes.
"""

import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch.utils.data import Dataset

from dataset.evaluation.language import detect_language
from dataset.examining.faults import Fault
from dataset.examining.likeness import (
    LONGEST_TEXT,
    content_key,
    mean_colours,
    picture_hash,
    plain_text,
    text_signature,
)
from dataset.examining.sources import FaultyRecordError, Sources
from dataset.lm_dataset import IGNORE_INDEX, Processor, make_sample
from dataset.records.conversation import Record

LANGUAGES = ("en", "zh", "other")
KEPT_PICTURES = 1 << 15  # looks at pictures, each half a KB: one that recurs is decoded once
STAND_IN = torch.zeros(1, 1)  # in place of a picture, where only the prompt counts

# Encoded bytes and the most pixels -> the picture as training decodes it; raises ValueError.
OpenPicture = Callable[..., Image.Image]


@dataclass(frozen=True, slots=True)
class PictureLook:
    """A picture: key of its bytes, size in pixels and bytes, and its signature."""

    key: int
    width: int
    height: int
    num_bytes: int
    hash: int
    colours: bytes


@dataclass(frozen=True)
class Finding:
    """What a record holds. Of one with a fault only `index` and `fault` say anything.

    num_tokens: of the whole record. num_kept, num_supervised, num_image_tokens: within
    `max_length`. key: of the conversation with its pictures. answer_key, signature: of the answers.
    """

    index: int
    fault: Fault | None = None
    num_turns: int = 0
    num_tokens: int = 0
    num_kept: int = 0
    num_supervised: int = 0
    num_image_tokens: int = 0
    language: str = "other"
    has_system: bool = False
    carries_tools: bool = False
    key: int = 0
    answer_key: int = 0
    signature: bytes = b""
    pictures: tuple[PictureLook, ...] = ()


class Examiner(Dataset[Finding]):
    """The findings of records, as a data set: `[index]` examines a record.

    Args:
        open_picture: decodes a picture.
        max_length: tokens that training takes of a sample.
        max_pixels: a larger picture is a fault, and is not decoded.
    """

    def __init__(
        self,
        sources: Sources,
        processor: Processor,
        open_picture: OpenPicture,
        *,
        max_length: int,
        max_pixels: int,
    ):
        self.sources, self.processor, self.open_picture = sources, processor, open_picture
        self.max_length, self.max_pixels = max_length, max_pixels
        self._looks: OrderedDict[tuple[int, str] | int, PictureLook | Fault] = OrderedDict()

    def of(self, sources: Sources) -> "Examiner":
        """An examiner of other records, by the same measure."""
        return Examiner(
            sources,
            self.processor,
            self.open_picture,
            max_length=self.max_length,
            max_pixels=self.max_pixels,
        )

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Finding:
        if index >= len(self):
            raise IndexError(index)
        try:
            record = self.sources.record(index)
            looks = tuple(self._look(index, image) for image in record.images)
            return self._read_prompt(index, record, looks)
        except FaultyRecordError as error:
            return Finding(index, fault=error.fault)

    def _look(self, index: int, image: str | bytes) -> PictureLook:
        """What a picture is, decoded when it is first met; raises `FaultyRecordError`."""
        key: tuple[int, str] | int
        if isinstance(image, str):
            key = self.sources.locate(index)[0], image
        else:
            key = content_key(image)
        if key not in self._looks:
            try:
                self._looks[key] = self._decode(index, self.sources.read_image(index, image))
            except FaultyRecordError as error:
                self._looks[key] = error.fault
            while len(self._looks) > KEPT_PICTURES:
                self._looks.popitem(last=False)
        look = self._looks[key]
        if isinstance(look, Fault):
            raise FaultyRecordError(replace(look, where=self.sources.where(index)))
        return look

    def _decode(self, index: int, content: bytes) -> PictureLook:
        try:
            with warnings.catch_warnings():  # our own limit says more than Pillow's warning
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                picture = self.open_picture(content, max_pixels=self.max_pixels)
        except Exception as error:  # decoders raise almost anything on damaged data
            raise self.sources.fault(index, error) from error
        return PictureLook(
            content_key(content),
            picture.width,
            picture.height,
            len(content),
            picture_hash(picture),
            mean_colours(picture),
        )

    def _read_prompt(self, index: int, record: Record, looks: tuple[PictureLook, ...]) -> Finding:
        blanks = [STAND_IN] * len(looks)
        try:
            sample = make_sample(
                record, blanks, self.processor, index=index, max_length=sys.maxsize
            )
            num_tokens = len(sample.input_ids)
            if num_tokens > self.max_length:
                sample = make_sample(
                    record, blanks, self.processor, index=index, max_length=self.max_length
                )
        except Exception as error:  # chat templates raise errors of their own
            raise self.sources.fault(index, error) from error
        said = [(m["role"], plain_text(m["content"])) for m in record.messages]
        answers = [m["content"] for m in record.messages if m["role"] == "assistant"]
        answer = "".join(plain for role, plain in said if role == "assistant")[:LONGEST_TEXT]
        conversation = "\0".join(f"{role}:{plain}" for role, plain in said)
        shown = ",".join(str(look.key) for look in looks)
        return Finding(
            index,
            num_turns=len(answers),
            num_tokens=num_tokens,
            num_kept=len(sample.input_ids),
            num_supervised=int((sample.labels[1:] != IGNORE_INDEX).sum()),
            num_image_tokens=int(sample.image_mask.sum()),
            language=detect_language(*answers),
            has_system=record.messages[0]["role"] == "system",
            carries_tools=record.carries_tools,
            key=content_key(f"{conversation}\1{shown}".encode("utf-8", "replace")),
            answer_key=content_key(answer.encode("utf-8", "replace")),
            signature=text_signature(answer).tobytes(),
            pictures=looks,
        )
