"""If this fails, results of `eval_vlm.py` are lost or overwrite the data: with links, pipes, odd
file names, Ctrl-C, or a reader that leaves.
"""

import io
import json
import os
import shutil
import signal
import sys
import threading
from subprocess import PIPE

import pytest
from support.painted import eval_flags
from support.scripts import start_cold
from support.tiny_parts import make_tokenizer
from support.tiny_vlm import make_loaded, save_tiny
from support.warm import Program

import eval_vlm
from dataset.evaluation.eval_data import EvalData
from model.evaluation import describe as describe_module
from model.evaluation.evaluator import Evaluator

ODD_NAMES = (b"caf\xe9.png", b"new\nline.png", b"clear\x1b[2J.png", "照片.png".encode())
SHORT = {"prompt": "<image>\nDescribe it.", "max_new_tokens": 4, "temperature": 0}


@pytest.fixture
def photos(painted, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(ODD_NAMES):
        picture = painted / "images" / f"test{i:02}.png"
        shutil.copy(picture, os.fsencode(folder) + b"/" + name)
    return folder


def describe_flags(assets, painted, photos, **values) -> list[str]:
    return eval_flags(assets, painted, **(SHORT | {"image_dir": photos} | values))


def score_flags(assets, painted, **values) -> list[str]:
    data = {"data_path": painted / "questions.jsonl", "num_generate": 0}
    return eval_flags(assets, painted, **(data | values))


@pytest.fixture
def scored(monkeypatch) -> list:
    """The weights that were scored, in order."""
    weights, real = [], Evaluator.score_window

    def score_window(self, window):
        weights.append(self.engine.path)
        return real(self, window)

    monkeypatch.setattr(Evaluator, "score_window", score_window)
    return weights


def test_odd_names_are_written_printably_everywhere(assets, painted, photos, tmp_path, capfd):
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    (photos / os.fsdecode(b"bro\xffken.jpg")).write_text("no picture")
    flags = describe_flags(assets, painted, photos, json=out, html=page)
    assert eval_vlm.main(flags) == 1
    captured = capfd.readouterr()
    names = {sample["name"] for sample in json.loads(out.read_text(encoding="utf-8"))["samples"]}
    assert names == {
        r"caf\udce9.png",
        "new\nline.png",
        "clear\x1b[2J.png",
        "照片.png",
        r"bro\udcffken.jpg",
    }
    assert r"caf\udce9.png" in page.read_text(encoding="utf-8")
    starts = {line.split("] ")[0] for line in captured.out.splitlines() if line.startswith("[")}
    assert starts == {r"[caf\udce9.png", r"[new\nline.png", r"[clear\x1b[2J.png", "[照片.png"}
    assert r"error: bro\udcffken.jpg: not a readable image" in captured.err
    assert "\x1b" not in captured.out


def test_weight_and_data_of_odd_names_are_scored(assets, painted, tmp_path, capfd):
    folder = tmp_path / os.fsdecode(b"out\xff")
    shutil.copytree(painted / "out", folder)
    data = shutil.copy(painted / "questions.jsonl", tmp_path / os.fsdecode(b"val\xff.jsonl"))
    flags = score_flags(
        assets,
        painted,
        save_dir=folder,
        data_path=data,
        num_records=4,
        json=tmp_path / "scores.json",
    )
    assert eval_vlm.main(flags) == 0
    report = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert r"out\udcff/sft_vlm_32.pth" in report["weight"] and r"val\udcff" in report["data"]
    assert r"out\udcff/sft_vlm_32.pth" in capfd.readouterr().out


def test_types_that_are_half_characters_are_no_end(assets, painted, tmp_path):
    lines = (painted / "questions.jsonl").read_text().replace('"colour"', r'"\ud800"')
    (tmp_path / "val.jsonl").write_text(lines)
    flags = score_flags(
        assets, painted, data_path=tmp_path / "val.jsonl", json=tmp_path / "scores.json"
    )
    assert eval_vlm.main(flags) == 0
    assert r"\ud800" in json.loads((tmp_path / "scores.json").read_text())["right"]


def test_results_go_through_links_and_pipes(assets, painted, photos, tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("out.json", "page.html"):
        (tmp_path / name).symlink_to(f"disk/{name}")
    flags = describe_flags(
        assets, painted, photos, json=tmp_path / "out.json", html=tmp_path / "page.html"
    )
    assert eval_vlm.main(flags) == 0
    assert (tmp_path / "out.json").is_symlink() and (tmp_path / "page.html").is_symlink()
    assert len(json.loads((tmp_path / "disk" / "out.json").read_text())["samples"]) == 4
    assert "</html>" in (tmp_path / "disk" / "page.html").read_text()
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    assert eval_vlm.main(describe_flags(assets, painted, photos, json=pipe)) == 0
    reader.join(timeout=10)
    assert len(json.loads(read[0])["samples"]) == 4 and not pipe.is_file()


def test_results_follow_what_is_printed_to_the_same_file(assets, painted, capfd):
    """`--json /dev/stdout > all.txt`: opened anew, the file would lose what is in it."""
    flags = score_flags(assets, painted, num_records=4, json="/dev/fd/1")
    assert eval_vlm.main(flags) == 0
    head, brace, report = capfd.readouterr().out.partition("{")
    assert head.startswith("weights: ") and "grounding gap" in head
    assert json.loads(brace + report)["right"]["all"]["total"] == 8


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("json", "photos", "it is a folder"),
        ("json", "gone/out.json", "there is no folder"),
        ("html", "gone/page.html", "there is no folder"),
        ("html", "out.json", "would replace the file of --json"),
    ],
)
def test_wrong_place_is_refused_before_anything_is_described(
    flag, name, message, assets, painted, photos, tmp_path, capfd
):
    places = {"json": tmp_path / "out.json"} | {flag: tmp_path / name}
    assert eval_vlm.main(describe_flags(assets, painted, photos, **places)) == 1
    captured = capfd.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_results_do_not_replace_the_data(assets, painted, tmp_path, capfd):
    data = tmp_path / "val.jsonl"
    shutil.copy(painted / "questions.jsonl", data)
    assert eval_vlm.main(score_flags(assets, painted, data_path=data, json=data)) == 1
    assert "would replace the file of --data_path" in capfd.readouterr().err
    assert data.read_bytes() == (painted / "questions.jsonl").read_bytes()


