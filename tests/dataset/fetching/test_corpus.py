"""If this fails, the tokenizer's training text cannot be fetched, or is not the text that the
shipped tokenizer was trained on.
"""

import gzip
import hashlib
import io
import tarfile

import pytest
from support.fake_hub import error_of, files_below, run

from dataset import download
from dataset.fetching import corpus as book

ENGLISH = """# A Title
:label:`sec_x`

As we saw in :numref:`sec_y`, a *deep* network, written `net`, has **many** layers
which [learn](https://example.org) features $K$ times over :cite:`Name.2020`.

```python
print("code is no prose, however long the line of code in the block may be")
```

A formula in a sentence such as $\\frac{a}{b}$ leaves a hole, so the whole paragraph goes away.

![A figure caption that is long enough to pass for a paragraph of prose text](../img/x.svg)

Too short.

:begin_tab:`mxnet`
[Discussions](https://discuss.example.org/t/1 "a long enough line about where to discuss it")
:end_tab:
"""
CHINESE = "# 标题\n\n在深度学习中，我们常常使用*小批量*随机梯度下降来训练模型，\n它很有效。\n"


def make_archive(commit: str, texts: dict[str, str]) -> bytes:
    """As `git archive` writes it: one top folder, the commit as a global comment."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": commit}
    ) as tar:
        for name, text in texts.items():
            member = tarfile.TarInfo(f"book-{commit}/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return gzip.compress(buffer.getvalue(), mtime=0)


@pytest.fixture
def library(hub):
    """A hub with both editions of the book."""
    for language, text in (("en", ENGLISH), ("zh", CHINESE)):
        repo, commit = book.EDITIONS[language]
        texts = {
            "LICENSE": f"license of {language}",
            "b/index.md": text,
            "a/x_origin.md": "English " * 40,
            "code.py": "x = 1\n" * 40,
        }
        hub.files[repo][f"{commit}.tar.gz"] = make_archive(commit, texts)
    return hub


def test_corpus_is_a_paragraph_a_line(library, tmp_path, capfd):
    assert run(tmp_path, "corpus") == 0
    folder = tmp_path / "dataset/corpus"
    assert files_below(folder) == ["LICENSE.en", "LICENSE.zh", "SOURCE.json", "en.txt", "zh.txt"]
    assert (folder / "en.txt").read_text(encoding="utf-8") == (
        "As we saw in , a deep network, written net, has many layers which learn features K times "
        "over .\n"
    )
    assert (folder / "zh.txt").read_text(encoding="utf-8") == (
        "在深度学习中，我们常常使用小批量随机梯度下降来训练模型， 它很有效。\n"
    )
    assert "en.txt, zh.txt: the same book, but not" in capfd.readouterr().out
    assert (folder / "LICENSE.zh").read_text() == "license of zh"
    assert book.EDITIONS["zh"][1] in (folder / "SOURCE.json").read_text()
    library.requests.clear()
    assert run(tmp_path, "corpus") == 0 and not library.requests
    (folder / "zh.txt").write_text("changed")
    assert run(tmp_path, "corpus") == 0 and len(library.requests) == 2


def test_text_of_the_committed_tokenizer_is_known(shared, library, tmp_path, monkeypatch, capfd):
    corpus = shared / "data" / "corpus"
    for language, sha256 in book.TOKENIZER_TEXTS.items():
        text = (corpus / f"{language}.txt").read_bytes()
        assert hashlib.sha256(text).hexdigest() == sha256
        shortest = min(text.decode().rstrip("\n").split("\n"), key=len)
        assert len(shortest) == book.MIN_LENGTH[language]
    monkeypatch.setattr(download, "CORPUS_DIR", corpus)
    monkeypatch.setattr(book, "is_there", lambda folder: folder == corpus)
    assert run(tmp_path, "corpus") == 0
    assert "to the byte, the text that the committed tokenizer" in capfd.readouterr().out


def test_corpus_of_a_cut_connection_is_fetched_again(library, tmp_path):
    _, commit = book.EDITIONS["en"]
    library.cuts[f"{commit}.tar.gz"] = [100]
    assert run(tmp_path, "corpus") == 0
    assert len(library.requests) == 3, "one more for the answer that broke off"


def test_corpus_of_another_commit_is_refused(library, tmp_path, capfd):
    repo, commit = book.EDITIONS["en"]
    library.files[repo][f"{commit}.tar.gz"] = make_archive("d" * 40, {"a.md": ENGLISH})
    assert f"holds commit {'d' * 40}, expected {commit}" in error_of(capfd, tmp_path, "corpus")
    assert not files_below(tmp_path)


def test_corpus_that_is_no_archive_is_refused(library, tmp_path, capfd):
    repo, commit = book.EDITIONS["en"]
    library.files[repo][f"{commit}.tar.gz"] = b"<html>maintenance</html>"
    assert "is not a readable archive" in error_of(capfd, tmp_path, "corpus")
    assert not files_below(tmp_path)


def test_corpus_without_license_is_refused(library, tmp_path, capfd):
    repo, commit = book.EDITIONS["en"]
    library.files[repo][f"{commit}.tar.gz"] = make_archive(commit, {"a.md": ENGLISH})
    assert "1 paragraphs in 1 Markdown files and no license" in error_of(capfd, tmp_path, "corpus")
