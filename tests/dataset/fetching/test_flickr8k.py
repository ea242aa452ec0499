"""If this fails, the photos and captions of Flickr8k are fetched without their terms, twice, in
part or in one language only, or a file of the user's is lost.
"""

import io
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import pytest
from PIL import Image
from support.fake_hub import DATA, error_of, files_below, run
from support.flickr_files import (
    CHINESE,
    PHOTOS,
    TEXTS,
    TRAIN,
    VAL,
    chinese_file,
    kept,
    photo_zip,
    picture,
    publish,
    records,
    text_zip,
)
from support.scripts import ROOT, run_script, script_environment

from dataset import download
from dataset.fetching import disk, flickr8k, flickr_captions, flickr_records
from dataset.fetching import hub as network

FOLDER, PUBLISHED = flickr8k.FOLDER, flickr8k.PUBLISHED_FOLDER
FILES = ["SOURCE.json", "TERMS.txt", "train/data.jsonl", "train/images.zip", "val/data.jsonl",
         "val/images.zip"]  # fmt: skip


def test_published_files_become_records(flickr, tmp_path, capfd):
    assert run(tmp_path, "flickr8k") == 0
    assert files_below(tmp_path / FOLDER) == FILES
    assert kept(tmp_path) == sorted([TEXTS, CHINESE, PHOTOS])
    for split, names in (("train", TRAIN), ("val", VAL)):
        found = records(tmp_path, split)
        assert [r["image"] for r in found] == [n for n in names for _ in range(10)]
        answers = [r["conversations"][1]["content"] for r in found[:10]]
        number = names[0].split("_")[0]
        assert answers[:5] == [f"A thing {number} of kind {i}." for i in range(5)]
        assert answers[5:] == [f"第{i}种东西{number}。" for i in range(5)]
        for record in found:
            question = record["conversations"][0]["content"]
            bare = question.replace("<image>\n", "").replace("\n<image>", "")
            language = "en" if record["conversations"][1]["content"].endswith(".") else "zh"
            assert bare in flickr_records.QUESTIONS[language]
        with zipfile.ZipFile(tmp_path / FOLDER / split / "images.zip") as archive:
            assert archive.namelist() == names
            for name in names:
                image = Image.open(io.BytesIO(archive.read(name)))
                assert (image.size, image.mode, image.format) == ((224, 224), "RGB", "JPEG")
    out = capfd.readouterr().out
    assert "3 photos to train on and 2 to validate with" in out
    assert f"{tmp_path / PUBLISHED}" in out and "can be deleted" in out
    assert (tmp_path / FOLDER / "TERMS.txt").read_text(encoding="utf-8").startswith("Flickr8k:")


def test_second_run_asks_for_nothing_and_needs_no_published_file(flickr, tmp_path, capfd):
    assert run(tmp_path, "flickr8k") == 0
    before = (tmp_path / FOLDER / "SOURCE.json").read_bytes()
    shutil.rmtree(tmp_path / PUBLISHED)
    flickr.requests.clear()
    capfd.readouterr()
    assert run(tmp_path, "flickr8k") == 0 and not flickr.requests
    assert (tmp_path / FOLDER / "SOURCE.json").read_bytes() == before
    assert f"there      98.0 MB  {FOLDER}" in capfd.readouterr().out


def test_two_runs_make_the_same_bytes(flickr, tmp_path):
    for name in ("one", "two"):
        assert run(tmp_path / name, "flickr8k") == 0
    for file in FILES:
        one, two = ((tmp_path / name / FOLDER / file).read_bytes() for name in ("one", "two"))
        assert one == two, file


def test_terms_are_said_before_anything_is_asked_for(flickr, tmp_path, capfd, monkeypatch):
    """Before the listing of another asset's hub too."""
    said = []
    session = network.get_session

    def asked():
        said.append(capfd.readouterr().out)
        return session()

    monkeypatch.setattr(network, "get_session", asked)
    assert run(tmp_path, "pretrain", "flickr8k") == 0
    for words in ("non-commercial research and education only", "not to be redistributed",
                  "JAIR 47", "ICMR 2016", "仅限非商业"):  # fmt: skip
        assert words in said[0]
    assert DATA in flickr.requests[0][0], "the hub was asked first"


def test_dry_run_says_terms_and_sizes_and_fetches_nothing(flickr, tmp_path, capfd):
    root = tmp_path / "new"
    assert download.main(["flickr8k", "--dry_run", "--to", str(root)]) == 0
    assert not root.exists() and not flickr.requests
    out = capfd.readouterr().out
    assert out.startswith("Flickr8k:")
    sizes = [disk.readable(file.num_bytes) for file in flickr8k.FILES]
    for name, size in zip((TEXTS, CHINESE, PHOTOS), sizes, strict=True):
        assert f"fetch{size:>13}  {PUBLISHED}/{name}" in out
    total = disk.readable(sum(file.num_bytes for file in flickr8k.FILES))
    assert f"{total} to fetch" in out
    assert "checked by md5" in out and "no checksum is published" in out


