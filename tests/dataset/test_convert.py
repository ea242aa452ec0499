"""If this fails, a layout gives other conversations or pictures than it holds, the result depends
on how it was made, or a hostile source ends in a traceback or reads outside of its folder.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from support.scripts import ROOT, script_environment
from support.smooth import smooth_picture
from support.tiny_parts import conversation, make_records

from dataset import convert
from dataset.records.reader import open_records

TURNS = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A photo."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]


@pytest.fixture
def images(tmp_path):
    """A folder of three JPEGs of 200 x 160, a.jpg to c.jpg."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate("abc"):
        smooth_picture(number).save(folder / f"{name}.jpg")
    return folder


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def converted(*arguments, status=0):
    """Runs the command in this process; the messages and encoded pictures of its records."""
    arguments = [str(a) for a in arguments]
    assert convert.main([*arguments, "--num_processes", "1"]) == status
    return read_back(arguments[arguments.index("--to") + 1])


def read_back(to):
    path = convert.Path(to)
    zipped = path.with_name(f"{path.stem}_images.zip")
    folder = zipped if zipped.exists() else zipped.with_suffix("")
    records = open_records(path, folder if path.suffix == ".jsonl" and folder.exists() else None)
    found = []
    for index in range(len(records)):
        record = records[index]
        found.append((record.messages, [records.read_image(i) for i in record.images]))
    return found


def captioned(prompt, caption, picture):
    messages = conversation(f"<image>\n{prompt}", caption)["conversations"]
    return messages, [picture.read_bytes()]


def test_llava(tmp_path, images, capsys):
    data = write_json(tmp_path / "llava.json", [
        {"id": "1", "image": "a.jpg", "conversations": TURNS},
        {"id": "2", "image": ["b.jpg", "c.jpg"], "conversations": [
            {"from": "human", "value": "<image><image>?"}, TURNS[1]]},
        {"id": "3", "conversations": [{"from": "human", "value": "Hi"}, TURNS[1]]},
        {"messages": conversation("<image>?", "Yes.")["conversations"], "images": ["a.jpg"]},
        {"id": "4", "image": "a.jpg", "conversations": TURNS[2:]},
    ])  # fmt: skip
    found = converted(data, "--images_path", images, "--to", tmp_path / "o.jsonl", status=1)
    text = data.read_text()
    line = text[: text.index('{\n  "id": "4"')].count("\n") + 1
    assert f"llava.json:{line}: 0 <image> tag(s) but 1 image(s)" in capsys.readouterr().out
    contents = {name: (images / f"{name}.jpg").read_bytes() for name in "abc"}
    assert [pictures for _, pictures in found] == [
        [contents["a"]], [contents["b"], contents["c"]], [], [contents["a"]],
    ]  # fmt: skip
    assert [m["content"] for m in found[0][0]] == [turn["value"] for turn in TURNS]
    assert [m["role"] for m in found[0][0]] == ["user", "assistant"] * 2
    with zipfile.ZipFile(tmp_path / "o_images.zip") as archive:
        assert len(archive.namelist()) == 3  # a picture of two records is written once


def test_coco_captions(tmp_path, images):
    data = write_json(tmp_path / "captions.json", {
        "info": {"year": 2014},
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 9, "file_name": "a.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 9, "caption": "One. "},
            {"id": 2, "image_id": 7, "caption": "Two."},
            {"id": 3, "image_id": 8, "caption": "Of no picture."},
        ],
    })  # fmt: skip
    arguments = (data, "--images_path", images, "--to", tmp_path / "o.parquet", "--prompt", "What?")
    assert converted(*arguments, status=1) == [
        captioned("What?", "One.", images / "a.jpg"),
        captioned("What?", "Two.", images / "b.jpg"),
    ]


