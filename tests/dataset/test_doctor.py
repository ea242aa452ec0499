"""If this fails, the doctor counts other tokens, pictures or repetitions than a data set holds,
misses a fault or names it at another line, or lets records of a held-out set pass.
"""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from support.smooth import smooth_picture
from support.tiny_parts import conversation, make_records

from dataset import doctor
from dataset.examining.examine import Examiner
from dataset.examining.sources import Sources
from dataset.lm_dataset import IGNORE_INDEX, VLMDataset
from dataset.records.reader import open_records
from model.vision_tower import load_image_processor, load_vision_config
from model.vlm_processor import VLMProcessor, load_tokenizer
from model.weights.build_model import placeholder_config


@pytest.fixture
def diagnose(assets, capsys):
    """Runs the doctor; returns its exit status, its standard output and its error output."""

    def run(*arguments) -> tuple[int, str, str]:
        own = ["--tokenizer_path", assets / "tokenizer", "--vision_model_path", assets / "tower"]
        status = doctor.main([str(a) for a in (*arguments, *own, "--num_workers", 0)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def processor(assets):
    tokenizer, tower = load_tokenizer(assets / "tokenizer"), assets / "tower"
    images = load_image_processor(tower, load_vision_config(tower))
    return VLMProcessor(tokenizer, images, config=placeholder_config({}, tokenizer, tower))


def write_lines(path, lines):
    texts = (one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in lines)
    path.write_bytes(b"".join(text.encode("utf-8", "surrogateescape") + b"\n" for text in texts))
    return path


def faults_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_figures_are_those_of_the_samples(tmp_path, diagnose, processor):
    data, images = make_records(tmp_path, multi=True)
    whole = list(VLMDataset(data, images, processor, max_length=10_000))
    lengths = [len(sample.input_ids) for sample in whole]
    limit = sorted(lengths)[18]
    kept = list(VLMDataset(data, images, processor, max_length=limit))
    status, out, _ = diagnose(
        data, "--images_path", images, "--json", tmp_path / "f.json", "--max_seq_len", limit,
        "--batch_size", 5,
    )  # fmt: skip
    assert status == 0 and "faults: none" in out
    figures = json.loads((tmp_path / "f.json").read_text())
    supervised = [int((sample.labels[1:] != IGNORE_INDEX).sum()) for sample in kept]
    num_images = [len(sample.pixel_values) for sample in whole]
    tokens, epoch = figures["tokens"], figures["epoch"]
    assert figures["records"] == figures["turns"] == 24 and figures["languages"] == {"en": 24}
    assert tokens["num_cut"] == sum(length > limit for length in lengths) > 0
    assert tokens["percentiles"]["p0"] == min(lengths)
    assert tokens["percentiles"]["p100"] == max(lengths)
    assert sum(bar[2] for bar in tokens["histogram"]) == 24
    assert tokens["lost_by_cuts"] == sum(lengths) - epoch["tokens"]
    assert epoch["tokens"] == sum(len(sample.input_ids) for sample in kept)
    assert epoch["supervised_tokens"] == sum(supervised)
    assert epoch["image_tokens"] == sum(int(sample.image_mask.sum()) for sample in kept)
    assert epoch["steps"] == 5 and epoch["padded_tokens"] > epoch["tokens"]
    assert figures["images"]["of_a_record"] == {
        str(n): num_images.count(n) for n in sorted(set(num_images))
    }
    assert figures["images"]["most_frequent_sizes"] == [[40, 32, sum(num_images)]]
    assert figures["images"]["distinct"] == 4  # plain pictures of four colours, none like another
    assert figures["images"]["near_duplicates"] == 0


def test_every_fault_has_its_kind_and_line(tmp_path, diagnose):
    _, images = make_records(tmp_path)
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "secret.png").write_bytes((images / "0_0.png").read_bytes())
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    turns = conversation("<image> What?", "A circle.")["conversations"]
    data = write_lines(tmp_path / "d.jsonl", [
        conversation("<image> What?", "A circle.", image="0_0.png"),
        "{not json",
        "[1]",
        '{"conversations": "\udcff\udcfe"}',
        "",
        conversation("<image> What?", "A circle.", image="absent.png"),
        conversation("<image> What?", "A circle.", image="../secret.png"),
        conversation("<image> What?", "A circle.", image="link.png"),
        conversation("<image> What?", "A circle.", image="broken.png"),
        conversation("<image> <image> What?", "A circle.", image="0_0.png"),
        conversation("What?", "A circle. <image>", image="0_0.png"),
        {"conversations": turns[:1], "image": "0_0.png"},
        {"conversations": [{"role": "robot", "content": "x"}]},
        {"conversations": [{"role": "user", "content": 3}]},
        conversation("What?", "A <|im_end|> circle."),
        conversation("word " * 400, "A circle."),
        conversation("What?", "A circle.", pictures=["0_0.png"]),
    ])  # fmt: skip
    status, out, _ = diagnose(
        data, "--images_path", images, "--faults", tmp_path / "faults.jsonl", "--max_seq_len", 200
    )
    assert status == 1
    found = [
        (f["where"].rsplit(":", 1)[1], f["kind"]) for f in faults_in(tmp_path / "faults.jsonl")
    ]
    assert found == [
        ("2", "not JSON"),
        ("3", "not JSON"),
        ("4", "not UTF-8"),
        ("6", "image that is not there"),
        ("7", "image name that leaves its folder"),
        ("8", "image name that leaves its folder"),
        ("9", "broken picture"),
        ("10", "tags and images differ in number"),
        ("11", "image tag outside a question"),
        ("12", "no answer"),
        ("13", "wrong role"),
        ("14", "no text in a message"),
        ("15", "special token in a text"),
        ("16", "cut before its answer"),
        ("17", "pictures where they are not read"),
    ]
    assert f"{data}:2: not valid JSON" in out and "with faults 15" in out
    assert "blank lines, without a record: 1" in out


def test_picture_bombs_are_named_without_being_decoded(tmp_path, diagnose):
    (tmp_path / "images").mkdir()
    Image.new("1", (3000, 3000)).save(tmp_path / "images" / "large.png")
    data = write_lines(tmp_path / "d.jsonl", [conversation("<image>?", "No.", image="large.png")])
    images = tmp_path / "images"
    assert diagnose(data, "--images_path", images)[0] == 0
    status, out, _ = diagnose(
        data, "--images_path", images, "--max_pixels", 1_000_000, "--html", tmp_path / "r.html"
    )
    assert status == 1 and "picture too large: 1" in out and "3000x3000" in out
    assert "usable 0" in out  # a set without a usable record has a report too


@pytest.mark.parametrize("is_zipped", [False, True])
def test_files_over_the_byte_limits_have_kinds_of_their_own(
    is_zipped, tmp_path, diagnose, monkeypatch
):
    data, images = make_records(tmp_path, num_records=1)
    with data.open("a") as file:
        file.write(json.dumps(conversation("word " * 999, "A circle.")) + "\n")
    if is_zipped:
        images = shutil.make_archive(str(images), "zip", images)
    monkeypatch.setattr("dataset.records.images.MAX_IMAGE_BYTES", 10)
    monkeypatch.setattr("dataset.records.jsonl.LONGEST_BYTES", 1000)
    _, out, _ = diagnose(data, "--images_path", images)
    assert "picture too large: 1" in out and "record too large: 1" in out


def test_file_that_cannot_be_read_is_a_fault_and_others_go_on(tmp_path, diagnose):
    data, images = make_records(tmp_path)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    status, out, _ = diagnose(
        tmp_path / "cut.parquet", data, tmp_path / "empty.jsonl", "--images_path", images
    )
    assert status == 1 and "file that cannot be read: 2" in out and "usable 24" in out
    assert f"{tmp_path / 'cut.parquet'}: not a readable Parquet file" in out


def test_repetition_is_counted(tmp_path, diagnose):
    images = tmp_path / "images"
    images.mkdir()
    photo = smooth_picture(1)
    photo.save(images / "a.png")
    photo.resize((100, 100)).save(images / "b.jpg", quality=60)
    smooth_picture(2).save(images / "c.png")
    long = "A brown dog runs over the green grass behind a yellow ball near the old house"
    data = write_lines(tmp_path / "d.jsonl", [
        conversation("<image>?", f"{long}.", image="a.png"),
        conversation("<image>?", f"{long} today.", image="b.jpg"),
        conversation("<image>?", "Two men in hats play the violin.", image="c.png"),
        conversation("<image>?", "Two men in hats, play the VIOLIN", image="c.png"),
    ])  # fmt: skip
    diagnose(data, "--images_path", images, "--json", tmp_path / "f.json")
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["images"]["distinct"] == 3 and figures["images"]["near_duplicate_groups"] == 1
    assert figures["images"]["near_pairs"] == [[0, 1]]
    assert figures["answers"]["distinct"] == 3 and figures["answers"]["repeated"] == 1
    assert sorted(figures["answers"]["near_pairs"][0]) == [0, 1]
    assert figures["repeated_records"] == 1


def test_records_of_the_held_out_set_are_faults_and_are_not_written(tmp_path, diagnose):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    for seed in range(6):
        smooth_picture(seed).save(tmp_path / "train" / f"{seed}.png")
    smooth_picture(0).save(tmp_path / "val" / "x.png")
    smooth_picture(1).resize((90, 90)).save(tmp_path / "val" / "y.jpg", quality=70)
    train = write_lines(tmp_path / "train.jsonl", [
        *(conversation("<image>?", f"Answer {n}.", image=f"{n}.png") for n in range(6)),
        conversation("What is a circle?", "Round."),
        conversation("What is a square?", "Round."),
    ])  # fmt: skip
    val = write_lines(tmp_path / "val.jsonl", [
        conversation("<image>?", "Something else.", image="x.png"),
        conversation("<image>?", "Another thing.", image="y.jpg"),
        conversation("What is a circle?", "Round."),
    ])  # fmt: skip
    status, out, _ = diagnose(
        train, "--images_path", tmp_path / "train", "--against", val, "--against_images_path",
        tmp_path / "val", "--faults", tmp_path / "faults.jsonl",
        "--write_clean", tmp_path / "clean.jsonl", "--html", tmp_path / "r.html",
    )  # fmt: skip
    assert status == 1 and "3 records leak; 1 pictures equal, 1 alike; 1 records equal" in out
    found = {f["where"].rsplit(":", 1)[1]: f for f in faults_in(tmp_path / "faults.jsonl")}
    assert sorted(found) == ["1", "2", "7"]
    assert found["1"]["message"].endswith("val.jsonl:1") and "is also" in found["1"]["message"]
    assert found["2"]["message"].endswith("val.jsonl:2") and "is like" in found["2"]["message"]
    assert found["7"]["kind"] == "record of the held-out set"
    clean = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    answers = [record["conversations"][1]["content"] for record in clean]
    assert answers == ["Answer 2.", "Answer 3.", "Answer 4.", "Answer 5.", "Round."]
    assert "Pictures also in the held-out set" in (tmp_path / "r.html").read_text()
    again = diagnose(
        tmp_path / "clean.jsonl", "--images_path", tmp_path / "clean_images.zip",
        "--against", val, "--against_images_path", tmp_path / "val",
    )  # fmt: skip
    assert again[0] == 0


@pytest.mark.parametrize("name", ["clean.parquet", "clean.jsonl"])
def test_clean_records_give_the_same_samples(tmp_path, diagnose, processor, name):
    data, images = make_records(tmp_path, multi=True)
    tools = [{"type": "function", "function": {"name": "look"}}]
    system = {"role": "system", "content": "Be brief.", "functions": json.dumps(tools)}
    turns = conversation("What?", "A circle.")["conversations"]
    with data.open("a") as file:
        file.write("broken\n" + json.dumps({"conversations": [system, *turns]}) + "\n")
    assert diagnose(data, "--images_path", images, "--write_clean", tmp_path / name)[0] == 1
    zipped = None if name.endswith("parquet") else tmp_path / "clean_images.zip"
    clean = VLMDataset(tmp_path / name, zipped, processor)
    before = VLMDataset(data, images, processor, on_bad_sample="return")
    assert len(clean) == len(before) - 1 == 25
    for new, old in zip(range(25), [*range(24), 25], strict=True):
        for field in ("input_ids", "labels", "pixel_values"):
            assert np.array_equal(getattr(clean[new], field), getattr(before[old], field))
    assert clean.records[24].messages[0]["tools"] == tools


def test_surplus_tags_are_dropped_where_that_is_asked_for(tmp_path, diagnose):
    _, images = make_records(tmp_path)
    turns = conversation("<image><image>?", "A circle.", image="0_0.png")
    data, clean = write_lines(tmp_path / "d.jsonl", [turns]), tmp_path / "clean.parquet"
    argv = (data, "--images_path", images, "--write_clean", clean)
    assert "--fix_image_count 1 drops" in diagnose(*argv, "--against", data)[1]
    assert diagnose(*argv, "--fix_image_count", 1)[0] == 0
    assert open_records(clean, None)[0].messages[0]["content"] == "<image>?"


def test_page_shows_pictures_and_marks_what_is_supervised(tmp_path, diagnose):
    data, images = make_records(tmp_path, num_records=8)
    with data.open("a") as file:
        file.write(json.dumps(conversation("<script>alert(1)</script>?", "<b>Bold</b>")) + "\n")
    diagnose(data, "--images_path", images, "--html", tmp_path / "r.html", "--tokens_per_s", 1000)
    page = (tmp_path / "r.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') >= 6
    assert "<script" not in page and "<b>Bold" not in page
    assert 'class="supervised">&lt;|im_end|&gt;</i>' in page
    assert "image, 16 tokens" in page and "at 1,000 tokens/s" in page
    assert "http" not in page.replace("data:image", "")  # it needs nothing from anywhere


def test_wrong_use_is_one_line_and_status_2(tmp_path, diagnose):
    data, images = make_records(tmp_path)
    for arguments, message in (
        ((tmp_path / "absent.jsonl",), "absent.jsonl; name it by PATH"),
        ((data, "--images_path", tmp_path / "absent"), "no images"),
        ((data, "--images_path", images, images, images), "3 image paths for 1 data files"),
        ((data, "--max_seq_len", 0), "--max_seq_len must be 1 or more"),
        ((data, "--write_clean", tmp_path / "x.csv"), "must end with .parquet or .jsonl"),
        ((data, "--images_path", images, "--html", data), "would replace the file"),
        ((data, "--html", tmp_path / "no" / "r.html"), "cannot be written"),
        ((data, "--against", tmp_path / "absent.jsonl"), "absent.jsonl; name it by --against"),
    ):
        status, _, error = diagnose(*arguments)
        assert status == 2 and message in error and error.count("\n") == 1, (arguments, error)
    with pytest.raises(SystemExit, match="2"):
        doctor.main([])


@pytest.mark.slow
def test_workers_find_the_same(tmp_path, assets, diagnose):
    data, images = make_records(tmp_path, num_records=100)
    with data.open("a") as file:
        file.write("broken\n" * 3)
    figures = []
    for num_workers in (0, 2):
        path = tmp_path / f"{num_workers}.json"
        status = doctor.main([
            str(a) for a in (
                data, "--images_path", images, "--json", path, "--num_workers", num_workers,
                "--tokenizer_path", assets / "tokenizer", "--vision_model_path", assets / "tower",
            )
        ])  # fmt: skip
        assert status == 1
        figures.append(json.loads(path.read_text()))
    assert figures[0] == figures[1] and figures[0]["records"] == 100


@pytest.mark.parametrize("is_named", [True, False])
def test_each_picture_is_decoded_once_however_far_apart_its_records_are(
    is_named, tmp_path, processor
):
    """Work for a record does not grow with the number of records: it is counted, not timed."""
    num_pictures, calls = 100, []
    images = tmp_path / "images"
    images.mkdir()
    for number in range(num_pictures):
        Image.new("RGB", (9, 9), (number, 255 - number, 7)).save(images / f"{number}.png")
    names = [f"{number % num_pictures}.png" for number in range(3 * num_pictures)]
    lines = [conversation("<image> What?", "A dot.", image=name) for name in names]
    data = write_lines(tmp_path / "data.jsonl", lines)

    def open_counted(content, *, max_pixels):
        calls.append(content)
        return Image.open(io.BytesIO(content))

    examiner = Examiner(
        Sources([data], [images]), processor, open_counted, max_length=640, max_pixels=100
    )
    if is_named:
        looked = [look for index in range(len(examiner)) for look in examiner[index].pictures]
    else:
        looked = [examiner._look(0, (images / name).read_bytes()) for name in names]
    assert len(calls) == num_pictures
    assert len({look.key for look in looked}) == num_pictures and len(looked) == len(names)
