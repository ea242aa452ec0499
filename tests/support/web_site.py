"""Offers the web page as a process of its own, with tiny weights; it records the input of the
model.

    python tests/support/web_site.py RECORD [flags of web_demo.py]

A question that holds BREAK breaks the model. Each token takes a moment, so that there is time to
press Stop, and no answer ends before its longest length; with SAY in the environment every answer
is that text. With SHORT in the environment visitors
may upload little, and all that waits for hours or minutes waits for seconds.
"""

import functools
import json
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `support`
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from support.third_generation import make_it_say
from support.tiny_vlm import never_end

import web_demo
from model.generation.engine import Stream, VLMEngine
from model.serving.web import conversation as web_chat
from model.serving.web import server as web_server
from model.serving.web import uploads
from model.serving.web.protection import care

BREAK = "break the model"
TOKEN_S = 0.01
SHORT_KEEP_S, SHORT_SILENCE_S, SHORT_HEAD_S = 3, 1, 1
SHORT_QUOTA = {"visitor_bytes": 100_000, "address_bytes": 400_000, "all_bytes": 400_000}


def record(path: Path) -> None:
    """Wrap the engine: a JSON line for each question when its answer begins, and when it ends."""
    stream, next_piece, lock = VLMEngine.stream, Stream.__next__, threading.Lock()
    make = VLMEngine.__init__

    def write(**fields) -> None:
        with lock, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")

    def endless(self, loaded):
        make(self, loaded)
        if said := os.environ.get("SAY"):
            make_it_say(loaded, said)
        else:
            never_end(self.model)

    def recorded(self, messages, images, sampling, **options):
        write(event="question", weight=self.path.stem, messages=messages, images=images)
        if BREAK in messages[-1]["content"]:
            raise RuntimeError("broken on purpose")
        return stream(self, messages, images, sampling, **options)

    def slow(self):
        time.sleep(TOKEN_S)
        try:
            return next_piece(self)
        except StopIteration:
            said = self.answer
            write(event="answer", text=said.text, finish_reason=said.finish_reason)
            raise

    def shared(*arguments, **options):
        write(event="share")
        return to_html(*arguments, **options)

    to_html, web_chat.to_html = web_chat.to_html, shared
    VLMEngine.__init__, VLMEngine.stream, Stream.__next__ = endless, recorded, slow


def hurry() -> None:
    """Limits that a test can reach."""
    care.KEEP_S, care.SWEEP_EVERY_S, uploads.SILENCE_S = SHORT_KEEP_S, 0.3, SHORT_SILENCE_S
    web_server.Quota = functools.partial(web_server.Quota, **SHORT_QUOTA)
    web_server.close_when_idle = functools.partial(web_server.close_when_idle, head_s=SHORT_HEAD_S)


if __name__ == "__main__":
    record(Path(sys.argv[1]))
    if os.environ.get("SHORT"):
        hurry()
    sys.exit(web_demo.main(sys.argv[2:]))
