"""If this fails, `make test-gpu` breaks on the one machine that has a GPU. Every case runs on a
CPU, tiny, through the public command.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu import report, run
from gpu.room import Case, Skip
from support.pretend_gpu import pretend_gpus
from support.pretend_tensor import pretend_tensors
from support.rank_group import CONTEXT
from support.scripts import ROOT, run_script

RUN = "tests/gpu/run.py"
LINE = re.compile(r"^(pass|FAIL|skip|not run) +(.+?)  \[[\d.]+ s\]  (.*)$")


def rehearse(path: Path, *more, **options):
    argv = ["--device", "cpu", "--rehearsal", "1", "--report", path, *more]
    return run_script(RUN, *argv, **options)


def outcomes(path: Path) -> dict[str, tuple[str, str]]:
    found = (LINE.match(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {m[2]: (m[1], m[3]) for m in found if m}


# One of each kind; the processes of several ranks take long to start.
SOME = (
    "no step waits: moe, muon|minute|single prompts: moe, float32|attention against.* 96.*bfloat16|"
    "expert without|memory|sft 48x3: dense, float32"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "only", [SOME, pytest.param("", marks=pytest.mark.full)], ids=["some", "all"]
)
def test_every_case_passes_in_rehearsal(only, tmp_path):
    path = tmp_path / "deep" / "report.txt"
    rehearse(path, "--only", only, "--minutes", "30", timeout_s=1800)
    found = outcomes(path)
    names = [c.name for c in report.all_cases(report.Room(None, None, is_rehearsal=True))]
    assert list(found) == [name for name in names if re.search(only, name)]
    assert {kind for kind, _ in found.values()} == {"pass"}, found
    text = path.read_text(encoding="utf-8")
    assert re.search(r"torch \d.*CUDA .*OS ", text) and "a rehearsal, not a GPU" in text
    assert re.search(rf"\n{len(found)} pass, 0 FAIL, 0 skip, 0 not run; \d+ s; report: ", text)
    assert "profile of" in text and "aten::mm" in text


@pytest.mark.slow
def test_cases_pass_on_a_pretend_gpu(tmp_path):
    """What they do for a GPU alone: waiting is an error, memory is pinned, the driver is asked."""
    path = tmp_path / "report.txt"
    only = "no step waits: moe, adamw|decode, 96|decoding"
    argv = ["--device", "cuda", "--rehearsal", "1", "--report", str(path), "--only", only]
    with pretend_gpus() as driver, pretend_tensors(driver) as world:
        assert report.main(argv) == 0
    assert {kind for kind, _ in outcomes(path).values()} == {"pass"} and world.kernels
    assert "device cuda:0: Pretend GPU, compute capability 9.0, 80.0 GiB" in path.read_text()


@pytest.mark.gpu
@pytest.mark.full
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_case_passes_on_the_gpu(tmp_path):
    path = tmp_path / "report.txt"
    run_script(RUN, "--report", path, timeout_s=900)
    assert {kind for kind, _ in outcomes(path).values()} <= {"pass", "skip"}


def test_a_failed_case_is_told_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    def fail(room):
        raise RuntimeError("kernel of the moon\nsecond line")

    def skip(room):
        raise Skip("no such unit")

    cases = [Case("bad", fail), Case("absent", skip), Case("good", lambda room: "3 of 3")]
    monkeypatch.setattr(report, "all_cases", lambda room: cases)
    path = tmp_path / "report.txt"
    argv = ["--device", "cpu", "--rehearsal", "1", "--report", str(path)]
    assert report.main(argv) == 1
    assert outcomes(path) == {
        "bad": ("FAIL", "RuntimeError: kernel of the moon"),
        "absent": ("skip", "no such unit"),
        "good": ("pass", "3 of 3"),
    }
    text = path.read_text()
    assert "Traceback" in text and "second line" in text and "1 pass, 1 FAIL, 1 skip" in text
    assert capsys.readouterr().out == text
    assert report.main([*argv, "--minutes", "0"]) == 1
    assert {kind for kind, _ in outcomes(path).values()} == {"not run"}


def report_what_hangs(path: Path) -> None:
    cases = [Case("before", lambda room: "done"), Case("hangs", lambda room: time.sleep(600))]
    report.GRACE_S, report.all_cases = 1, lambda room: cases
    argv = ["--device", "cpu", "--rehearsal", "1", "--minutes", "0.05", "--report", str(path)]
    sys.exit(report.main(argv))


@pytest.mark.slow
def test_a_hung_case_ends_the_report_where_it_stands(tmp_path):
    path = tmp_path / "report.txt"
    process = CONTEXT.Process(target=report_what_hangs, args=(path,))
    process.start()
    process.join(timeout=300)
    process.kill()
    assert process.exitcode == 1
    assert outcomes(path) == {"before": ("pass", "done")}
    assert "hung: no end within 4 s" in path.read_text()


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    path = tmp_path / "report.txt"
    for device, said in (("cpu", "found only cpu"), ("abc", "--device 'abc' is not a device")):
        assert report.main(["--device", device, "--report", str(path)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and said in err and err.count("\n") == 1
    assert not path.exists()


def test_without_pytorch_it_says_what_to_install():
    """Isolated and without site-packages, this Python has no PyTorch."""
    command = [sys.executable, "-I", "-S", str(ROOT / RUN)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert ended.returncode == 1 and "has no PyTorch; install its CUDA build" in ended.stderr


@pytest.mark.full
def test_a_missing_package_is_named_where_it_cannot_be_fetched(tmp_path, monkeypatch):
    """In an environment of its own that sees this one's PyTorch."""
    monkeypatch.setattr(run, "VENV", tmp_path / "own")
    monkeypatch.setattr(run, "NEEDED", {"not_there": "no-such-package", "numpy": "numpy"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match='could not be fetched: pip install "no-such-package"$'):
        run.find_python()
    own = tmp_path / "own" / "bin" / "python"
    subprocess.run([own, "-c", "import torch"], check=True)
    monkeypatch.setattr(run, "NEEDED", {"numpy": "numpy"})
    assert run.find_python() == sys.executable