def test_second_weight_is_checked_before_the_first_is_scored(
    assets, painted, tmp_path, scored, capfd
):
    misshapen, ours, other = (tmp_path / name for name in ("bad_32.pth", "ours", "other"))
    save_tiny(make_loaded(assets, num_hidden_layers=3), misshapen)
    shutil.copy(painted / "out" / "sft_vlm_32.json", misshapen.with_suffix(".json"))
    for folder in (ours, other):
        make_loaded(assets).model.save_pretrained(folder)
    shutil.copytree(assets / "tokenizer", ours, dirs_exist_ok=True)
    make_tokenizer(other, texts=["system user assistant, and other words"] * 9)
    for second, message in (
        (misshapen, "describes another weight"),
        ("nothing", "no weight nothing"),
        (tmp_path / "gone", "no weight file"),
        (other, f"--compare {other} has another tokenizer than ours"),
    ):
        flags = score_flags(assets, painted, compare=second)
        if second == other:  # each brings its own
            at = flags.index("--tokenizer_path")
            flags[at : at + 2] = ["--load_from", str(ours)]
        assert eval_vlm.main(flags) == 1
        err = capfd.readouterr().err
        assert message in err and "Traceback" not in err and not scored


def test_first_scores_outlive_what_befalls_the_second(
    assets, painted, tmp_path, monkeypatch, capfd
):
    shutil.copytree(painted / "out", tmp_path / "out")
    real = EvalData.read_window

    def read_window(self, number):
        (tmp_path / "out" / "early_32.pth").unlink(missing_ok=True)
        return real(self, number)

    monkeypatch.setattr(EvalData, "read_window", read_window)
    flags = score_flags(
        assets,
        painted,
        save_dir=tmp_path / "out",
        num_records=4,
        compare="early",
        json=tmp_path / "scores.json",
    )
    assert eval_vlm.main(flags) == 1
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["right"]["all"]["total"] == 8 and "compare" not in report
    assert "no weight early" in capfd.readouterr().err


