"""Where figures go: progress bar, lines, JSON, SwanLab."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT, make_records, script_environment, train_flags

from trainer import train_pretrain_vlm
from trainer.metrics import JsonLog


def test_json_log_drops_what_a_resumed_run_does_again(tmp_path):
    path = tmp_path / "m.jsonl"
    log = JsonLog(path)
    for step in range(1, 6):
        log.write({"step": step})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 6, "los')  # torn by a kill
    log = JsonLog(path, resume_step=3)
    log.write({"step": 4, "loss": 1.0})
    log.close()
    assert [json.loads(line)["step"] for line in path.open()] == [1, 2, 3, 4]
    JsonLog(path).close()
    assert path.read_text(), "a run that logs nothing leaves the file of an earlier one"
    fresh = JsonLog(path)
    fresh.write({"step": 1, "grad_norm": float("nan")})
    fresh.close()
    assert path.read_text() == '{"step": 1, "grad_norm": null}\n'


@pytest.mark.slow
def test_terminal_shows_a_progress_bar(assets, tmp_path):
    data = make_records(tmp_path / "data", num_records=12)
    flags = train_flags(assets, tmp_path, *data)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "trainer/train_pretrain_vlm.py"), *flags],
        stdout=theirs, stderr=subprocess.STDOUT, env=script_environment() | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the terminal is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "0/12 [" in text and "sample/s" in text
    assert "Epoch:[1/1](3/3) loss:" in text


@pytest.mark.slow
def test_swanlab_offline_records_the_run(assets, tmp_path, monkeypatch, capfd):
    pytest.importorskip("swanlab")
    data = make_records(tmp_path / "data", num_records=12)
    monkeypatch.chdir(tmp_path)
    argv = [*train_flags(assets, tmp_path, *data), "--use_wandb", "1"]
    environment = script_environment() | {"SWANLAB_MODE": "offline"}
    process = subprocess.run(
        [sys.executable, str(ROOT / "trainer/train_pretrain_vlm.py"), *argv],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert list((tmp_path / "swanlog").iterdir())


def test_swanlab_that_cannot_start_is_one_clear_line(assets, tmp_path, monkeypatch, capfd):
    data = make_records(tmp_path / "data", num_records=4)
    monkeypatch.setitem(sys.modules, "swanlab", None)
    argv = [*train_flags(assets, tmp_path, *data), "--use_wandb", "1"]
    assert train_pretrain_vlm.main(argv) == 1
    assert "error: --use_wandb needs swanlab: pip install swanlab" in capfd.readouterr().err


def test_swanlab_that_fails_later_never_stops_training(assets, tmp_path, monkeypatch, capfd):
    class Failing:
        init = staticmethod(lambda **_: None)

        @staticmethod
        def log(*_args, **_kwargs):
            raise ConnectionError("no route to host")

    data = make_records(tmp_path / "data", num_records=12)
    monkeypatch.setitem(sys.modules, "swanlab", Failing)
    argv = [*train_flags(assets, tmp_path, *data), "--use_wandb", "1"]
    assert train_pretrain_vlm.main(argv) == 0
    err = capfd.readouterr().err
    assert err.count("SwanLab failed and is left out from here on: no route to host") == 1
