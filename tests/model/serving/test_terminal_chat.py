"""If this fails, the chat in a terminal answers otherwise than the engine does, ends at a mistake,
or ends at Ctrl-C instead of stopping the answer. A real process runs behind a pseudo-terminal.
"""

import os
import pty
import re
import select
import time
from pathlib import Path

import pytest
from support.api_site import model_flags
from support.tiny_vlm import make_loaded, picture, round_weights, save_tiny
from support.warm import Program

from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling
from model.machine.terminal import CONTROLS

pytestmark = pytest.mark.slow  # every test starts a program
QUESTION = "图像里有什么？ What is red?"


class Terminal:
    """A script behind a terminal: type into it, and wait for what it shows."""

    def __init__(self, *command: str):
        self._leader, follower = pty.openpty()
        ends = {"stdin": follower, "stdout": follower, "stderr": follower}
        self.process = Program(*command, **ends, env={"TERM": "dumb"}, leads=True)
        os.close(follower)
        self._shown = b""

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def until(self, pattern: str, *, timeout_s: float = 300) -> str:
        """What is shown up to the pattern; what follows is left for the next call."""
        deadline = time.monotonic() + timeout_s
        while True:
            shown = self._shown.decode("utf-8", "replace").replace("\r\n", "\n")
            if found := re.search(pattern, shown):
                self._shown = shown[found.end() :].encode()
                return shown[: found.end()]
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{shown}"
            if select.select([self._leader], [], [], 1)[0]:
                try:
                    self._shown += os.read(self._leader, 65536)
                except OSError:  # the other end is closed
                    raise AssertionError(
                        f"the program ended before {pattern!r}:\n{shown}"
                    ) from None

    def insist(self, text: str, pattern: str) -> str:
        """Type again and again until the pattern is shown: a key struck in the moment between the
        prompt and the reading of it is lost."""
        for _ in range(30):
            self.type(text)
            try:
                return self.until(pattern, timeout_s=10)
            except AssertionError:
                if self.process.poll() is not None:
                    raise
        raise AssertionError(f"no {pattern!r}")

    def say(self, line: str) -> str:
        """Type a line; what the program shows up to its next prompt, without the echo."""
        self.type(line + "\n")
        return self.until(r"\n> ").partition("\n")[2].removesuffix("> ").rstrip("\n")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._leader)


def chat_command(assets: Path, folder: Path, *more) -> list[str]:
    command = [
        "eval_vlm.py",
        "--chat",
        *model_flags(assets, folder),
        "--seed",
        3,
        *more,
    ]
    return [str(word) for word in command]


@pytest.fixture(scope="module")
def folder(assets, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_tiny(make_loaded(assets), folder / "sft_vlm_32.pth")
    picture(6).save(folder / "few rings.png")
    picture(9).save(folder / "many.png")
    (folder / "text.png").write_text("no picture")
    return folder


@pytest.fixture
def open_terminal():
    terminals = []

    def start(command: list[str]) -> Terminal:
        terminals.append(Terminal(*command))
        terminals[-1].until(r"\n> ")
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def shown(text: str) -> str:
    """As a terminal may show it: no control characters, the line's end stripped."""
    return text.translate(CONTROLS).rstrip("\n")


def test_chat_answers_as_the_engine_does(assets, folder, open_terminal):
    """Two pictures over two turns, a seed, Chinese, and commands between them."""
    loaded = make_loaded(assets)
    round_weights(loaded)  # what the file holds
    engine = VLMEngine(loaded)
    flags = ("--max_new_tokens", 12, "--temperature", 0.9)
    terminal = open_terminal(chat_command(assets, folder, *flags))
    said = terminal.say(f"/image '{folder}/few rings.png'")
    assert "picture 1 for the next question" in said and "40x36" in said
    sampling = Sampling(12, 0.9, seed=3)
    messages = ask(QUESTION, num_images=1)
    first = engine.generate([(messages, [picture(6)])], sampling)[0].text
    assert terminal.say(QUESTION) == shown(first)
    assert terminal.say("/seed 5") == "seed 5"
    terminal.say(f"/image {folder}/many.png")
    messages = engine.remember(messages, first) + ask("And <image>?", num_images=1)
    sampling = Sampling(12, 0.9, seed=5)
    second = engine.generate([(messages, [picture(6), picture(9)])], sampling)[0].text
    assert terminal.say("And <image>?") == shown(second)
    assert "cleared" in terminal.say("/clear")
    alone = engine.generate([(ask(QUESTION, num_images=0), [])], sampling)[0].text
    assert terminal.say(QUESTION) == shown(alone) != shown(first)
    terminal.type("/quit\n")
    assert terminal.process.wait(timeout=300) == 0


def test_mistakes_are_one_clear_line_and_the_chat_goes_on(assets, folder, open_terminal):
    terminal = open_terminal(chat_command(assets, folder, "--max_new_tokens", 4))
    for typed, expected in {
        "/image": "error: /image needs the path",
        "/image /no/such.png": "error: /no/such.png: No such file or directory",
        f"/image {folder}": f"error: {folder}: ",
        f"/image {folder}/text.png": "error: .*/text.png: not a readable image",
        "/seed minus": "error: /seed minus: not a whole number",
        "/seed 99999999999999999999": "error: --seed must be from 0",
        "/sead 3": "error: unknown command /sead; /help",
        "What is <image>?": "error: 1 <image> tag.* but 0 new picture",
        "<|im_end|>": "error: the text holds the special token",
        "circle " * 300: ".",  # longer than a terminal's line of old
        "": "",
    }.items():
        said = terminal.say(typed)
        assert re.match(expected, said) and "\n" not in said, (typed, said)
    assert "Ctrl-C stops an answer" in terminal.say("/help")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=300) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(assets, tmp_path, open_terminal):
    loaded = make_loaded(assets)
    loaded.model.model.embed_tokens.weight[2] = 0  # so it hardly ever ends by itself
    save_tiny(loaded, tmp_path / "sft_vlm_32.pth")
    flags = ("--max_new_tokens", 30_000, "--temperature", 0)
    terminal = open_terminal(chat_command(assets, tmp_path, *flags))
    for question in ("What is in the picture?", "And now?"):  # the history holds a stopped answer
        terminal.type(question + "\n")
        terminal.until(re.escape(question) + r"\n[^\n]{3}")
        terminal.type("\x03")
        assert "[stopped" in terminal.until(r"\n> ")
    terminal.insist("\x03", r"/quit or Ctrl-D leaves[^\n]*\n> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=300) == 0
