"""Owns the public text corpus: the book Dive into Deep Learning as text, one paragraph a line.

The English and the Chinese edition are two GitHub repositories; their archives at fixed commits
are read without unpacking. Each has its own license, which is written beside the text.
"""

import hashlib
import json
import re
import tarfile
from pathlib import Path
from typing import Any

from dataset.fetching.hub import RemoteFile, endpoint, fetch

AUTHORS = "Aston Zhang, Zachary C. Lipton, Mu Li, Alexander J. Smola and contributors"
# The heads of the two repositories when this list was made: 2024-03-16 and 2023-08-18.
EDITIONS = {
    "en": ("d2l-ai/d2l-en", "23d7a5aecceee57d1292c56e90cce307f183bb0a"),
    "zh": ("d2l-ai/d2l-zh", "e6b18ccea71451a55fcd861d7b96fddf2587b09a"),
}
# Characters; a shorter paragraph is a heading, a caption or a remnant.
MIN_LENGTH = {"en": 61, "zh": 21}
SOURCE_FILE = "SOURCE.json"
# The texts that the committed tokenizer was trained on.
TOKENIZER_TEXTS = {
    "en": "7b795b8a393872d9c9bf46a407d3ec9fcbba5a09cd0730d0113a46278e96d160",
    "zh": "a85515ae7eb2d21cfb44e482849611d105525a04fa87b4a6f7a570b94e8f781e",
}

BLOCKS = re.compile(r"^(```|~~~).*?^\1|\$\$.*?\$\$|<!--.*?-->", re.MULTILINE | re.DOTALL)
# Headings, figures, tabs of a framework, links to the forum.
SKIPPED_LINE = re.compile(r"^\s*(#|!\[|:(begin|end)_tab:|%%|\[Discussions?\])")
# Inline formulas with LaTeX in them; a bare `$K$` reads as text.
FORMULA = re.compile(r"\$[^$\n]*[\\{}_^][^$]*\$")
INLINE = (
    (re.compile(r"!\[[^\]]*\]\([^)]*\)"), ""),
    (re.compile(r":[a-z_]+:`[^`]*`"), ""),  # :label:`sec_x`, :numref:`fig_x`, :cite:`Name.Year`
    (re.compile(r"\[([^\[\]]*)\]\([^)]*\)"), r"\1"),
    (re.compile(r"[*`$]"), ""),
    (re.compile(r"\s+"), " "),
)


def paragraphs(markdown: str, *, min_length: int) -> list[str]:
    """The prose of a chapter, a paragraph each, without code, formulas and most markup."""
    found = []
    for block in re.split(r"\n\s*\n", BLOCKS.sub("\n\n", markdown.replace("\r\n", "\n"))):
        text = "\n".join(x for x in block.splitlines() if not SKIPPED_LINE.match(x))
        if FORMULA.search(text):
            continue
        for pattern, replacement in INLINE:
            text = pattern.sub(replacement, text)
        text = text.strip()
        if len(text) >= min_length:
            found.append(text)
    return found


def read_archive(archive: Path, *, commit: str, min_length: int) -> tuple[list[str], str]:
    """All paragraphs of a repository's archive, in the order of its paths, and its license.

    Args:
        min_length: of a paragraph, in characters.

    Raises:
        ValueError: not an archive, of another commit, or without text or license.
    """
    chapters, license_text = {}, ""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = member.name.partition("/")[2]
                is_text = name.endswith(".md") and not name.endswith("_origin.md")
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None and is_text:
                    chapters[name] = file.read().decode("utf-8")
                elif file is not None and name == "LICENSE":
                    license_text = file.read().decode("utf-8")
            found_commit = tar.pax_headers.get("comment")  # `git archive` writes it there
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{archive} is not a readable archive ({error}); try again") from error
    if found_commit != commit:
        raise ValueError(f"{archive.name} holds commit {found_commit}, expected {commit}")
    lines = [
        line
        for name in sorted(chapters)
        for line in paragraphs(chapters[name], min_length=min_length)
    ]
    if not lines or not license_text:
        raise ValueError(
            f"{archive.name} holds {len(lines)} paragraphs in {len(chapters)} Markdown files and "
            f"{'a' if license_text else 'no'} license; it is not the book"
        )
    return lines, license_text


def archives() -> dict[str, RemoteFile]:
    """The archive of each edition; GitHub declares neither its size nor its checksum."""
    return {
        language: RemoteFile(f"{endpoint('github')}/{repo}/archive/{commit}.tar.gz", repo)
        for language, (repo, commit) in EDITIONS.items()
    }


def is_there(folder: Path) -> bool:
    """Whether a folder holds the corpus of exactly these editions."""
    try:
        source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        return all(
            source[language]["commit"] == commit
            and source[language]["sha256"] == _sha256(folder / f"{language}.txt")
            for language, (_, commit) in EDITIONS.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fetch_corpus(folder: Path) -> None:
    """Fetch both editions and write `en.txt`, `zh.txt`, their licenses and `SOURCE.json`.

    Raises:
        OSError, ValueError: as `fetch` and `read_archive`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source: dict[str, Any] = {"authors": AUTHORS}
    for language, remote in archives().items():
        repo, commit = EDITIONS[language]
        archive = folder / f".{language}.tar.gz"
        fetch(remote, archive)
        try:
            lines, license_text = read_archive(
                archive, commit=commit, min_length=MIN_LENGTH[language]
            )
        finally:
            archive.unlink()
        text = folder / f"{language}.txt"
        _write(text, "\n".join(lines) + "\n")
        _write(folder / f"LICENSE.{language}", license_text)
        source[language] = {"repository": repo, "commit": commit, "sha256": _sha256(text)}
    _write(folder / SOURCE_FILE, json.dumps(source, indent=1, ensure_ascii=False) + "\n")


def compare_with_tokenizer(folder: Path) -> str:
    """A sentence that says whether the committed tokenizer was trained on this corpus."""
    differing = [
        f"{language}.txt"
        for language, sha256 in TOKENIZER_TEXTS.items()
        if _sha256(folder / f"{language}.txt") != sha256
    ]
    if not differing:
        return "this is, to the byte, the text that the committed tokenizer was trained on"
    return (
        f"{', '.join(differing)}: the same book, but not to the byte the text that the committed "
        "tokenizer was trained on; one made of it has almost the same tokens, with other ids, and "
        "is another tokenizer: it needs weights of its own"
    )


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