def many_photos(painted, folder, *, count: int):
    folder.mkdir()
    for i in range(count):
        os.link(painted / "images" / "test00.png", folder / f"{i:04}.png")
    return folder


@pytest.mark.slow
def test_stopped_run_keeps_what_is_described(assets, painted, tmp_path):
    many = many_photos(painted, tmp_path / "many", count=3000)
    flags = describe_flags(assets, painted, many, json=tmp_path / "out.json", batch_size=1)
    with Program("eval_vlm.py", *flags, stdout=PIPE, stderr=PIPE) as process:
        for line in process.stdout:
            if line.startswith("[0002.png]"):
                process.terminate()
                break
        process.stdout.read()
        err = process.stderr.read()
        assert process.wait(timeout=300) == 128 + signal.SIGTERM
    assert err.strip().count("\n") == 0 and "stopped before the end" in err
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["samples"]) >= 3
    assert len(report["samples"]) + report["not_described"] == 3000
    assert {p.name for p in tmp_path.iterdir()} == {"many", "out.json"}


def read_one_line(flags) -> tuple[int, str]:
    """As `| head -1` does: exit status, and what stands on the terminal beside."""
    with start_cold("eval_vlm.py", *flags, text=True, stdout=PIPE, stderr=PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        return process.wait(timeout=300), err


@pytest.mark.slow
def test_reader_that_leaves_costs_no_results(assets, painted, tmp_path):
    flags = score_flags(assets, painted, num_records=4, json=tmp_path / "scores.json")
    assert read_one_line(flags) == (0, "")
    assert json.loads((tmp_path / "scores.json").read_text())["right"]["all"]["total"] == 8


@pytest.mark.full
def test_without_a_reader_there_is_nothing_to_do(assets, painted, tmp_path):
    many = many_photos(painted, tmp_path / "many", count=300)
    flags = describe_flags(assets, painted, many, batch_size=1)
    assert read_one_line(flags) == (128 + signal.SIGPIPE, "")


def test_terminal_of_another_encoding_shows_what_it_can(assets, painted, photos, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert eval_vlm.main(describe_flags(assets, painted, photos)) == 0
    assert rb"[\u7167\u7247.png] " in shown.buffer.getvalue()


def test_bytes_that_are_no_text_lose_no_question_of_a_chat(assets, painted, monkeypatch, capfd):
    typed = io.TextIOWrapper(io.BytesIO(b"/seed 5\n\xff\xfe?\n/seed 6\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert eval_vlm.main(eval_flags(assets, painted, chat=True)) == 0
    out = capfd.readouterr().out
    assert "seed 5" in out and "half a character" in out and "seed 6" in out


def test_ctrl_c_keeps_what_is_described(assets, painted, tmp_path, monkeypatch, capfd):
    many, real = many_photos(painted, tmp_path / "many", count=5), describe_module.describe_samples

    def describe(engine, batch, *args, **kwargs):
        if batch[0].name == "0003.png":
            signal.raise_signal(signal.SIGINT)
        return real(engine, batch, *args, **kwargs)

    monkeypatch.setattr(describe_module, "describe_samples", describe)
    places = {"json": tmp_path / "out.json", "html": tmp_path / "page.html"}
    assert eval_vlm.main(describe_flags(assets, painted, many, batch_size=1, **places)) == 130
    report = json.loads(places["json"].read_text())
    assert len(report["samples"]) == 3 and report["not_described"] == 2
    assert places["html"].read_text().count("<figure>") == 3
    assert "stopped before the end" in capfd.readouterr().err
