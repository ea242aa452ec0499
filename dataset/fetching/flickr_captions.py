"""Owns reading the published texts of Flickr8k and Flickr8k-CN: which photos belong to which part,
and five captions a photo in each language, as sentences.

A line of the English file is `NAME.jpg#0<tab>CAPTION`, one of the Chinese file
`NAME.jpg#zhc#0 CAPTION`, where `zhc` says that people wrote it: `zhb` and `zhg` are machine
translations, `zhm` translations by people, of the test photos alone.
"""

import re
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

# Part -> the list of its photos in the archive of texts, and how many they are.
LISTS = {
    "train": ("Flickr_8k.trainImages.txt", 6000),
    "val": ("Flickr_8k.devImages.txt", 1000),
}
ENGLISH_FILE = "Flickr8k.token.txt"
NUM_CAPTIONS = 5  # of a photo, in each language
LANGUAGES = {"en": "English", "zh": "Chinese"}
KINDS = {"en": "enc", "zh": "zhc"}
FORMS = {"en": "NAME.jpg#0<tab>CAPTION", "zh": "NAME.jpg#zhc#0 CAPTION"}
STOPS = {"en": ".", "zh": "。"}
LINE = re.compile(r"(?P<name>[^#\s]+)#(?:(?P<kind>[a-z]+)#)?(?P<number>\d+)\s+(?P<caption>.*)")
CHINESE_CHARACTER = re.compile(r"[\u4e00-\u9fff]")
SHOWN = 60  # characters of a line in an error


@dataclass(frozen=True)
class Photo:
    """A photo's file name and its captions by language."""

    name: str
    captions: dict[str, tuple[str, ...]]


def normalise(caption: str, *, language: str) -> str:
    """A caption as a sentence: spaces in order, a capital first, one full stop; "" if it is empty.

    The published English has its words apart, so that ` .` ends most captions, and none some.
    """
    text = " ".join(caption.split()).rstrip(f" {STOPS[language]}")
    return text[:1].upper() + text[1:] + STOPS[language] if text else ""


def parse_line(line: str) -> tuple[str, str | None, int, str] | None:
    """Photo, kind, number and caption of a line; None if it is none."""
    match = LINE.fullmatch(line)
    if match is None:
        return None
    return _photo(match["name"]), match["kind"], int(match["number"]), match["caption"]


def read_texts(archive: Path, chinese: Path) -> dict[str, list[Photo]]:
    """The photos of each part, in the order of their names, with all their captions.

    Raises:
        ValueError: a file is not what is published, or a caption is missing; names the file.
    """
    parts = read_lists(archive)
    captions = {
        "en": _parse(_member(archive, ENGLISH_FILE), "en", where=f"{ENGLISH_FILE} in {archive}"),
        "zh": _parse(_decode(chinese.read_bytes(), where=str(chinese)), "zh", where=str(chinese)),
    }
    for language, where in (("en", archive), ("zh", chinese)):
        _check_complete(parts, captions[language], language, where=where)
    return {
        part: [Photo(n, {x: tuple(captions[x][n].values()) for x in LANGUAGES}) for n in names]
        for part, names in parts.items()
    }


def read_lists(archive: Path) -> dict[str, list[str]]:
    """The names of each part's photos, sorted.

    Raises:
        ValueError: not as many as published, or one stands twice.
    """
    parts: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    for part, (file, expected) in LISTS.items():
        names = [_photo(word) for word in _member(archive, file).split()]
        for name in names:
            if name in seen:
                where = f"in {seen[name]} and {file}" if seen[name] != file else "there twice"
                raise ValueError(f"{file} in {archive}: {name} stands {where}, expected once")
            seen[name] = file
        if len(names) != expected:
            raise ValueError(
                f"{file} in {archive} names {len(names)} photos, expected {expected}: it is not "
                "the published list"
            )
        parts[part] = sorted(names)
    return parts


def members(archive: zipfile.ZipFile) -> dict[str, str]:
    """Bare file name -> member, without the files of metadata that macOS adds."""
    return {
        name.rsplit("/", 1)[-1]: name
        for name in archive.namelist()
        if not name.endswith("/") and "__MACOSX/" not in name
    }


def open_zip(path: Path) -> zipfile.ZipFile:
    """Raises ValueError if it is not a readable zip."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(
            f"{path} is not a readable zip ({error}): move it away, and the same command fetches "
            "it again; or put a whole one there"
        ) from error


def _member(archive: Path, file: str) -> str:
    with open_zip(archive) as opened:
        found = members(opened)
        if file not in found:
            there = ", ".join(sorted(found)[:12]) or "nothing"
            raise ValueError(f"{archive} has no {file} (there: {there}); it is another archive")
        try:
            data = opened.read(found[file])
        except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:
            raise ValueError(f"{file} in {archive} is damaged ({error}); fetch it again") from error
    return _decode(data, where=f"{file} in {archive}")


def _decode(data: bytes, *, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error}), so it is another file") from error


def _photo(name: str) -> str:
    return name if "." in name else f"{name}.jpg"  # lists of Flickr8k-CN have bare names


def _parse(text: str, language: str, *, where: str) -> dict[str, dict[int, str]]:
    """Photo -> number -> caption, by number."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    num_chinese = 0
    form = f"expected lines like {FORMS[language]}"
    lines = [line.strip() for line in text.split("\n")]
    for number, line in enumerate(lines, 1):
        parsed = parse_line(line) if line else None
        if parsed is None:
            if line and not found:  # a single odd line later on may pass: captions are counted
                raise ValueError(f"{where}, line {number}: {form}, found {line[:SHOWN]!r}")
            continue
        name, kind, index, caption = parsed
        if kind not in (None, KINDS[language]):
            raise ValueError(
                f"{where} holds captions of kind {kind}, expected {KINDS[language]}: it is not "
                f"the file of {LANGUAGES[language]} captions that people wrote"
            )
        found[name][index] = normalise(caption, language=language)
        num_chinese += bool(CHINESE_CHARACTER.search(caption))
    if not found:
        raise ValueError(f"{where} holds no caption; {form}")
    if language == "zh" and not num_chinese:
        raise ValueError(f"{where} holds no Chinese character; its first line is {lines[0]!r}")
    return {name: dict(sorted(captions.items())) for name, captions in found.items()}


def _check_complete(
    parts: dict[str, list[str]],
    captions: dict[str, dict[int, str]],
    language: str,
    *,
    where: Path,
) -> None:
    """Raise ValueError unless every photo of every part has its five captions."""
    names = [name for part in parts.values() for name in part]
    nums = {name: sum(map(bool, captions.get(name, {}).values())) for name in names}
    lacking = [name for name in names if nums[name] != NUM_CAPTIONS]
    if lacking:
        raise ValueError(
            f"{where}: {len(lacking)} of {len(names)} photos lack {LANGUAGES[language]} captions, "
            f"expected {NUM_CAPTIONS} each: {lacking[0]} has {nums[lacking[0]]}; the file is torn "
            "or another edition"
        )