def test_vqa(tmp_path, images):
    (images / "a.jpg").rename(images / "COCO_val2014_000000000042.jpg")
    questions = write_json(tmp_path / "q.json", {"data_subtype": "val2014", "questions": [
        {"image_id": 42, "question": "How many?", "question_id": 420},
        {"image_id": 42, "question": "Which?", "question_id": 421},
        {"image_id": 43, "question": "Where?", "question_id": 430},
    ]})  # fmt: skip
    answers = write_json(tmp_path / "a.json", {"annotations": [
        {"question_id": 430, "multiple_choice_answer": "here", "answers": []},
        {"question_id": 420, "multiple_choice_answer": "2", "answers": [{"answer": "two"}]},
    ]})  # fmt: skip
    found = converted(
        questions, "--annotations", answers, "--images_path", images, "--to",
        tmp_path / "o.jsonl", "--faults", tmp_path / "f.jsonl", status=1,
    )  # fmt: skip
    assert found == [captioned("How many?", "2", images / "COCO_val2014_000000000042.jpg")]
    faults = [json.loads(line)["kind"] for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert faults == ["no answer", "image that is not there"]


def test_table(tmp_path, images, capsys):
    data = tmp_path / "table.csv"
    text = (
        '\ufeffid,Image,caption\n1,a.jpg,"Two\nlines, and ""quotes"""\n\n2,b.jpg,图\n3,c.jpg\n'
        "4,d.jpg,x\n"
    )
    data.write_text(text, encoding="utf-8")
    found = converted(data, "--images_path", images, "--to", tmp_path / "o.parquet", status=1)
    assert found == [
        captioned(convert.PROMPT, 'Two\nlines, and "quotes"', images / "a.jpg"),
        captioned(convert.PROMPT, "图", images / "b.jpg"),
    ]
    out = capsys.readouterr().out
    assert "table.csv:6: no caption" in out and "table.csv:7: no such image 'd.jpg'" in out


def test_folder_with_text_beside(tmp_path, images):
    (images / "sub").mkdir()
    (images / "b.jpg").rename(images / "sub" / "b.JPG")
    for name, text in (("a.txt", "\ufeffOne.\n"), ("sub/b.txt", "二。")):
        (images / name).write_text(text, encoding="utf-8")
    found = converted(images, "--to", tmp_path / "o.jsonl", "--images", "folder", status=1)
    assert found == [  # c.jpg has no text
        captioned(convert.PROMPT, "One.", images / "a.jpg"),
        captioned(convert.PROMPT, "二。", images / "sub" / "b.JPG"),
    ]


def test_finevision_and_shards(tmp_path, images):
    (tmp_path / "shards").mkdir()
    contents = {name: (images / f"{name}.jpg").read_bytes() for name in "abc"}
    rows = [
        {"images": [contents["a"], contents["b"]], "texts": [("Q1", "A1"), ("Q2", "A2")]},
        {"images": [], "texts": [("Q", "A")]},
        {"images": [contents["c"]], "texts": [("Here: <image>", "A")]},
        {"images": [contents["c"]], "texts": []},
    ]
    for number in (1, 0):
        table = [
            {
                "images": [{"bytes": content, "path": None} for content in row["images"]],
                "texts": [{"user": q, "assistant": a, "source": "s"} for q, a in row["texts"]],
            }
            for row in rows[2 * number : 2 * number + 2]
        ]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(table), tmp_path / "shards" / f"{number}.parquet"
        )
    found = converted(tmp_path / "shards", "--to", tmp_path / "o.jsonl", status=1)
    assert [[m["content"] for m in messages] for messages, _ in found] == [
        ["<image>\n<image>\nQ1", "A1", "Q2", "A2"],
        ["Q", "A"],
        ["Here: <image>", "A"],
    ]
    assert [pictures for _, pictures in found] == [row["images"] for row in rows[:3]]


def test_pictures_are_made_smaller_and_keep_their_look(tmp_path, images):
    smooth_picture(3, size=(90, 60)).save(images / "small.png")
    for path in images.iterdir():
        path.with_suffix(".txt").write_text("A photo.")
    sizes = {}
    for name, flags in (("side", ["--max_side", 100]), ("quality", ["--jpeg_quality", 30])):
        found = converted(images, "--to", tmp_path / f"{name}.parquet", *flags)
        pictures = [Image.open(io.BytesIO(p[0])) for _, p in found]
        sizes[name] = [(picture.format, *picture.size) for picture in pictures]
    assert sizes["side"] == [("JPEG", 100, 80)] * 3 + [("PNG", 90, 60)]
    assert sizes["quality"] == [("JPEG", 200, 160)] * 3 + [("JPEG", 90, 60)]


