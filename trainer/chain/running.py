"""Owns what every chain does: it runs scripts of the repository, in a folder of one setting."""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from model.machine.atomic_file import atomic_write
from model.machine.paths import ROOT

CHAIN_FILE = "chain.json"  # in a chain's folder: the settings of what is there
INTERRUPTED = 130  # exit status after Ctrl-C: 128 plus the signal's number
Word = str | int | float | Path


def run_script(*words: Word) -> None:
    """Run `python words...` in the repository; the output goes to the terminal.

    Raises:
        subprocess.CalledProcessError: it ended with another status than 0.
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the script has saved and ended.
    """
    command = [sys.executable, *map(str, words)]
    print(f"\n$ python {' '.join(command[1:])}", flush=True)
    process = subprocess.Popen(command, cwd=ROOT)

    def pass_on(_signum: int, _frame: FrameType | None) -> NoReturn:
        process.terminate()
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the terminal sent Ctrl-C to the script as well
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    if status:
        raise subprocess.CalledProcessError(status, command)


def flags(values: Mapping[str, Word]) -> list[Word]:
    """`--name value` for each entry, in order."""
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def scores_of(options: dict[str, Word], *, path: Path, run: Callable[..., None]) -> dict[str, Any]:
    """The scores that `eval_vlm.py` writes to `path` with these flags; if it holds what the same
    flags gave for the same files, nothing is run.

    Args:
        options: flags; the files among them count by their content.
        run: `run_script`.
    """
    known = path.with_name("scored.json")  # what the scores are of
    current = {name: str(value) for name, value in options.items()}
    for name, value in options.items():
        if isinstance(value, Path) and value.is_file():
            with value.open("rb") as file:
                current[f"{name}_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    if _read_json(known) == current and (scores := _read_json(path)):
        return scores
    run("eval_vlm.py", *flags(options | {"json": path}))
    text = json.dumps(current, indent=1, ensure_ascii=False)
    atomic_write(known, lambda file: file.write(text.encode()))
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    """What a file holds; {} where it is missing or damaged, so that it is made anew."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a new folder; in a folder that holds files they must be the same.

    Raises:
        ValueError: they differ, or the folder does not say what they were.
        OSError: the folder cannot be written.
    """
    path, settings = folder / CHAIN_FILE, json.loads(json.dumps(settings))
    if folder.is_dir() and any(folder.iterdir()):
        try:
            before = dict(json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            raise ValueError(
                f"{folder} holds work of unknown settings (no {CHAIN_FILE} to read); move "
                "it away or remove it / 该目录的设置未知，请移走或删除"
            ) from None
        differing = [name for name in settings if before.get(name) != settings[name]]
        if differing:
            raise ValueError(
                f"{folder} was made with another {', '.join(differing)}; remove it to start "
                "anew, or give the flags of that run / 设置与已有结果不同，请删除该目录或沿用原参数"
            )
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write(json.dumps(settings, indent=1).encode()))
