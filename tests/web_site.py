"""The web page as a process of its own, with tiny weights; it writes down what the model is given.

    python tests/web_site.py RECORD [flags of web_demo.py]

A question that holds BREAK breaks the model. Each token takes a moment, so that there is time to
press Stop, and no answer ends before its longest length.
"""

import json
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_vlm import never_end

import web_demo
from model.inference import Stream, VLMEngine

BREAK = "break the model"
TOKEN_S = 0.01


def record(path: Path) -> None:
    """Wrap the engine: a JSON line for each question when its answer begins, and when it ends."""
    stream, next_piece, lock = VLMEngine.stream, Stream.__next__, threading.Lock()
    make = VLMEngine.__init__

    def write(**fields) -> None:
        with lock, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")

    def endless(self, loaded):
        make(self, loaded)
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

    VLMEngine.__init__, VLMEngine.stream, Stream.__next__ = endless, recorded, slow


if __name__ == "__main__":
    record(Path(sys.argv[1]))
    sys.exit(web_demo.main(sys.argv[2:]))