def test_own_records_there_and_back(tmp_path):
    data, pictures = make_records(tmp_path, multi=True)
    parquet, lines = tmp_path / "o.parquet", tmp_path / "p.jsonl"
    first = converted(data, "--images_path", pictures, "--to", parquet)
    again = converted(parquet, "--to", lines)
    third = converted(
        lines, "--images_path", tmp_path / "p_images.zip", "--to", tmp_path / "q.parquet"
    )
    records = open_records(data, pictures)
    whole = [records[i] for i in range(len(records))]
    expected = [(r.messages, [records.read_image(i) for i in r.images]) for r in whole]
    assert first == again == third == expected
    assert parquet.read_bytes() == (tmp_path / "q.parquet").read_bytes()


def test_hostile_sources_are_faults_and_nothing_outside_is_read(tmp_path, images, capsys):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes((images / "a.jpg").read_bytes())
    (images / "link.jpg").symlink_to(secret)
    os.mkfifo(images / "fifo.jpg")
    Image.new("1", (12_000, 12_000)).save(images / "bomb.png")
    (images / "cut.jpg").write_bytes(secret.read_bytes()[:400])
    names = ["../secret.jpg", str(secret), "link.jpg", "fifo.jpg", "bomb.png", "cut.jpg", "a\0.jpg",
             "x" * 300 + ".jpg", "new\nline.jpg", "sub/../../secret.jpg", "."]  # fmt: skip
    data = write_json(
        tmp_path / "l.json",
        [{"image": name, "conversations": TURNS} for name in names]
        + [{"image": 3, "conversations": TURNS}, {"image": {"a": 1}, "conversations": TURNS}, 5]
        + [{"image": "b.jpg", "conversations": TURNS}],
    )
    with data.open("a") as file:
        file.write(" [[[ and more")
    found = converted(data, "--images_path", images, "--to", tmp_path / "o.jsonl", status=1)
    assert len(found) == 1
    out = capsys.readouterr().out
    assert out.count("leaves the folder of the images") == 4 and "faults: 14" in out
    assert "another fault" not in out and "new\\nline" in out


