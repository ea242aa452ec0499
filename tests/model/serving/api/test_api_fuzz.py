"""If this fails, a malformed request brings the API down, gets an internal error, or makes other
clients wait.
"""

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.api_fuzz import attacks, send
from support.api_site import MODEL, model_flags, post, question, served_process
from support.tiny_vlm import make_loaded, save_tiny

SEED = 20_260
HANG_S = 5  # for an answer, beside what a quiet server takes on this machine
DELAY_S = 2  # of a visitor who does nothing wrong
# What may be closed without a word: requests that are none, or never end.
CLOSED = {"length", "noise", "cut", "chunks", "headers", "too_much"}


@pytest.fixture(scope="module")
def address(assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    save_tiny(make_loaded(assets), folder / f"{MODEL}.pth")
    with served_process(*model_flags(assets, folder), "--max_new_tokens", 3) as address:
        yield address


class Visitor(threading.Thread):
    """Asks good questions one after another, and notes how long each takes."""

    def __init__(self, address: str):
        super().__init__(daemon=True)
        self._address, self._has_ended = address, threading.Event()
        self.statuses, self.seconds = [], []

    def ask(self) -> None:
        start = time.monotonic()
        body = json.dumps(question("What?", max_tokens=3)).encode()
        self.statuses.append(post(self._address, body)[0])
        self.seconds.append(time.monotonic() - start)

    def run(self) -> None:
        while not self._has_ended.is_set():
            self.ask()

    def leave(self) -> None:
        self._has_ended.set()
        self.join()


def fuzz(address: str, *, num_requests: int) -> None:
    """Send the attacks, four at a time, beside a visitor; check what comes of it."""
    quiet = Visitor(address)
    for _ in range(10):
        quiet.ask()
    slack = 10 * max(quiet.seconds)  # the machine's own noise, with five at once
    visitor = Visitor(address)
    visitor.start()
    wanted = list(itertools.islice(attacks(SEED), num_requests))
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda attack: send(address, attack), wanted))
    visitor.leave()
    for i, (attack, (status, body, seconds)) in enumerate(zip(wanted, replies, strict=True)):
        told = (i, attack.kind, status, body[:300], attack.data[:600])
        assert status < 500, told
        assert status or attack.kind in CLOSED, told
        assert seconds < HANG_S + slack, (seconds, *told)
        if 400 <= status < 500 and body.startswith(b"{"):
            assert json.loads(body)["error"]["message"], told
    answered = sum(200 <= status < 500 for status, *_ in replies)
    assert answered > 0.8 * num_requests
    assert len({status for status, *_ in replies}) >= 6  # they do not all fail at the same door
    assert set(visitor.statuses) == {200}
    assert max(visitor.seconds) < DELAY_S + slack, (max(visitor.seconds), slack)
    print(
        f"{num_requests} requests: {answered} answered, the slowest in "
        f"{max(seconds for *_, seconds in replies):.2f} s; of {len(visitor.seconds)} good ones "
        f"the slowest in {max(visitor.seconds):.2f} s, {max(quiet.seconds):.2f} s when quiet"
    )


def test_attacks_are_the_same_for_a_seed():
    first, again = (list(itertools.islice(attacks(1), 30)) for _ in range(2))
    assert first == again and len({attack.kind for attack in first}) > 5


@pytest.mark.slow
def test_malformed_requests_bring_nothing_down(address):
    fuzz(address, num_requests=150)


@pytest.mark.full
@pytest.mark.slow
def test_a_thousand_malformed_requests_bring_nothing_down(address):
    fuzz(address, num_requests=1500)
