"""Owns the data set Flickr8k with the Chinese captions of Flickr8k-CN: its terms, the published
files, and the folder of records that is made of them.

The published files are taken from where the user has them, or fetched and kept. The folder appears
whole or not at all.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from dataset.fetching.disk import readable
from dataset.fetching.flickr_captions import LANGUAGES, NUM_CAPTIONS, open_zip, read_texts
from dataset.fetching.flickr_records import DATA_FILE, IMAGES_FILE, write_part
from dataset.fetching.hub import RemoteFile, endpoint, fetch, is_same, part_size
from dataset.fetching.whole_folder import whole_folder

FOLDER = "dataset/flickr8k"
PUBLISHED_FOLDER = "dataset/flickr8k_published"
# Source: the readme.txt in Flickr8k_text.zip (paper); Flickr8k_Dataset.names in jbrownlee/Datasets,
# which quotes the terms of the University of Illinois; lixirong.net/datasets/flickr8kcn (paper).
TERMS = """\
Flickr8k: for non-commercial research and education only, not to be redistributed; the photos belong
to those who put them on Flickr. Flickr8k-CN, the Chinese captions: for research. To be cited:
  Hodosh, Young, Hockenmaier (2013): Framing Image Description as a Ranking Task, JAIR 47, 853-899
  Li, Lan, Dong, Liu (2016): Adding Chinese Captions to Images, ICMR 2016, 271-275