def test_wrong_use_is_one_line_and_status_2(tmp_path, images, capsys):
    write_json(tmp_path / "o.json", {"a": [1]})
    (tmp_path / "t.csv").write_text("x,y\n1,2\n")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    (tmp_path / "there.jsonl").write_text("mine")
    to = ("--to", tmp_path / "new.jsonl")
    for arguments, message in (
        ((tmp_path / "absent.json", *to), "no file or folder"),
        ((tmp_path / "absent-*.json", *to), "absent-*.json; see SOURCE"),
        ((tmp_path / "o.json", *to), "arrays ['a'] is of no layout"),
        ((tmp_path / "t.csv", *to), "no column 'image' or 'image_path'"),
        ((tmp_path / "cut.parquet", *to), "not a readable Parquet file"),
        ((tmp_path / "o.json", "--layout", "vqa", *to), "no array 'questions'"),
        ((images, "--layout", "llava", *to), "is a folder"),
        ((images, "--to", tmp_path / "there.jsonl"), "is there already"),
        ((images, "--to", tmp_path / "x.txt"), "must end with"),
        ((images, *to, "--max_side", 0), "--max_side must be"),
    ):
        assert convert.main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    assert not list(tmp_path.glob("*new*")) and not list(tmp_path.glob(".*"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A LLaVA file of 600 records of 40 pictures, and what one undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "photos").mkdir()
    for number in range(40):
        smooth_picture(number, size=(60, 40)).save(folder / "photos" / f"{number}.jpg")
    data = write_json(folder / "l.json", [
        {"image": f"{n % 41}.jpg",
         "conversations": [TURNS[0], {"from": "gpt", "value": f"No. {n}."}]}
        for n in range(600)
    ])  # fmt: skip
    arguments = [str(data), "--images_path", str(folder / "photos"), "--max_side", "50"]
    for name in ("whole.jsonl", "whole.parquet"):
        to = ["--to", str(folder / name), "--num_processes", "1"]
        assert convert.main([*arguments, *to]) == 1  # 41.jpg is not there
    return folder, arguments


def start(arguments, *more):
    command = [sys.executable, "-m", "dataset.convert", *arguments, *map(str, more)]
    return subprocess.Popen(
        command, cwd=ROOT, env=script_environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(run):
    out, _ = run.communicate(timeout=300)
    assert run.returncode == 1 and "wrote" in out and "Traceback" not in out, out
    return out


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_kill_and_more_processes_change_no_byte(many, suffix):
    folder, arguments = many
    to = folder / f"killed.{suffix}"
    run = start(arguments, "--to", to, "--num_processes", 2)
    parts = folder / f".{to.name}.parts"
    while not list(parts.glob("*.arrow")):
        assert run.poll() is None or to.exists(), run.communicate()
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    out = finished(start(arguments, "--to", to, "--num_processes", 3))
    assert "going on: " in out or not parts.exists()
    assert to.read_bytes() == (folder / f"whole.{suffix}").read_bytes()
    if suffix == "jsonl":
        zips = [folder / f"{name}_images.zip" for name in ("killed", "whole")]
        assert zips[0].read_bytes() == zips[1].read_bytes()
    assert not [path for path in folder.iterdir() if path.name.startswith(f".{to.name}")]


def test_parts_of_other_settings_are_made_anew(tmp_path):
    data, pictures = make_records(tmp_path)
    to = tmp_path / "changed.parquet"
    parts = tmp_path / f".{to.name}.parts"
    parts.mkdir()
    (parts / "settings.json").write_text("{}")
    (parts / "000000.arrow").write_bytes(b"of another run")
    assert len(converted(data, "--images_path", pictures, "--to", to)) == 24
    assert not parts.exists()


def test_what_is_there_is_kept_whatever_a_killed_run_has_left(tmp_path, capsys):
    data, pictures = make_records(tmp_path)
    to, parts = tmp_path / "mine.jsonl", tmp_path / ".mine.jsonl.parts"
    argv = [str(a) for a in (data, "--images_path", pictures, "--to", to, "--num_processes", 1)]
    parts.mkdir()
    (parts / "settings.json").write_text("{}")
    (parts / "notes.txt").write_text("foreign")
    to.write_text("mine")
    for _ in range(2):  # without and with the mark of another conversion, by its settings
        assert convert.main(argv) == 2
        assert f"{to} is there already" in capsys.readouterr().err and to.read_text() == "mine"
        (parts / "joining").write_text("mine.jsonl\0mine_images.zip")
    to.unlink()
    assert convert.main(argv) == 0
    assert [path.name for path in parts.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("place", ["lines", "images"])
def test_a_run_that_is_stopped_while_it_joins_goes_on(tmp_path, monkeypatch, capsys, place):
    data, pictures = make_records(tmp_path)
    to = tmp_path / "o.jsonl"
    argv = [str(a) for a in (data, "--images_path", pictures, "--to", to, "--num_processes", 1)]

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "remove_parts" if place == "lines" else "json_lines", stopped)
    assert convert.main(argv) == convert.INTERRUPTED and to.exists() == (place == "lines")
    monkeypatch.undo()
    if place == "images":  # it may not go on to another place, where something stands
        (tmp_path / "o_images").mkdir()
        assert convert.main([*argv, "--images", "folder"]) == 2
        assert "o_images is there already" in capsys.readouterr().err
        (tmp_path / "o_images").rmdir()
    assert len(converted(*argv)) == 24 and "going on" in capsys.readouterr().out
    assert not (tmp_path / ".o.jsonl.parts").exists()


def test_what_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch, capsys):
    data, pictures = make_records(tmp_path)
    to = tmp_path / "o.parquet"
    argv = [str(a) for a in (data, "--images_path", pictures, "--to", to, "--num_processes", 1)]
    make = convert.make_parts
    monkeypatch.setattr(convert, "make_parts", lambda *a, **k: [*make(*a, **k), to.touch()][:-1])
    assert convert.main(argv) == 2 and "is there already" in capsys.readouterr().err
    assert not to.read_bytes()
    to.unlink()
    monkeypatch.undo()
    assert len(converted(*argv)) == 24
