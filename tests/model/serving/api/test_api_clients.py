"""If this fails, clients that are slow, silent or gone keep the API's connections and places, and
everybody else waits.
"""

import contextlib
import json
import time

import pytest
import torch
from support.api_site import endless_engine, post, question, served_thread
from support.api_socket import HEAD, connect, eventually, is_closed, read_reply, whole
from support.tiny_vlm import picture

from model import vlm_processor
from model.generation.engine import VLMEngine
from model.serving.api.connection import Patience
from model.serving.hosts import allowed_hosts

LONG = {"max_tokens": 30_000, "temperature": 0}
SHORT = json.dumps(question("What?", max_tokens=2)).encode()
ONE = {"concurrency": 1, "queue": 0}


@pytest.fixture(scope="module")
def engine(assets) -> VLMEngine:
    return endless_engine(assets)


@pytest.fixture
def steps(engine) -> list[int]:
    """One entry for each token that the model was asked for."""
    counted = []
    hook = engine.model.lm_head.register_forward_hook(lambda *_: counted.append(1))
    yield counted
    hook.remove()


def is_answered(address: str) -> bool:
    return post(address, SHORT)[0] == 200


@pytest.mark.slow
def test_reader_that_does_not_read_loses_its_place(engine, steps):
    with served_thread(engine, patience=Patience(send_s=0.5), **ONE) as address:
        with connect(address, receive_bytes=4096) as reader:
            reader.sendall(whole(question("What?", **LONG, stream=True)))
            assert eventually(lambda: len(steps) > 10)
            assert not is_answered(address)  # its place is taken
            assert eventually(lambda: is_answered(address))
            assert len(steps) < 15_000  # not because the answer was at its end
            assert is_closed(reader, within_s=10)


def test_reader_that_reads_slowly_gets_all(engine):
    """Slower than the patience in all, but never still for that long."""
    body = question("What?", max_tokens=600, temperature=0, stream=True)
    with served_thread(engine, patience=Patience(send_s=1.5), **ONE) as address:
        with connect(address, receive_bytes=4096) as reader:
            reader.sendall(whole(body))
            start, said = time.monotonic(), b""
            while b"[DONE]" not in said:
                piece = reader.recv(2048)  # some 60 times
                assert piece
                said += piece
                time.sleep(0.05)
            assert time.monotonic() - start > 1.5


@pytest.mark.parametrize("first", [b"", b"POST /v1/chat", HEAD], ids=["nothing", "word", "head"])
def test_connection_without_a_request_is_closed(engine, first):
    with served_thread(engine, patience=Patience(head_s=0.5), **ONE) as address:
        with connect(address) as silent:
            silent.sendall(first)
            assert is_closed(silent, within_s=20)
        assert is_answered(address)


def test_head_that_comes_byte_by_byte_is_not_waited_for(engine):
    with served_thread(engine, patience=Patience(head_s=0.5), **ONE) as address:
        with connect(address) as slow, pytest.raises(OSError):
            slow.sendall(HEAD)
            for _ in range(200):  # each byte is well in time
                slow.sendall(b"X")
                time.sleep(0.1)


def test_idle_connection_is_closed_after_an_answer(engine):
    with served_thread(engine, patience=Patience(head_s=1)) as address:
        with connect(address) as idle:
            for _ in range(2):
                idle.sendall(whole(SHORT))
                assert read_reply(idle)[0] == 200
            assert is_closed(idle, within_s=20)


def test_body_that_comes_slowly_loses_its_place(engine):
    with served_thread(engine, body_timeout_s=0.5, **ONE) as address:
        with connect(address) as slow:
            slow.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
            assert eventually(lambda: post(address, SHORT)[0] == 429 or is_closed(slow, within_s=0))
            status, reply = read_reply(slow)
            assert status == 408 and b"took more than 0.5 s to arrive" in reply
        assert eventually(lambda: is_answered(address))


def test_refused_upload_is_not_read_for_ever(engine):
    with served_thread(engine, patience=Patience(head_s=1)) as address:
        with connect(address) as sender:
            sender.sendall(HEAD + b"Content-Length: 99999999999\r\n\r\n")
            assert read_reply(sender)[0] == 413

            def is_refused() -> bool:
                try:
                    return not sender.send(b" ")
                except ConnectionError:
                    return True

            assert eventually(is_refused, within_s=20)


def test_silent_connections_give_way_to_new_ones(engine):
    with served_thread(engine, max_connections=5) as address, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(address)) for _ in range(20)]
        assert is_answered(address)
        assert all(is_closed(connection, within_s=10) for connection in silent[:15])
        assert not any(is_closed(connection, within_s=0.05) for connection in silent[17:])


@pytest.mark.parametrize("is_apart", [False, True], ids=["in one piece", "later"])
def test_client_that_asks_twice_at_once_and_leaves_frees_its_place(engine, steps, is_apart):
    with served_thread(engine, **ONE) as address:
        with connect(address) as hasty:
            request = whole(question("What?", **LONG))
            hasty.sendall(request if is_apart else request * 2)
            assert eventually(lambda: len(steps) > 3)
            if is_apart:
                hasty.sendall(request)
        assert eventually(lambda: is_answered(address))
        assert len(steps) < 15_000


@pytest.mark.slow
def test_client_that_leaves_ends_an_answer_without_words(engine, steps):
    """Special tokens alone: no piece of text ever comes."""

    def say_nothing(_module, _args, logits):
        logits[..., 0] = 1e4

    hook = engine.model.lm_head.register_forward_hook(say_nothing)
    try:
        with served_thread(engine, **ONE) as address:
            with connect(address) as client:
                client.sendall(whole(question("What?", **LONG)))
                assert eventually(lambda: len(steps) > 10)
            assert eventually(lambda: is_answered(address))
            assert len(steps) < 15_000
    finally:
        hook.remove()


def test_pictures_are_not_decoded_for_a_client_that_has_left(engine, monkeypatch):
    decoded, decode = [], vlm_processor.open_image

    def slowly(image):
        decoded.append(1)
        time.sleep(0.2)
        return decode(image)

    monkeypatch.setattr(vlm_processor, "open_image", slowly)
    with served_thread(engine, **ONE) as address:
        with connect(address) as client:
            client.sendall(whole(question(*[picture(6)] * 16, "What?", max_tokens=2)))
            assert eventually(lambda: decoded)
        assert eventually(lambda: is_answered(address))
        assert len(decoded) < 15


@pytest.mark.parametrize("is_stream", [False, True])
def test_out_of_memory_is_one_error_and_frees_the_place(engine, monkeypatch, is_stream):
    forward, calls = engine.model.lm_head.forward, []

    def fail(hidden):
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(hidden)

    monkeypatch.setattr(engine.model.lm_head, "forward", fail)
    with served_thread(engine, **ONE) as address:
        with connect(address) as client:
            client.sendall(whole(question("What?", max_tokens=10, stream=is_stream)))
            status, reply = read_reply(client)
        assert status == (200 if is_stream else 503)
        assert reply.count(b'"error"') == 1 and b"server_error" in reply
        monkeypatch.undo()
        assert is_answered(address)


def test_foreign_names_are_refused(engine):
    with served_thread(engine, hosts=allowed_hosts("127.0.0.1")) as address:
        status, reply = post(address, SHORT, Host="evil.example:7860")
        assert status == 403 and "'evil.example:7860'" in reply["error"]["message"]
        for host in ("localhost:7860", "127.0.0.1", "[::1]:7860"):
            assert post(address, SHORT, Host=host)[0] == 200
