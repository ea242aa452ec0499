"""Owns the conversation in a terminal: `python eval_vlm.py --chat`."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from PIL import Image

from model.generation.engine import Stream, VLMEngine, ask
from model.generation.sampling import Sampling
from model.generation.speed import Speed
from model.generation.thinking import ANSWER, THINKING
from model.machine.terminal import shown
from model.options import parse_path
from model.vision.pictures import open_image
from model.vlm_processor import IMAGE_TAG, Message

try:
    import readline  # noqa: F401 (arrow keys and history in input())
except ImportError:  # not on every system; the chat works without
    pass

HELP = """\
/image PATH  show a picture with the next question, several by several lines / 添加图像
/clear       forget the conversation / 清空对话
/seed N      random numbers of the answers / 随机种子
/help        this text / 帮助
/quit        leave; so does Ctrl-D / 退出
Ctrl-C stops an answer / 停止回答"""


class Chat:
    """One conversation: its messages and pictures, and the pictures for the next question.

    Args:
        show_speed: print the tokens per second of each answer to stderr.
    """

    def __init__(self, engine: VLMEngine, sampling: Sampling, *, show_speed: bool = False):
        self.engine, self.sampling, self.show_speed = engine, sampling, show_speed
        self.clear()

    def clear(self) -> None:
        self.messages: list[Message] = []
        self.images: list[Image.Image] = []  # of all turns, in reading order
        self.new_images: list[Image.Image] = []

    def run(self, line: str) -> bool:
        """Run a command or answer a question; returns False for /quit."""
        if not line.startswith("/"):
            self.answer(line)
            return True
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/quit":
            return False
        if command == "/image":
            self.add_image(argument)
        elif command == "/clear":
            self.clear()
            print("cleared / 已清空")
        elif command == "/seed":
            self.set_seed(argument)
        elif command == "/help":
            print(HELP)
        else:
            raise ValueError(f"unknown command {command}; /help lists them / 未知命令")
        return True

    def add_image(self, path: str) -> None:
        path = path.strip("'\"")  # a file dropped on a terminal arrives quoted
        if not path:
            raise ValueError("/image needs the path of a picture / 请给出图像路径")
        try:
            image = open_image(parse_path(path))
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{path}: {reason}") from error
        self.new_images.append(image)
        print(
            f"picture {len(self.new_images)} for the next question: {path} "
            f"({image.width}x{image.height}) / 已添加图像"
        )

    def set_seed(self, text: str) -> None:
        if text.isdecimal():
            self.sampling = replace(self.sampling, seed=int(text))
        elif text:
            raise ValueError(f"/seed {text}: not a whole number of 0 or more / 需为非负整数")
        print(f"seed {self.sampling.seed}")

    def answer(self, question: str) -> None:
        """Print the answer as it comes, and remember it."""
        num_tags = question.count(IMAGE_TAG)
        if num_tags not in (0, len(self.new_images)):
            raise ValueError(
                f"{num_tags} {IMAGE_TAG} tag(s) but {len(self.new_images)} new picture(s); add "
                "one by /image PATH for each, or leave the tags out"
            )
        messages = self.messages + ask(question, num_images=len(self.new_images))
        images = self.images + self.new_images
        started_s = time.perf_counter()
        with _stopped_by_ctrl_c() as cancel:
            stream = self.engine.stream(messages, images, self.sampling, cancel=cancel)
            _print_parts(stream)
        answer = stream.answer
        print(" [stopped / 已停止]" if answer.finish_reason == "cancelled" else "", flush=True)
        if answer.finish_reason == "length" and answer.reasoning and not answer.text:
            print("[no answer: the thinking did not end; raise --max_new_tokens / 思考未结束]")
        if answer.num_dropped_turns:
            print(f"[{answer.num_dropped_turns} old turn(s) had no room / 较早的对话已略去]")
        if self.show_speed:
            seconds = time.perf_counter() - started_s
            print(Speed(answer.num_new_tokens, seconds), file=sys.stderr, flush=True)
        self.messages = self.engine.remember(messages, answer.text)
        self.images, self.new_images = images, []


def _print_parts(stream: Stream) -> None:
    """Print the pieces as they come; thinking, and the answer behind it, have their names."""
    is_thinking = False
    for piece in stream:
        if stream.is_thinking != is_thinking:
            is_thinking = stream.is_thinking
            print(f"[{THINKING}]" if is_thinking else f"\n[{ANSWER}]")
        print(shown(piece), end="", flush=True)


@contextlib.contextmanager
def _stopped_by_ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; a second one raises KeyboardInterrupt as usual."""
    cancel = threading.Event()

    def stop(*_: object) -> None:
        cancel.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)


def chat(engine: VLMEngine, sampling: Sampling, *, show_speed: bool = False) -> int:
    """Talk until /quit or Ctrl-D; returns the exit status."""
    conversation = Chat(engine, sampling, show_speed=show_speed)
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
            if line and not conversation.run(line):
                return 0
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves / 输入 /quit 或按 Ctrl-D 退出")
        except (ValueError, OSError) as error:
            print(f"error: {error}", flush=True)
