"""Owns `VLMDataset`: a record becomes the tensors of one training sample.

`VLMDataset[i]` is a record as it stands, for validation and scores; `VLMDataset.for_epoch(e)[i]`
is what training sees of it in an epoch, with what is drawn at random.

Shapes: T tokens, I images, J more whose features were computed before, G patches along a side, V
width of the vision tower, S image side in pixels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dataset.draws import Drawn, Draws
from dataset.loss_mask import supervised_mask
from dataset.records.address import Address, StreamOptions
from dataset.records.conversation import BadRecordError, Message, Record, shorten
from dataset.records.mixing import MixedRecords, Mixture, Part
from dataset.records.reader import open_records

AS_IT_STANDS = Drawn()
FEATURE_FIELDS = ("vision_features", "has_features")
IGNORE_INDEX = -100  # label of a position that is not supervised


class Processor(Protocol):
    """What a data set needs of `VLMProcessor`, which stands in `model/` and is not imported."""

    tokenizer: PreTrainedTokenizerBase
    image_ids: list[int]

    def __call__(
        self,
        messages: list[Message],
        images: Any,
        *,
        max_length: int | None = None,
        **prompt_options: bool,
    ) -> Mapping[str, Any]:
        """`input_ids` (T,), `image_mask` (T,), `pixel_values` (I, 3, S, S), `is_truncated`.

        8-bit pixel values may be (I, 3, H, W), of pictures that are still to be resized.
        Among the images a (3, S, S) tensor is a preprocessed picture, and a (G * G, V) tensor the
        features of one; for features there are also `vision_features` (J, G * G, V) and
        `has_features`. Of `prompt_options`, `keep_empty_thinking=False` drops empty think blocks.
        """

    def pixel_values(self, images: Any) -> Tensor:
        """Preprocessed pictures: (I, 3, S, S) float32."""

    def pictures(self, pixel_values: Tensor) -> list[Image.Image]:
        """The pictures of `pixel_values`, with their colours restored."""


class Features(Protocol):
    """Features of the vision tower that were computed before; `dataset.features`."""

    def get(self, image: str | bytes) -> Tensor | None:
        """(G * G, V) of a picture, by its name or bytes; None where there are none."""


@dataclass(frozen=True)
class BadSample:
    """Takes the place of a sample that could not be made; `reason` begins with file and line."""

    index: int
    reason: str


@dataclass(frozen=True)
class Sample:
    """One training sample.

    input_ids (T,) int64; labels (T,) int64, -100 where not supervised; image_mask (T,) bool;
    pixel_values (I, 3, S, S) float32, or uint8 and of any size; where: file and line, for messages.
    Where some images have features, vision_features (J, G * G, V) holds these, has_features says
    which of the I + J images in reading order they are, and pixel_values holds the others.
    """

    index: int
    where: str
    input_ids: Tensor
    labels: Tensor
    image_mask: Tensor
    pixel_values: Tensor
    is_truncated: bool
    vision_features: Tensor | None = None
    has_features: tuple[bool, ...] = ()
    source: int | None = None  # its number in a mixture


def _about(record: Record) -> str:
    names = ", ".join(shorten(i) for i in record.images if isinstance(i, str))
    return f" (image {names})" if names else ""


def make_sample(
    record: Record,
    images: Sequence[bytes | Tensor] | Tensor,
    processor: Processor,
    *,
    index: int,
    max_length: int,
    drawn: Drawn = AS_IT_STANDS,
) -> Sample:
    """A record, with its images as `Processor` takes them, as a sample.

    Raises:
        BadRecordError: a broken picture, a text that cannot be a prompt, no supervised token.
    """
    messages = record.messages
    if drawn.system and messages[0]["role"] != "system" and not record.carries_tools:
        messages = [{"role": "system", "content": drawn.system}, *messages]
    options = {} if drawn.keep_empty_thinking else {"keep_empty_thinking": False}
    try:
        encoded = processor(messages, images, max_length=max_length, **options)
    except (ValueError, OSError) as error:
        raise BadRecordError(f"{record.where}: {error}{_about(record)}") from error
    mask = supervised_mask(encoded["input_ids"].tolist(), processor.tokenizer)
    # The first token is never predicted, so a label there would not count.
    is_target = torch.tensor(mask, dtype=torch.bool)
    labels = encoded["input_ids"].masked_fill(~is_target, IGNORE_INDEX)
    if not any(mask):
        raise BadRecordError(
            f"{record.where}: no supervised token within {max_length} tokens: the answer "
            "begins behind the limit; raise --max_seq_len or shorten the text"
        )
    return Sample(
        index=index,
        where=record.where,
        input_ids=encoded["input_ids"],
        labels=labels,
        image_mask=encoded["image_mask"],
        pixel_values=encoded["pixel_values"],
        is_truncated=encoded["is_truncated"],
        **{name: encoded[name] for name in FEATURE_FIELDS if name in encoded},
    )


class VLMDataset(Dataset[Sample | BadSample]):
    """Records of any layout as training samples.

    Args:
        data_path: a file, a folder, a pattern, an address or a mixture; see `open_records`.
        images_path: folder or zip of the images; None where the records hold them or have none.
        processor: tokenizes conversations and preprocesses pictures.
        max_length: tokens per sample; a longer one is cut.
        on_bad_sample: "error" raises `BadRecordError`; "return" gives a `BadSample` instead.
        draws: what training changes at random (`for_epoch`); None: nothing.
        fix_image_count: drop `<image>` tags for which a record has no picture.
        stream: how shards on other machines are read; the numbers of their samples are ids.
    """

    is_packed = False  # a sample is a record, whatever `max_length` is

    def __init__(
        self,
        data_path: str | Path | Address | Mixture,
        images_path: str | Path | None,
        processor: Processor,
        *,
        max_length: int = 640,
        on_bad_sample: str = "error",
        draws: Draws | None = None,
        fix_image_count: bool = False,
        stream: StreamOptions | None = None,
    ):
        self.data_path = Path(data_path) if isinstance(data_path, str) else data_path
        self.records = open_records(
            self.data_path,
            Path(images_path) if images_path else None,
            fix_image_count=fix_image_count,
            stream=stream,
        )
        self.num_blank = self.records.num_blank
        self.processor = processor
        self.max_length = max_length
        self.on_bad_sample = on_bad_sample
        self.draws = draws
        self.features: Features | None = None  # what may be read instead of decoding pictures

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_records(self) -> int:
        """How many records the file holds, good or bad: each is a sample."""
        return len(self.records)

    def where(self, index: int) -> str:
        """What a sample is called in messages: file and line."""
        return self.records.where(index)

    @property
    def parts(self) -> list[Part] | None:
        """The sources of a mixture; None where the data is one source."""
        return self.records.parts if isinstance(self.records, MixedRecords) else None

    @property
    def stream(self) -> Any:
        """The order of samples on other machines, by `ids(epoch, start)`; None for local ones."""
        return self.records if self.records.is_stream else None

    @property
    def fingerprint(self) -> str:
        """Identifies the records by content, not by path."""
        return self.records.fingerprint

    @property
    def former_fingerprint(self) -> str:
        """The fingerprint in states of earlier versions."""
        return self.records.former_fingerprint

    def __getitem__(self, index: int) -> Sample | BadSample:
        return self.make(index, AS_IT_STANDS)

    def for_epoch(self, epoch: int) -> "VLMDataset | EpochView":
        """The samples as training sees them in an epoch; this data set if nothing is drawn."""
        return self if self.draws is None else EpochView(self, self.draws, epoch)

    def make(self, index: int, drawn: Drawn) -> Sample | BadSample:
        """A sample with what was drawn for it.

        Raises:
            BadRecordError: the record cannot be used, and `on_bad_sample` is "error".
        """
        try:
            record = self.records[index]
            sample = make_sample(
                record,
                self._read_images(record),
                self.processor,
                index=index,
                max_length=self.max_length,
                drawn=drawn,
            )
        except BadRecordError as error:
            if self.on_bad_sample == "return":
                return BadSample(index, str(error))
            raise
        if isinstance(self.records, MixedRecords):
            return replace(sample, source=self.records.source_of(index))
        return sample

    def read_picture(self, image: str | bytes) -> bytes | Tensor:
        """A picture of a record: its features (G * G, V) if there are any, else its bytes.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        found = None if self.features is None else self.features.get(image)
        return self.records.read_image(image) if found is None else found

    def _read_images(self, record: Record) -> list[bytes | Tensor]:
        try:
            return [self.read_picture(image) for image in record.images]
        except (ValueError, OSError) as error:
            raise BadRecordError(f"{record.where}: {error}{_about(record)}") from error

    def has_images(self, indices: Iterable[int] | None = None) -> bool:
        """Whether any usable record (of these) has an image; stops at the first that has."""
        for index in range(len(self.records)) if indices is None else indices:
            try:
                if self.records[index].images:
                    return True
            except BadRecordError:
                continue
        return False

    def find_bad_records(self, indices: Iterable[int] | None = None) -> list[BadSample]:
        """The records (of these) that are found bad without decoding pictures or tokenizing."""
        return list(self.bad_records(range(len(self.records)) if indices is None else indices))

    def bad_records(self, indices: Iterable[int]) -> Iterator[BadSample]:
        """As `find_bad_records`, one by one as they are found."""
        for index in indices:
            try:
                self.records[index]
            except BadRecordError as error:
                yield BadSample(index, str(error))


@dataclass(frozen=True)
class EpochView(Dataset[Sample | BadSample]):
    """The samples of a data set in one epoch. It never changes, so that data workers which still
    make samples of an epoch do not see the next one."""

    dataset: VLMDataset
    draws: Draws
    epoch: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample | BadSample:
        return self.dataset.make(index, self.draws.of(self.epoch, index))

    def where(self, index: int) -> str:
        """What a sample is called in messages: file and line."""
        return self.dataset.where(index)