def test_without_a_terminal_it_does_not_start(flickr, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert download.main(["flickr8k", "--to", str(tmp_path)]) == 1
    assert "--yes" in capfd.readouterr().err
    assert not files_below(tmp_path) and not flickr.requests


def test_too_small_disk_is_refused_before_anything_is_fetched(flickr, tmp_path, capfd, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    needed = sum(file.num_bytes for file in flickr8k.FILES) + flickr8k.ROOM_BYTES
    for short, status in ((1, 1), (0, 0)):
        free = disk.DISK_MARGIN_BYTES + needed - short
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _, f=free: usage._replace(free=f))
        assert run(tmp_path, "flickr8k") == status
        assert bool(files_below(tmp_path)) == (status == 0)
    assert "not enough space on the disk" in capfd.readouterr().err


def test_killed_run_goes_on_with_the_rest_only(flickr, tmp_path, monkeypatch):
    """The real process: the terms stand on its output before the photos come."""
    photos = photo_zip(a=picture((900, 700)))
    publish(flickr, monkeypatch, Dataset=photos)
    flickr.stalls[PHOTOS] = len(photos) // 2
    small = {"LISTS": dict(flickr_captions.LISTS), "FILES": flickr8k.FILES}
    code = (
        "import sys\n"
        "from dataset import download\n"
        "from dataset.fetching import flickr8k, flickr_captions\n"
        "from dataset.fetching.flickr8k import Published\n"
        f"flickr_captions.LISTS = {small['LISTS']!r}\n"
        f"flickr8k.FILES = {small['FILES']!r}\n"
        "sys.exit(download.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "flickr8k", "--yes", "--to", str(tmp_path)]
    env = script_environment() | flickr.environment(tmp_path / "home")
    log = tmp_path / "log"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=file)
    deadline = time.monotonic() + 60
    folder = tmp_path / PUBLISHED
    while not [p for p in folder.glob(f".{PHOTOS}.*.part") if p.stat().st_size]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    assert "non-commercial" in log.read_text(encoding="utf-8").splitlines()[0]
    process.kill()
    process.wait()
    flickr.release.set()
    assert not (tmp_path / FOLDER).exists()
    [part] = folder.glob(f".{PHOTOS}.*.part")
    received = part.stat().st_size
    flickr.requests.clear()
    assert run(tmp_path, "flickr8k") == 0
    assert flickr.ranges(PHOTOS) == [f"bytes={received}-"]
    assert not flickr.ranges(TEXTS) and not flickr.ranges(CHINESE)
    assert files_below(tmp_path / FOLDER) == FILES and not part.exists()


def test_what_a_killed_run_left_half_made_is_cleared(flickr, tmp_path):
    left = tmp_path / "dataset/.flickr8k.part/new/train"
    left.mkdir(parents=True)
    (left / "images.zip").write_bytes(b"half")
    assert run(tmp_path, "flickr8k") == 0
    assert files_below(tmp_path / FOLDER) == FILES and not left.exists()


def test_interrupt_while_records_are_made_leaves_no_folder(flickr, tmp_path, monkeypatch, capfd):
    def interrupted(data):
        raise KeyboardInterrupt

    monkeypatch.setattr(flickr_records, "shrink", interrupted)
    assert run(tmp_path, "flickr8k") == download.INTERRUPTED
    assert "goes on from here" in capfd.readouterr().err
    assert [p.name for p in (tmp_path / "dataset").iterdir()] == ["flickr8k_published"]
    monkeypatch.undo()


@pytest.mark.parametrize("name", [TEXTS, PHOTOS])
def test_wrong_checksum_leaves_nothing_of_the_file(name, flickr, tmp_path, capfd):
    flickr.corrupt.add(name)
    error = error_of(capfd, tmp_path, "flickr8k")
    assert "came with the wrong md5" in error and name in error and "--flickr8k_files" in error
    assert "--hub" not in error, "it comes from no hub"
    assert name not in kept(tmp_path) and not (tmp_path / FOLDER).exists()
    flickr.corrupt.clear()
    assert run(tmp_path, "flickr8k") == 0


@pytest.mark.parametrize("more", [-1, 1])
def test_file_of_another_size_is_refused_before_it_is_fetched(
    more, flickr, tmp_path, capfd, monkeypatch
):
    """The size is pinned, so the server may have another."""
    *others, photos = flickr8k.FILES
    other = replace(photos, num_bytes=photos.num_bytes + more)
    monkeypatch.setattr(flickr8k, "FILES", (*others, other))
    error = error_of(capfd, tmp_path, "flickr8k")
    assert f"has {photos.num_bytes} bytes, expected {other.num_bytes}" in error
    assert flickr.ranges(PHOTOS) == [None] and kept(tmp_path) == sorted([TEXTS, CHINESE])


def test_chinese_captions_that_cannot_be_had_are_an_error(flickr, tmp_path, capfd):
    flickr.vanished.add(CHINESE)
    error = error_of(capfd, tmp_path, "flickr8k")
    place = tmp_path / PUBLISHED
    for words in ("HTTP 404", "no set is made without the Chinese captions",
                  "github.com/li-xirong/flickr8kcn", f"put it into {place}"):  # fmt: skip
        assert words in error
    assert not (tmp_path / FOLDER).exists()
    assert not flickr.ranges(PHOTOS), "a gigabyte is not fetched in vain"
    (place / CHINESE).write_bytes(chinese_file())
    assert run(tmp_path, "flickr8k") == 0
    assert files_below(tmp_path / FOLDER) == FILES


@pytest.fixture
def own(tmp_path):
    """A folder of the user's with the published files."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / TEXTS).write_bytes(text_zip())
    (folder / CHINESE).write_bytes(chinese_file())
    (folder / PHOTOS).write_bytes(photo_zip())
    return folder


def test_files_of_the_user_are_taken_and_nothing_is_fetched(own, flickr, tmp_path, capfd):
    before = {p.name: p.read_bytes() for p in own.iterdir()}
    root = tmp_path / "root"
    assert run(root, "flickr8k", "--flickr8k_files", str(own)) == 0
    assert not flickr.requests and files_below(root) == [f"{FOLDER}/{name}" for name in FILES]
    assert {p.name: p.read_bytes() for p in own.iterdir()} == before
    out = capfd.readouterr().out
    assert "0 B to fetch" in out and str(own / PHOTOS) in out and "can be deleted" not in out


def test_what_the_folder_of_the_user_lacks_is_fetched_beside_it(own, flickr, tmp_path):
    (own / CHINESE).unlink()
    root = tmp_path / "root"
    assert run(root, "flickr8k", "--flickr8k_files", str(own)) == 0
    assert kept(root) == [CHINESE] and CHINESE not in files_below(own)


def test_folder_without_any_published_file_is_named(flickr, tmp_path, capfd):
    empty = tmp_path / "empty"
    error = error_of(capfd, tmp_path, "flickr8k", "--flickr8k_files", str(empty))
    assert f"--flickr8k_files {empty} is no folder" in error
    empty.mkdir()
    (empty / "archive.zip").write_bytes(b"")
    error = error_of(capfd, tmp_path, "flickr8k", "--flickr8k_files", str(empty))
    assert PHOTOS in error and "archive.zip" in error and not flickr.requests


def test_flag_of_flickr8k_without_it_is_refused(flickr, tmp_path, capfd):
    error = error_of(capfd, tmp_path, "pretrain", "--flickr8k_files", str(tmp_path))
    assert "--flickr8k_files belongs to flickr8k" in error and not flickr.requests


def test_other_edition_of_the_user_is_noted_and_taken(own, flickr, tmp_path, capfd):
    other = photo_zip(a=picture((300, 200), "green"))
    (own / PHOTOS).write_bytes(other)
    root = tmp_path / "root"
    assert run(root, "flickr8k", "--flickr8k_files", str(own)) == 0
    assert f"note: {own / PHOTOS} is not the published file" in capfd.readouterr().out


@pytest.mark.parametrize("name", [TEXTS, PHOTOS])
def test_torn_zip_of_the_user_is_one_line(name, own, flickr, tmp_path, capfd):
    torn = (own / name).read_bytes()[:-40]
    (own / name).write_bytes(torn)
    error = error_of(capfd, tmp_path / "root", "flickr8k", "--flickr8k_files", str(own))
    assert f"{own / name} is not a readable zip" in error and "move it away" in error
    assert (own / name).read_bytes() == torn and not files_below(tmp_path / "root")


def test_folder_of_the_user_is_replaced_by_force_alone(flickr, tmp_path, capfd):
    folder = tmp_path / FOLDER
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    error = error_of(capfd, tmp_path, "flickr8k")
    assert str(folder) in error and "--force" in error
    assert files_below(tmp_path) == [f"{FOLDER}/mine.txt"] and not flickr.requests
    assert run(tmp_path, "flickr8k", "--force") == 0
    assert files_below(folder) == FILES
    (folder / "val/images.zip").write_bytes(b"torn")
    assert "--force" in error_of(capfd, tmp_path, "flickr8k")


def test_script_says_one_line_where_the_files_are_gone(flickr, tmp_path):
    """The real process, with the real addresses and pins."""
    flickr.files.clear()
    env = flickr.environment(tmp_path / "home")
    words = ("dataset/download.py", "flickr8k", "--yes", "--to", tmp_path)
    process = run_script(*words, check=False, env=env, cold=True)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: ") and "HTTP 404" in process.stderr
    assert process.stdout.startswith("Flickr8k:") and "1.1 GB" in process.stdout
    asked = "/jbrownlee/Datasets/releases/download/Flickr8k/Flickr8k_text.zip"
    assert flickr.requests[0][0] == asked


def test_folders_are_not_committed():
    for folder in (FOLDER, PUBLISHED):
        command = ["git", "check-ignore", "-q", f"{folder}/x.zip"]
        assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_it_is_an_asset_like_others_but_of_no_hub(tmp_path, capfd):
    assert "flickr8k" in download.list_assets()
    error = error_of(capfd, tmp_path, "flickr8k", "--revision", "main")
    assert "name exactly one asset of a hub" in error
    assert "did you mean flickr8k?" in error_of(capfd, tmp_path, "flicker8k")
