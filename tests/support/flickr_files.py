"""Offers small stand-ins of the published Flickr8k files, in the forms that those have."""

import hashlib
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from support.fake_hub import FakeHub, files_below

from dataset.fetching import flickr8k, flickr_captions

TEXTS, CHINESE, PHOTOS = (file.name for file in flickr8k.FILES)
TRAIN = ["11_a.jpg", "12_b.jpg", "3_c.jpg"]  # in the order of the records
VAL = ["21_d.jpg", "4_e.jpg"]
TEST = ["5_f.jpg"]
WITHOUT_FILE = "2258277193_586949ec62.jpg.1"  # the published captions name it so


def picture(size: tuple[int, int] = (60, 40), colour: str = "red") -> bytes:
    """A JPEG, blue in its left tenth."""
    image = Image.new("RGB", size, colour)
    image.paste("blue", (0, 0, size[0] // 10, size[1]))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def pack(members: dict[str, bytes]) -> bytes:
    """A zip as macOS makes it, with a twin of metadata beside each file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
            archive.writestr(f"__MACOSX/{name.replace('/', '/._')}", b"metadata")
    return file.getvalue()


def english(name: str, number: int) -> str:
    return f"a thing {name.split('_')[0]} of kind {number} ."


def chinese(name: str, number: int) -> str:
    return f"第{number}种东西{name.split('_')[0]}。"


def chinese_file(names=(*TRAIN, *VAL, *TEST), *, kind: str = "zhc") -> bytes:
    """Number by number, as published."""
    lines = [f"{n}#{kind}#{i} {chinese(n, i)}\n" for i in range(5) for n in names]
    return "".join(lines).encode()


def text_zip(**changed: bytes) -> bytes:
    """Captions and lists; `changed` replaces members by the middle of their names."""
    names = (*TRAIN, WITHOUT_FILE, *VAL, *TEST)
    members = {
        "Flickr8k.token.txt": "".join(
            f"{n}#{i}\t{english(n, i)}\n" for n in names for i in range(5)
        ).encode(),
        "Flickr8k.lemma.txt": b"11_a.jpg#0\tother\n",
        # The published lists are in no order.
        "Flickr_8k.trainImages.txt": "\n".join(TRAIN[::-1]).encode(),
        "Flickr_8k.devImages.txt": "\n".join(VAL[::-1]).encode() + b"\n",
        "Flickr_8k.testImages.txt": "\n".join(TEST).encode(),
        "readme.txt": b"cite",
    }
    for part, data in changed.items():
        [name] = [n for n in members if part in n]
        members[name] = data
    return pack(members)


def photo_zip(**changed: bytes | None) -> bytes:
    """The photos; `changed` replaces them by the letter in their names, or leaves them out."""
    photos = {name: picture() for name in (*TRAIN, *VAL, *TEST)}
    for letter, data in changed.items():
        [name] = [n for n in photos if n.endswith(f"_{letter}.jpg")]
        photos[name] = data
    members = {f"Flicker8k_Dataset/{n}": data for n, data in photos.items() if data is not None}
    return pack(members)


def publish(fake: FakeHub, monkeypatch, **files: bytes) -> None:
    """Put files on the hub, by the middle of their names, and pin them as the real ones are."""
    published = []
    for file in flickr8k.FILES:
        [data] = [d for part, d in files.items() if part in file.name] or [None]
        if data is not None:
            owner, name = file.address.split("/")[:2]
            fake.files[f"{owner}/{name}"][file.name] = data
            file = replace(file, num_bytes=len(data))
            if file.md5:
                file = replace(file, md5=hashlib.md5(data).hexdigest())
        published.append(file)
    monkeypatch.setattr(flickr8k, "FILES", tuple(published))


def records(root: Path, split: str) -> list[dict]:
    """Those that were made below a root."""
    text = (root / flickr8k.FOLDER / split / "data.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def kept(root: Path) -> list[str]:
    """The published files that lie below a root, with what is received of them."""
    folder = root / flickr8k.PUBLISHED_FOLDER
    return files_below(folder) if folder.exists() else []


@pytest.fixture
def flickr(hub, monkeypatch):
    """A hub with all three files, and lists as long as the small ones."""
    lists = {
        "train": ("Flickr_8k.trainImages.txt", len(TRAIN)),
        "val": ("Flickr_8k.devImages.txt", len(VAL)),
    }
    monkeypatch.setattr(flickr_captions, "LISTS", lists)
    publish(hub, monkeypatch, text=text_zip(), zhc=chinese_file(), Dataset=photo_zip())
    return hub
