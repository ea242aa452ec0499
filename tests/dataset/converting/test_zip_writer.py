"""If this fails, other programs cannot read the zips that conversion writes, or writing them takes
more memory the more pictures there are.
"""

import io
import random
import tracemalloc
import zipfile

import pytest

from dataset.converting import zip_writer
from dataset.converting.zip_writer import ZipWriter
from dataset.records.images import ImageZip


@pytest.mark.parametrize("is_large", [False, True])
def test_zipfile_and_our_reader_find_the_members(is_large, tmp_path, monkeypatch):
    if is_large:  # as if the members were over 65,535
        monkeypatch.setattr(zip_writer, "FULL_16", 3)
    num = 27
    members = {f"{n}图.jpg" if n % 2 else f"{n}.jpg": b"%d" % n for n in range(num)}
    path = tmp_path / "a.zip"
    with open(path, "wb") as file, ZipWriter(file) as archive:
        for name, content in members.items():
            archive.add(name, content)
    with zipfile.ZipFile(path) as read:
        assert read.testzip() is None
        assert read.namelist() == list(members)
        assert all(read.read(name) == members[name] for name in list(members)[:50])
    images = ImageZip(path)
    assert all(images.read(name) == members[name] for name in list(members)[:: num // 9])


def test_places_beyond_four_gigabytes(tmp_path):
    class Far(io.BytesIO):
        """A file in which so much stands before that places take 64 bits."""

    file = Far()
    with ZipWriter(file) as archive:
        archive.add("a.jpg", b"near")
        archive._place += 5 << 30
        archive.add("b.jpg", b"far")
    path = tmp_path / "a.zip"
    content = file.getvalue()
    with open(path, "wb") as sparse:  # the hole is where the place jumped
        at = content.index(b"PK\3\4", 4)
        sparse.write(content[:at])
        sparse.seek(5 << 30, 1)
        sparse.write(content[at:])
    with zipfile.ZipFile(path) as read:
        assert read.read("a.jpg") == b"near" and read.read("b.jpg") == b"far"
    assert ImageZip(path).read("b.jpg") == b"far"
    path.unlink()


def test_memory_does_not_grow_with_the_members():
    class Nowhere(io.RawIOBase):
        def write(self, data) -> int:
            return len(data)

    tracemalloc.start()
    with ZipWriter(Nowhere()) as archive:
        for n in range(3000):
            archive.add(f"{random.Random(n).random()}.jpg", b"x" * 100)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
