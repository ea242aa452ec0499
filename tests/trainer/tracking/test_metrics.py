"""If this fails, the metrics file of a resumed run holds steps twice, or a terminal shows no
progress bar.
"""

import fcntl
import json
import os
import pty
import struct
import termios

import pytest
from support.scripts import train_flags
from support.tiny_parts import make_records
from support.warm import Program

from trainer.tracking.metrics import JsonLog


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
    for epoch in (1, 2):
        log.write({"step": 4, "epoch": epoch, "val_loss": 2.0})
    log.close()
    assert [json.loads(line)["step"] for line in path.open()] == [1, 2, 3, 4, 4, 4]
    log = JsonLog(path, resume_step=4, num_validated=1)  # it ended before the state said so
    log.write({"step": 4, "epoch": 2, "val_loss": 2.0})
    log.close()
    validated = [f["epoch"] for f in map(json.loads, path.open()) if "val_loss" in f]
    assert validated == [1, 2]
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
    process = Program(
        "trainer/train_pretrain_vlm.py",
        *flags,
        stdout=theirs,
        stderr=theirs,
        env={"TERM": "xterm"},
    )
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
