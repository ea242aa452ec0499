"""If this fails, who runs the API cannot see how it fares, or web pages that may not ask it can."""

import http.client
import json
import re

import pytest
from support.api_site import MODEL, endless_engine, post, question, served_thread
from support.api_socket import connect, eventually, whole

from model.generation.engine import VLMEngine
from model.serving.api import metrics
from model.serving.api.protocol.fields import ApiError
from model.serving.api.server import check_origins, served_names

SHORT = question("What?", max_tokens=3, temperature=0)
LONG = question("What?", max_tokens=30_000, temperature=0)
ORIGIN = "http://localhost:3000"


@pytest.fixture(scope="module")
def engine(assets) -> VLMEngine:
    return endless_engine(assets)


def fetch(address: str, path: str, *, method: str = "GET", **headers: str):
    """Status, headers and text of a request without a body."""
    host = address.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.request(
            method, path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read().decode()
    finally:
        connection.close()


def figures(address: str, **headers: str) -> dict[str, float]:
    status, told, text = fetch(address, "/metrics", **headers)
    assert status == 200 and told["content-type"].startswith("text/plain; version=0.0.4")
    return {
        name: float(value)
        for name, value in re.findall(r"^([^#\s]\S*) (\S+)$", text, flags=re.MULTILINE)
    }


def test_health_needs_no_key_and_metrics_do(engine):
    with served_thread(engine, api_key="secret") as address:
        status, _, text = fetch(address, "/health")
        assert status == 200 and json.loads(text) == {"status": "ok", "model": MODEL}
        assert fetch(address, "/metrics")[0] == 401
        assert fetch(address, "/metrics", Authorization="Bearer secret")[0] in (200, 501)


def test_metrics_count_requests_tokens_and_the_queue(engine):
    pytest.importorskip("prometheus_client", reason="pip install prometheus_client")
    with served_thread(engine, concurrency=1, queue=1) as address:
        for body in (SHORT, SHORT | {"n": 2}, {"model": MODEL, "prompt": "a", "max_tokens": 3}):
            path = "/completions" if "prompt" in body else "/chat/completions"
            _, reply = post(address, json.dumps(body).encode(), path=path)
            prompt = reply["usage"]["prompt_tokens"]
        assert post(address, b"{}")[0] == 400
        assert post(address, b"{}", path="/nothing/here")[0] == 404
        told = figures(address)
        assert told['minimind_requests_total{endpoint="/v1/chat/completions",status="200"}'] == 2
        assert told['minimind_requests_total{endpoint="/v1/chat/completions",status="400"}'] == 1
        assert told['minimind_requests_total{endpoint="other",status="404"}'] == 1
        assert not any("nothing" in name for name in told)  # or a visitor could fill the memory
        assert told["minimind_generated_tokens_total"] == 3 + 2 * 3 + 3
        assert told["minimind_prompt_tokens_total"] > prompt
        assert told['minimind_first_text_seconds_count{endpoint="/v1/completions"}'] <= 1
        assert told['minimind_request_seconds_count{endpoint="/v1/completions"}'] == 1
        assert (told["minimind_requests_running"], told["minimind_requests_waiting"]) == (0, 0)
        with connect(address) as first, connect(address) as second:
            first.sendall(whole(LONG))
            assert eventually(lambda: figures(address)["minimind_requests_running"] == 1)
            second.sendall(whole(LONG))
            assert eventually(lambda: figures(address)["minimind_requests_waiting"] == 1)
        left = 'minimind_requests_total{endpoint="/v1/chat/completions",status="499"}'
        assert eventually(lambda: figures(address).get(left) == 2, within_s=20), figures(address)
        told = figures(address)
        assert (told["minimind_requests_running"], told["minimind_requests_waiting"]) == (0, 0)


def test_without_its_library_metrics_say_how_to_get_it_and_answers_come(engine, monkeypatch):
    def absent():
        raise ApiError(501, "/metrics needs a library: run `pip install prometheus_client`")

    monkeypatch.setattr(metrics, "_library", absent)
    with served_thread(engine) as address:
        status, _, text = fetch(address, "/metrics")
        assert status == 501 and "pip install prometheus_client" in text
        assert post(address, json.dumps(SHORT).encode())[0] == 200


def preflight(address: str, origin: str):
    wanted = {"Access_Control_Request_Method": "POST", "Origin": origin}
    wanted["Access_Control_Request_Headers"] = "authorization,content-type,x-stainless-os"
    return fetch(address, "/v1/chat/completions", method="OPTIONS", **wanted)


def test_pages_of_a_named_origin_may_ask_and_no_others(engine):
    with served_thread(engine, api_key="secret", origins=[ORIGIN]) as address:
        status, headers, _ = preflight(address, ORIGIN)
        assert status == 200 and headers["access-control-allow-origin"] == ORIGIN
        assert "x-stainless-os" in headers["access-control-allow-headers"]
        status, headers, _ = preflight(address, "http://evil.example")
        assert status == 400 and "access-control-allow-origin" not in headers
        for origin, is_allowed in ((ORIGIN, True), ("http://evil.example", False)):
            status, headers, _ = fetch(
                address, "/v1/models", Origin=origin
            )  # its error is told too
            assert status == 401 and ("access-control-allow-origin" in headers) == is_allowed
    with served_thread(engine) as address:
        status, headers, _ = preflight(address, ORIGIN)
        assert status == 405 and "access-control-allow-origin" not in headers


def test_origins_are_checked_at_the_start():
    check_origins(["*", ORIGIN, "https://example.com"])
    for wrong in ("localhost:3000", "http://a.example/", "http://a.example/x", "http://", "a"):
        with pytest.raises(ValueError, match="is no origin: give scheme, name and port"):
            check_origins([wrong])


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("sft_vlm_512.pth", ["sft_vlm_512", "sft_vlm", "default"]),
        ("sft_vlm_768_moe.pth", ["sft_vlm_768_moe", "sft_vlm", "default"]),
        ("mine.pth", ["mine", "default"]),
    ],
)
def test_weight_has_its_name_its_stem_and_default(tmp_path, file, names):
    (tmp_path / file).touch()
    assert served_names(tmp_path / file) == names
