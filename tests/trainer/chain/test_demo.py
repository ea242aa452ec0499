"""If this fails, `make demo` or `make from-zero` breaks off, repeats work, or mixes two settings;
or the repository's own weights do not answer.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.scripts import ROOT, script_environment, train_flags
from support.tiny_parts import make_records
from support.warm import run, run_step

from dataset.synthetic.drawing import EVAL_IMAGES
from dataset.synthetic.text import CHINESE
from model.generation.engine import VLMEngine
from model.generation.sampling import Sampling
from model.options import add_model_arguments
from trainer import demo
from trainer.chain import steps
from trainer.chain.running import check_settings, run_script
from trainer.chain.settings import (
    LLM,
    TEXT_STAGES,
    TOWER,
    VLM,
    Chain,
    chain_settings,
)

SCRIPT = "trainer/train_pretrain_vlm.py"
TIMEOUT_S = 120
FEW = ["--num_pretrain", "16", "--num_train", "32", "--num_heldout", "12"]


def run_quickly(*words) -> None:
    """The tower in float32: many a CPU takes ten times as long for bfloat16."""
    run_step(*words, *(("--dtype", "float32") if "train_clip_tiny" in words[0] else ()))


@pytest.fixture
def chains_in(tmp_path, monkeypatch):
    """Both chains work in a temporary folder."""
    folder = tmp_path / "zero"
    monkeypatch.setattr(
        demo,
        "FROM_ZERO",
        demo.FROM_ZERO | {"folder": folder, "tower": folder / TOWER, "llm": folder / f"{LLM}.pth"},
    )
    monkeypatch.setattr(steps, "VISION_DIR", tmp_path / "vision_model")
    monkeypatch.setattr(steps, "OUT_DIR", tmp_path / "out")
    monkeypatch.setattr(steps, "run_script", run_quickly)
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.mark.slow
def test_whole_chain_from_zero_runs_finds_what_is_done_and_publishes(chains_in, capfd):
    argv = ["--from_zero", "1", "--tower_steps", "2", "--text_share", "0.0005", *FEW]
    assert demo.main(argv) == 0
    out = capfd.readouterr().out
    assert "grounding gap" in out and "shuffled" in out and "GFLOP/s" in out
    assert "eval_vlm.py --chat" in out and "web_demo.py" in out and "download.py" in out
    assert Image.open(chains_in / "zero" / "report.png").size > (600, 400)
    for stage in TEXT_STAGES:
        figures = (chains_in / "zero" / f"{stage.name}_128_metrics.jsonl").read_text()
        assert '"val_loss"' in figures
    assert demo.main([*argv, "--publish", "1"]) == 0
    again = capfd.readouterr().out
    assert "Epoch:[" not in again and "$ python eval_vlm.py" not in again  # nothing is done twice
    assert "grounding gap" in again
    assert (chains_in / "vision_model" / TOWER / "config.json").is_file()
    assert (chains_in / "out" / f"{VLM}.pth").is_file()


def test_other_settings_never_meet_the_work_of_a_former_run(chains_in, monkeypatch, capfd):
    started = []
    monkeypatch.setattr(steps, "run_script", lambda *words: started.append(words) or sys.exit(0))
    argv = ["--from_zero", "1", *FEW]
    for more in ([], ["--seed", "7"]):  # the same settings go on, another seed has its own place
        with pytest.raises(SystemExit):
            demo.main([*argv, *more])
    assert len(started) == 2
    argv[-1] = "25"
    assert demo.main([*argv, "--tower_steps", "9"]) == 1
    err = capfd.readouterr().err
    assert "was made with another num_heldout, tower_steps; remove it" in err
    (chains_in / "zero" / "chain.json").unlink()
    (chains_in / "zero" / "data").mkdir()
    assert demo.main(argv) == 1 and "no chain.json" in capfd.readouterr().err
    (chains_in / "zero" / "chain.json").write_text("{")
    assert demo.main(argv) == 1 and "no chain.json" in capfd.readouterr().err
    assert len(started) == 2


def test_demo_notices_another_language_model(tmp_path):
    llm = tmp_path / "llm.pth"
    chain = Chain(folder=tmp_path / "demo", llm=llm)
    for content in (b"one", b"two"):
        llm.write_bytes(content)
        settings = chain_settings(chain, is_from_zero=False)
        if content == b"one":
            check_settings(chain.folder, settings)
            check_settings(chain.folder, settings)
    with pytest.raises(ValueError, match="another llm_sha256;"):
        check_settings(chain.folder, settings)


def test_chain_from_zero_takes_the_committed_tokenizer(chains_in, monkeypatch):
    commands = []
    monkeypatch.setattr(steps, "run_script", lambda *words: commands.append([*map(str, words)]))
    chain, _ = demo.parse_args(["--from_zero", "1"])
    steps.train_tower(chain)
    steps.train_llm(chain)
    trained = [c for c in commands if c[0] != "-m"]
    assert len(trained) == 3
    for command in trained:
        assert command[command.index("--tokenizer_path") + 1] == str(ROOT / "model")


def test_another_seed_writes_beside_the_usual_one():
    usual, other = Chain(), Chain(seed=7)
    assert usual.out == usual.folder and other.out == usual.folder / "seed_7"
    assert other.data == usual.data and other.llm == usual.llm


def test_only_what_is_made_from_zero_is_published(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--publish", "1"])
    assert "--from_zero" in capsys.readouterr().err


def test_demo_without_weights_names_the_way(tmp_path, monkeypatch, capfd):
    chain = Chain(llm=tmp_path / "gone.pth")
    monkeypatch.setattr(demo, "Chain", lambda **_: chain)
    assert demo.main([]) == 1
    assert "make from-zero" in capfd.readouterr().err


def test_weights_of_the_repository_stay_small():
    files = [*(steps.VISION_DIR / TOWER).iterdir()]
    files += [path for stem in (LLM, VLM) for path in steps.OUT_DIR.glob(f"{stem}.*")]
    assert sum(path.suffix == ".pth" for path in files) == 2
    assert {path.suffix for path in files} == {".pth", ".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 10.5e6  # they count twice in a clone


@pytest.mark.slow
def test_language_model_of_the_repository_knows_scenes_told_in_words(tmp_path):
    """To the loss that BENCHMARKS.md states, within its tolerance."""
    one, texts = tmp_path / "one.jsonl", tmp_path / "heldout_text.jsonl"
    one.write_text(
        '{"conversations": [{"role": "user", "content": "?"}, '
        '{"role": "assistant", "content": "!"}]}\n'
    )
    for script in (
        [
            "-m",
            "dataset.synthetic",
            "--out",
            tmp_path,
            *"--split heldout --seed 11 --num_images 1 --num_pairs 0".split(),
            *"--caption_share 0.1 --character_share 0.6 --num_text 400".split(),
        ],
        [
            "trainer/train_llm.py",
            "--from_weight",
            ROOT / "out" / f"{LLM}.pth",
            *"--dtype float32 --learning_rate 1e-12 --epochs 1 --loss_on answers".split(),
            "--data_path",
            one,
            "--val_data_path",
            texts,
            *"--num_workers 0 --save_weight same".split(),
            "--save_dir",
            tmp_path,
            "--checkpoint_dir",
            tmp_path,
        ],
    ):
        ended = run(*script, cwd=ROOT, timeout_s=TIMEOUT_S)
        assert ended.returncode == 0, ended.stderr
    loss = float(ended.stdout.partition("val_loss:")[2].split()[0])
    assert loss == pytest.approx(0.248, abs=0.02)


QUESTIONS = {  # to the words that answer them
    "What colour is the shape?": lambda colour, _: colour,
    "图形是什么颜色？": lambda colour, _: CHINESE[colour],
    "What shape is it?": lambda _, shape: shape,
    "这是什么形状？": lambda _, shape: CHINESE[shape],
    "How many shapes are there?": lambda *_: "1",
    "图中有几个图形？": lambda *_: "1",
}


@pytest.mark.parametrize("number", [n for n, image in enumerate(EVAL_IMAGES) if image[2] == 1])
def test_finished_weight_of_the_repository_answers(number):
    colour, shape, _, _, stem = EVAL_IMAGES[number]
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    engine = VLMEngine.from_args(parser.parse_args(["--weight", "sft_vlm_demo", "--device", "cpu"]))
    image = ROOT / "dataset" / "eval_images" / f"{stem}.png"
    requests = [
        ([{"role": "user", "content": f"<image>\n{question}"}], [image]) for question in QUESTIONS
    ]
    said = [answer.text for answer in engine.generate(requests, Sampling(16, 0))]
    right = [answer(colour, shape) for answer in QUESTIONS.values()]
    assert sum(map(str.__eq__, said, right)) >= len(right) - 1, list(zip(said, right, strict=True))


def test_a_script_that_fails_is_an_error(capfd):
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_script("dataset/download.py", "--no_such_flag")
    assert error.value.returncode == 2
    assert "$ python dataset/download.py --no_such_flag" in capfd.readouterr().out


def start(argv: list[str]) -> subprocess.Popen:
    """A script, run by a program in a process group of its own, as a terminal has it."""
    code = (
        f"import signal, sys; sys.path.insert(0, {str(ROOT)!r}); "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from trainer.chain.running import run_script\n"
        "try: run_script(*sys.argv[1:])\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, SCRIPT, *argv],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.STDOUT,
        env=script_environment(),
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["Ctrl-C", "SIGTERM"])
def test_stopped_script_saves_and_goes_on(sent, assets, tmp_path):
    data = make_records(tmp_path / "data", num_records=60)
    argv = train_flags(assets, tmp_path, *data, batch_size=2, epochs=1000, num_workers=1)
    process = start(argv)
    said = ""
    try:
        for line in process.stdout:
            said += line
            if line.startswith("Epoch:["):
                break
        if sent == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        said += process.stdout.read()  # to the end of the last process that holds it
        assert process.wait(TIMEOUT_S) == 130, said
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert "Traceback" not in said
    state = tmp_path / "checkpoints" / "pretrain_vlm_32_resume.pth"
    progress = torch.load(state, weights_only=True)["progress"]
    assert progress["step"] >= 1
    assert_group_is_empty(process.pid)
    last = ["--epochs", str(progress["epoch"] + 1), "--from_resume", "1"]
    assert run(SCRIPT, *argv, *last).returncode == 0
    after = torch.load(state, weights_only=True)["progress"]
    assert after["samples"] == 60 * (progress["epoch"] + 1)


def assert_group_is_empty(group: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        stats = [p.read_text() for p in Path("/proc").glob("[0-9]*/stat") if p.exists()]
        if all(int(stat.rpartition(")")[2].split()[2]) != group for stat in stats):
            return
        time.sleep(0.2)
    raise AssertionError(f"group {group} still has processes")
