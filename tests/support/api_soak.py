"""Offers clients of the API for a soak test: well-behaved, malformed, slow, and gone before the
end.
"""

import contextlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

from support.api_fuzz import attacks, send
from support.api_site import MODEL, model_flags, post, question, started_process
from support.api_socket import HEAD, connect, read_reply, whole
from support.soak import Behaviour
from support.tiny_vlm import make_loaded, picture, round_weights, save_tiny

from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling

NUM_SEEDS = 8
MAX_TOKENS = 12
LONG = {"max_tokens": 20_000}
# glibc keeps what was freed, a share for each thread: given back, what is left is what is held.
GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
             "MALLOC_TRIM_THRESHOLD_": "65536"}  # fmt: skip
POLITE_S = 2  # how long a slow client goes on


class ApiClients:
    """Acts against one server; knows what it must say to each seed."""

    def __init__(self, address: str, engine: VLMEngine):
        self._address = address
        self._said = [
            engine.generate([(ask("What?", num_images=1), [picture(6)])], self._sampling(seed))[0]
            for seed in range(NUM_SEEDS)
        ]

    @staticmethod
    def _sampling(seed: int) -> Sampling:
        return Sampling(MAX_TOKENS, 0.9, 0.9, seed=seed)

    def _good(self, rng: random.Random, **fields) -> tuple[dict, str]:
        """A question with a picture, and what the model says to it."""
        seed = rng.randrange(NUM_SEEDS)
        sampling = {"temperature": 0.9, "top_p": 0.9, "seed": seed, "max_tokens": MAX_TOKENS}
        return question(picture(6), "What?", **sampling, **fields), self._said[seed].text

    def ask(self, rng: random.Random) -> None:
        body, said = self._good(rng)
        status, reply = post(self._address, json.dumps(body).encode())
        assert status == 200, reply
        assert reply["choices"][0]["message"]["content"] == said

    def read_stream(self, rng: random.Random, *, pause_s: float = 0.0) -> None:
        body, said = self._good(rng, stream=True)
        with connect(self._address, receive_bytes=4096 if pause_s else None) as connection:
            connection.sendall(whole(body))
            time.sleep(pause_s)
            status, events = read_reply(connection)
        assert status == 200, events
        lines = [line[6:] for line in events.decode().splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
        assert "".join(delta.get("content", "") for delta in deltas) == said

    def read_slowly(self, rng: random.Random) -> None:
        self.read_stream(rng, pause_s=POLITE_S * rng.random())

    def send_slowly(self, rng: random.Random) -> None:
        body, said = self._good(rng)
        data = json.dumps(body).encode()
        with connect(self._address) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data))
            for start in range(0, len(data), 1 + len(data) // 8):
                connection.sendall(data[start : start + 1 + len(data) // 8])
                time.sleep(POLITE_S / 16)
            status, reply = read_reply(connection)
        assert status == 200, reply
        assert json.loads(reply)["choices"][0]["message"]["content"] == said

    def attack(self, rng: random.Random) -> None:
        attack = next(attacks(rng.randrange(2**32)))
        status, body, _ = send(self._address, attack)
        assert status < 500, (attack.kind, body[:300], attack.data[:600])

    def leave_a_stream(self, rng: random.Random) -> None:
        with connect(self._address) as connection:
            connection.sendall(whole(question("What?", **LONG, stream=True)))
            for _ in range(rng.randint(1, 5)):
                connection.recv(2000)

    def leave_before_the_answer(self, rng: random.Random) -> None:
        with connect(self._address) as connection:
            connection.sendall(whole(question(picture(9), "What?", **LONG)))
            time.sleep(0.3 * rng.random())

    def leave_half_way(self, rng: random.Random) -> None:
        data = whole(question("What?"))
        with connect(self._address) as connection:
            connection.sendall(data[: rng.randrange(len(data))])
            time.sleep(0.3 * rng.random())

    def say_nothing(self, rng: random.Random) -> None:
        with connect(self._address):
            time.sleep(POLITE_S * rng.random())

    def read_nothing(self, rng: random.Random) -> None:
        with connect(self._address, receive_bytes=4096) as connection:
            connection.sendall(whole(question("What?", **LONG, stream=True)))
            time.sleep(POLITE_S * rng.random())

    def fill_tokenizer(self) -> None:
        """Have the tokenizer meet more than the 10,000 words it remembers (some 60 MiB): a cache
        that fills once is no leak."""
        rng = random.Random(0)
        for _ in range(4):
            words = ("".join(rng.choices("abcdefghijklmnop", k=9)) for _ in range(4000))
            body = question(" ".join(words), max_tokens=1)
            status, reply = post(self._address, json.dumps(body).encode())
            assert status in (200, 400), reply

    def behaviours(self) -> list[Behaviour]:
        return [
            Behaviour("good", self.ask, 8),
            Behaviour("good stream", self.read_stream, 8),
            Behaviour("good, reads slowly", self.read_slowly),
            Behaviour("good, sends slowly", self.send_slowly),
            Behaviour("bad", self.attack, 8),
            Behaviour("aborted stream", self.leave_a_stream, 3),
            Behaviour("aborted question", self.leave_before_the_answer, 3),
            Behaviour("aborted request", self.leave_half_way, 3),
            Behaviour("silent", self.say_nothing),
            Behaviour("deaf", self.read_nothing),
        ]


@contextlib.contextmanager
def api_in_soak(assets: Path, folder: Path) -> Iterator[tuple[int, list[Behaviour]]]:
    """A running server: its process id, and what its clients do."""
    loaded = make_loaded(assets)
    round_weights(loaded)
    loaded.model.model.embed_tokens.weight[2] = 0
    save_tiny(loaded, folder / f"{MODEL}.pth")
    flags = [*model_flags(assets, folder), "--max_new_tokens", 3]
    with started_process(*flags, env=GIVE_BACK) as (address, pid):
        clients = ApiClients(address, VLMEngine(loaded))
        clients.fill_tokenizer()
        yield pid, clients.behaviours()
