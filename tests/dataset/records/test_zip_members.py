"""If this fails, pictures in a zip are not found by the names that other systems give them, another
one is read in their place, or each worker keeps a list of all members for itself.
"""

import json
import os
import pickle
import random
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from support.tiny_parts import conversation

from dataset.records import index_file, zip_members
from dataset.records.images import ImageZip, open_images
from dataset.records.index_file import index_places, is_mapped
from dataset.records.reader import open_records


class Foreign(zipfile.ZipInfo):
    """A member whose name is in an encoding that nothing tells of, as old programs write it."""

    encoding = "utf-8"

    def _encodeFilenameFlags(self):
        return self.filename.encode(self.encoding), self.flag_bits


def write_zip(path: Path, members: dict[str, bytes], *, encoding: str | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = Foreign(name) if encoding else zipfile.ZipInfo(name)
            if encoding:
                info.encoding = encoding
            archive.writestr(info, content)
    return path


NAMES = ("图片/小狗.jpg", "图片/a.jpg", "plain.jpg", "誠\\許.jpg")


@pytest.mark.parametrize("encoding", [None, "utf-8", "gbk"])
def test_names_are_found_in_the_encoding_of_any_system(encoding, tmp_path):
    members = {name: name.encode() for name in NAMES}
    images = ImageZip(write_zip(tmp_path / "a.zip", members, encoding=encoding))
    for name, content in members.items():
        assert images.read(name) == content
    assert images.read("小狗.jpg") == images.read("图片/小狗.jpg")
    assert images.read("許.jpg") == images.read("誠/許.jpg") == NAMES[3].encode()
    for name in ("大狗.jpg", "图片", "图片/", "jpg", "", "片/小狗.jpg", "\ud800"):
        assert not images.exists(name)


def test_names_in_cp437_with_backslashes_and_of_several_folders(tmp_path):
    members = {"x\\caf\xe9.jpg": b"1", "x/same.jpg": b"2", "y/same.jpg": b"3", "same2.jpg": b"4",
               "z/same2.jpg": b"5", "folder/": b"", "x/only.jpg": b"6"}  # fmt: skip
    images = ImageZip(write_zip(tmp_path / "a.zip", members, encoding="cp437"))
    assert images.read("x/caf\xe9.jpg") == images.read("caf\xe9.jpg") == b"1"
    assert images.read("x/same.jpg") == b"2" and images.read("y/same.jpg") == b"3"
    assert images.read("same2.jpg") == b"4" and images.read("only.jpg") == b"6"
    assert not images.exists("same.jpg") and not images.exists("folder/")
    with pytest.raises(ValueError, match="'same.jpg' is not in .* several folders"):
        images.read("same.jpg")


def test_of_two_members_of_one_name_the_last_counts(tmp_path):
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/a.jpg", b"first")
        archive.writestr("x/a.jpg", b"second")
    assert ImageZip(tmp_path / "a.zip").read("x/a.jpg") == b"second"


@pytest.mark.parametrize("before", [b"", b"#!/bin/sh\n" * 30])
def test_large_zips_and_zips_behind_a_program_are_read(before, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    members = {f"{n}.bin": random.Random(n).randbytes(200) for n in range(5)}
    path = write_zip(tmp_path / "a.zip", members)
    assert b"PK\6\6" in path.read_bytes()
    path.write_bytes(before + path.read_bytes())
    images = ImageZip(path)
    assert {name: images.read(name) for name in members} == members


def test_a_zip_that_is_cut_off_is_named_as_that(tmp_path):
    path = write_zip(tmp_path / "a.zip", {f"{n}.jpg": b"x" * 99 for n in range(9)})
    whole = path.read_bytes()
    for size in range(4, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="a.zip: not a readable zip file .*cut off"):
            open_images(path)
    path.write_bytes(b"no zip at all")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a zip file"):
        open_images(path)


def test_a_damaged_entry_reads_no_other_picture(tmp_path):
    members = {f"{n}.bin": random.Random(n).randbytes(60) for n in range(8)}
    path = write_zip(tmp_path / "a.zip", members)
    whole, dice, num_read = path.read_bytes(), random.Random(3), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[dice.randrange(len(whole))] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            images = ImageZip(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: not a readable zip file (")
            continue
        for name, content in members.items():
            try:
                assert images.read(name) == content
                num_read += 1
            except ValueError as error:
                words = ("cannot be read (", "is not in", "a picture's file may have")
                assert any(word in str(error) for word in words)
    assert num_read > 1000


def test_an_encrypted_member_is_named(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.jpg": b"x"})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.jpg in a.zip cannot be read .it is encrypted, or"):
        ImageZip(path).read("a.jpg")


def test_processes_share_the_list_of_members(tmp_path, monkeypatch):
    monkeypatch.setattr(index_file, "KEPT_FROM_BYTES", 0)
    num = 20_000
    path = write_zip(tmp_path / "a.zip", {f"x/{n:09d}.jpg": b"%d" % n for n in range(num)})
    data = tmp_path / "a.jsonl"
    lines = (conversation("<image>", "x", image=f"x/{n:09d}.jpg") for n in range(0, num, 100))
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    images = ImageZip(path)
    assert index_places(path)[0].stat().st_size < 33 * num
    names = [f"x/{n:09d}.jpg" for n in range(num)]

    def fail(*_):
        raise AssertionError("another process made the list again")

    monkeypatch.setattr(zip_members.ZipMembers, "_make_index", fail)
    sent = pickle.dumps(images)
    assert len(sent) < 500
    tracemalloc.start()
    for other in (ImageZip(path), pickle.loads(sent)):
        assert all(other.read(name) == b"%d" % int(name[2:-4]) for name in names[:: num // 50])
    records = pickle.loads(pickle.dumps(open_records(data, path)))
    assert records.read_image(records[7].images[0]) == b"700"
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert is_mapped(images._members._hashes)
    child = os.fork()
    if not child:  # it must not move the parent's place in the file
        os._exit(not all(images.read(name) for name in names[:500]))
    assert all(images.read(name) == b"%d" % int(name[2:-4]) for name in names[:500])
    assert os.waitpid(child, 0)[1] == 0


def test_another_file_of_the_name_gets_another_list(tmp_path, monkeypatch):
    monkeypatch.setattr(index_file, "KEPT_FROM_BYTES", 0)
    path = write_zip(tmp_path / "a.zip", {"a.jpg": b"first"})
    assert ImageZip(path).read("a.jpg") == b"first"
    write_zip(path, {"b.jpg": b"other", "a.jpg": b"second"})
    os.utime(path, ns=(1, 1))
    assert ImageZip(path).read("a.jpg") == b"second"
