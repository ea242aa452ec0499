"""Offers rows of Parquet files in the published layout."""

import io
import json
import random

import pyarrow
import pyarrow.parquet
from PIL import Image
from support.tiny_parts import conversation

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
LIST = pyarrow.list_(pyarrow.binary())
TYPES = {
    "binary": pyarrow.binary(),
    "large binary": pyarrow.large_binary(),
    "list": LIST,
    "large list": pyarrow.large_list(pyarrow.large_binary()),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()),
    "list of dictionary": pyarrow.list_(pyarrow.dictionary(pyarrow.int32(), pyarrow.binary())),
}
BLACK = (0, 0, 0)


def picture(colour=BLACK, *, size=(8, 8), kind="PNG", mode="RGB") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(file, kind)
    return file.getvalue()


def turns(question="What?", answer="A circle.") -> str:
    return json.dumps(conversation(question, answer)["conversations"], ensure_ascii=False)


def in_type(values: list, name: str) -> pyarrow.Array:
    """Pictures (bytes, lists of them, None) in a column of a type."""
    if name == "list of dictionary":
        plain = pyarrow.array(values, LIST)
        pool = plain.values.dictionary_encode()
        return pyarrow.ListArray.from_arrays(plain.offsets, pool, mask=plain.is_null())
    if name == "dictionary":
        return pyarrow.array(values, pyarrow.binary()).dictionary_encode()
    return pyarrow.array(values, TYPES[name])


def write(path, conversations: list, images, **options) -> None:
    kind = options.pop("text", pyarrow.string())
    columns = {"conversations": pyarrow.array(conversations, kind), "image_bytes": images}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)


def mixed_rows(dice: random.Random, num_rows: int = 3000) -> tuple[list[str], list[list[bytes]]]:
    """Rows as published: every fifth of text alone, the others with one picture or two."""
    blacks = [picture(kind=kind) for kind in FORMATS]
    colours = [
        picture((40 * i, 200 - 20 * i, 90), size=(32 + i, 40), kind=FORMATS[i % 4])
        for i in range(10)
    ]
    texts, images = [], []
    for i in range(num_rows):
        if i % 5 == 0:
            texts.append(turns(f"What is {i}?", "<think>\nhm\n</think>\n\nA number."))
            images.append([dice.choice(blacks)])
        else:
            number = 2 if i % 7 == 0 else 1
            texts.append(turns("<image>" * number + "\nWhat is it?", f"A picture {i}."))
            images.append(dice.choices(colours, k=number))
    return texts, images
