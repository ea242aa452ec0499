"""Owns the records made of Flickr8k: a question and a caption each, and photos of 224 x 224 pixels.

Order and draws are fixed, so that every download gives the same records.
"""

import io
import json
import random
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from dataset.fetching.flickr_captions import Photo, members

DATA_FILE, IMAGES_FILE = "data.jsonl", "images.zip"
QUESTIONS = {
    "en": (
        "Write a short caption for this picture.",
        "Describe the picture in one sentence.",
        "What is happening in this photo?",
    ),
    "zh": ("用一句话描述这张图片。", "为这张图写一个简短的说明。", "这张照片里发生了什么？"),
}
SEED = 5  # of each part's draws
SIDE = 224  # pixels
JPEG_QUALITY = 78
# More photos of a part than these are not damage but another archive.
MAX_LEFT_OUT = 50
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile,
    Image.DecompressionBombError,
)  # fmt: skip


def draw_records(photos: Sequence[Photo]) -> Iterator[tuple[str, list[str]]]:
    """Each photo's name and its records as lines: the English captions, then the Chinese ones."""
    draw = random.Random(SEED)
    for photo in photos:
        lines = []
        for language, captions in photo.captions.items():
            for caption in captions:
                question = draw.choice(QUESTIONS[language])
                image_first = draw.choice((True, False))
                lines.append(_record(photo.name, question, caption, image_first=image_first))
        yield photo.name, lines


def _record(name: str, question: str, caption: str, *, image_first: bool) -> str:
    content = f"<image>\n{question}" if image_first else f"{question}\n<image>"
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": caption}]
    return json.dumps({"conversations": turns, "image": name}, ensure_ascii=False) + "\n"


def shrink(data: bytes) -> bytes:
    """The middle square of a picture, upright, as a JPEG of `SIDE` pixels.

    Raises:
        One of `UNREADABLE`: it is no picture, or a damaged one.
    """
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    square = ImageOps.fit(upright, (SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    square.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return file.getvalue()


def write_part(
    folder: Path, photos: Sequence[Photo], archive: zipfile.ZipFile, *, where: Path
) -> dict[str, str]:
    """Write a part's records and photos into a new folder.

    Args:
        archive: the published photos, and `where` its path.
    Returns:
        The photos that are left out, because they cannot be read, and why.
    Raises:
        ValueError: too many are.
    """
    folder.mkdir()
    found = members(archive)
    left_out: dict[str, str] = {}
    with (
        zipfile.ZipFile(folder / IMAGES_FILE, "w") as pictures,
        open(folder / DATA_FILE, "w", encoding="utf-8", newline="\n") as data,
    ):
        bar = tqdm(draw_records(photos), folder.name, len(photos), unit="photo", disable=None)
        for name, lines in bar:
            picture = _read(name, archive, found, where=where)
            if isinstance(picture, str):
                left_out[name] = picture
                continue
            member = zipfile.ZipInfo(name)  # without the time of today, so equal each time
            member.external_attr = 0o644 << 16
            pictures.writestr(member, picture)
            data.writelines(lines)
    if len(left_out) > MAX_LEFT_OUT or len(left_out) == len(photos):
        name, reason = next(iter(left_out.items()))
        raise ValueError(
            f"{where}: {len(left_out)} of {len(photos)} photos of {folder.name} cannot be read, "
            f"the first {name} ({reason}); it is torn, or holds other photos: put the published "
            "one there"
        )
    return left_out


def _read(
    name: str, archive: zipfile.ZipFile, found: dict[str, str], *, where: Path
) -> bytes | str:
    """A photo made small, or the reason why there is none."""
    if name not in found:
        return f"not in {where.name}"
    try:
        return shrink(archive.read(found[name]))
    except UNREADABLE as error:
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