Flickr8k 仅限非商业的研究与教学, 不得再分发, 照片的权利属于其 Flickr 作者;
Flickr8k-CN 的中文说明供研究使用; 使用时请引用以上论文。
"""
CHINESE_REPO = "li-xirong/flickr8kcn"
# A commit at which the captions are known to be there.
CHINESE_COMMIT = "eaaea3d3d26bf0faccc29615da9293a108d892eb"
SOURCE_FILE, TERMS_FILE = "SOURCE.json", "TERMS.txt"
PARTS = ("train", "val")
FILES_MADE = (TERMS_FILE, *(f"{part}/{f}" for part in PARTS for f in (DATA_FILE, IMAGES_FILE)))
NUM_BYTES = 98_000_000  # of the folder
ROOM_BYTES = 120_000_000  # for it
MAX_NAMED = 10


@dataclass(frozen=True)
class Published:
    """A published file.

    Args:
        address: its path on GitHub.
        num_bytes: its size; about, where there is no `md5`.
        else_do: what to do where it cannot be had.
    """

    name: str
    address: str
    num_bytes: int
    md5: str | None
    else_do: str = "put {name} into {folder} by hand, or name its folder by --flickr8k_files"


RELEASE = "jbrownlee/Datasets/releases/download/Flickr8k"
# In the order of fetching: what may be refused comes before the gigabyte. The sizes are quoted from
# the server's answers in 2026; the md5 are those that torchvision for R and others check by. There
# is none for the Chinese captions, 40,000 lines, which are checked by their content.
FILES = (
    Published(
        "Flickr8k_text.zip",
        f"{RELEASE}/Flickr8k_text.zip",
        2_340_801,
        "bf6c1abcb8e4a833b7f922104de18627",
    ),
    Published(
        "flickr8kzhc.caption.txt",
        f"{CHINESE_REPO}/raw/{CHINESE_COMMIT}/data/flickr8kzhc.caption.txt",
        2_400_000,
        None,
        f"get {{name}} of https://github.com/{CHINESE_REPO} (folder data) some other way and put "
        "it into {folder}: no set is made without the Chinese captions",
    ),
    Published(
        "Flickr8k_Dataset.zip",
        f"{RELEASE}/Flickr8k_Dataset.zip",
        1_115_419_746,
        "f18a1e2920de5bd84dae7cf08ec78978",
    ),
)


@dataclass(frozen=True)
class Piece:
    """A published file, where it is or will be, and whether it is there."""

    published: Published
    path: Path
    is_there: bool

    @property
    def remote(self) -> RemoteFile:
        file = self.published
        way_out = file.else_do.format(name=file.name, folder=self.path.parent)
        size = file.num_bytes if file.md5 else None
        url = f"{endpoint('github')}/{file.address}"
        return RemoteFile(url, file.name, size, md5=file.md5, way_out=way_out)

    @property
    def missing_bytes(self) -> int:
        received = part_size(self.remote, self.path)
        return 0 if self.is_there else max(0, self.published.num_bytes - received)

    def describe(self, root: Path) -> str:
        """Its line of the plan."""
        file = self.published
        path = self.path.relative_to(root) if self.path.is_relative_to(root) else self.path
        size = readable(self.path.stat().st_size if self.is_there else file.num_bytes)
        owner = "/".join(file.address.split("/")[:2])
        check = "checked by md5" if file.md5 else "no checksum is published: checked by content"
        state = "there" if self.is_there else "fetch"
        return f"{state:<8}{size:>10}  {path}  ({owner} on {endpoint('github')}, {check})"


def find_pieces(root: Path, given: Path | None) -> list[Piece]:
    """The published files, in the order of `FILES`.

    Args:
        given: a folder of the user's, which is looked into first and never written to.
    Raises:
        FileNotFoundError: it is no folder, or has none of them.
    """
    names = [file.name for file in FILES]
    if given is not None and not given.is_dir():
        raise FileNotFoundError(f"--flickr8k_files {given} is no folder; name one that has files")
    if given is not None and not any((given / name).is_file() for name in names):
        there = ", ".join(sorted(path.name for path in given.iterdir())[:12]) or "nothing"
        raise FileNotFoundError(
            f"--flickr8k_files {given} has none of {', '.join(names)} (there: {there}); name the "
            "published files so"
        )
    pieces = []
    for file in FILES:
        own = root / PUBLISHED_FOLDER / file.name
        places = [own] if given is None else [given / file.name, own]
        path = next((place for place in places if place.is_file()), None)
        pieces.append(Piece(file, path or own, path is not None))
    return pieces


def state_of(folder: Path) -> str:
    """What a folder is: "there", made by this module and not changed since; "fetch", not there or
    empty; "differs", anything else."""
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return "fetch"
    try:
        source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        is_there = all(source["files"][name] == _sha256(folder / name) for name in FILES_MADE)
    except (OSError, ValueError, KeyError, TypeError):
        return "differs"
    return "there" if is_there else "differs"


def make_flickr8k(folder: Path, *, pieces: list[Piece]) -> None:
    """Fetch what is missing, small files first, and write the folder.

    Raises:
        FileNotFoundError, ConnectionError, OSError, ValueError: as `fetch`, `read_texts`,
            `write_part` and `whole_folder`; the folder is as it was.
    """
    texts, chinese, photos = pieces
    for piece in (texts, chinese):
        _obtain(piece)
    try:
        parts = read_texts(texts.path, chinese.path)
    except ValueError as error:
        if not chinese.is_there and str(chinese.path) in str(error):
            chinese.path.unlink()  # it has no checksum, and would be taken for the user's own
        raise
    _obtain(photos)
    left_out: dict[str, dict[str, str]] = {}
    with open_zip(photos.path) as archive, whole_folder(folder) as new:
        for part, of_part in parts.items():
            left_out[part] = write_part(new / part, of_part, archive, where=photos.path)
        (new / TERMS_FILE).write_text(TERMS, encoding="utf-8")
        source = {
            "published": {
                piece.published.name: {
                    "address": f"github.com/{piece.published.address}",
                    "sha256": _sha256(piece.path),
                }
                for piece in pieces
            },
            "photos": {part: len(of_part) - len(left_out[part]) for part, of_part in parts.items()},
            "left_out": left_out,
            "files": {name: _sha256(new / name) for name in FILES_MADE},
        }
        text = json.dumps(source, indent=1, ensure_ascii=False) + "\n"
        (new / SOURCE_FILE).write_text(text, encoding="utf-8")


def describe_result(folder: Path) -> str:
    """What a finished folder holds, what it lacks, how to train on it, and what may be deleted."""
    source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    nums = source["photos"]
    flags = [
        f"--{prefix}data_path {folder / part / DATA_FILE} "
        f"--{prefix}images_path {folder / part / IMAGES_FILE}"
        for prefix, part in (("", "train"), ("val_", "val"))
    ]
    lines = [
        f"{folder}: {nums['train']} photos to train on and {nums['val']} to validate with, "
        f"{NUM_CAPTIONS} captions in each of {len(LANGUAGES)} languages: {' '.join(flags)}"
    ]
    left_out = {name: why for part in source["left_out"].values() for name, why in part.items()}
    if left_out:
        named = [f"{name} ({why})" for name, why in left_out.items()]
        more = f" and {len(named) - MAX_NAMED} more, in {SOURCE_FILE}" * (len(named) > MAX_NAMED)
        are = "photo is" if len(named) == 1 else "photos are"
        lines.append(
            f"{len(named)} {are} left out, which cannot be read: "
            f"{', '.join(named[:MAX_NAMED])}{more}"
        )
    kept = folder.with_name(Path(PUBLISHED_FOLDER).name)
    if any((kept / file.name).is_file() for file in FILES):
        lines.append(f"the published files are kept in {kept} and can be deleted")
    return "\n".join(lines)


def _obtain(piece: Piece) -> None:
    """Fetch a file, or say where the user's own is another edition."""
    if not piece.is_there:
        fetch(piece.remote, piece.path)
    elif not is_same(piece.remote, piece.path):
        print(
            f"note: {piece.path} is not the published file to the byte; it is taken as far as its "
            "content fits",
            flush=True,
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
