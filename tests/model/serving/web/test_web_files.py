"""If this fails, the web page hands out files of the server, lets a visitor name one as a picture,
or takes an upload of any size. Plain HTTP, no browser.
"""

import json
import urllib.parse
from pathlib import Path

import pytest
from PIL import Image
from support.scripts import ROOT
from support.web_visitor import HUNG_UP, PASSWORD, Client, make_weights, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights and a picture."""
    folder = tmp_path_factory.mktemp("page")
    make_weights(folder)
    Image.new("RGB", (64, 48), "red").save(folder / "red.png")
    return folder


@pytest.fixture(scope="module")
def site(folder):
    with serving(folder) as site:
        yield site


def test_the_server_itself_refuses_a_large_upload(site):
    client = Client(site, password=PASSWORD)
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    red = (site.folder / "red.png").read_bytes()
    for size, statuses in (
        (1 << 20, {200}),
        (25 << 20, {400, HUNG_UP}),
        (205 << 20, {413, HUNG_UP}),
    ):
        body = head + red + bytes(size) + b"\r\n--x--\r\n"
        kind = "multipart/form-data; boundary=x"
        assert client.status("/gradio_api/upload", body, kind) in statuses


def test_no_file_of_the_server_is_served_or_taken(site, folder):
    client = Client(site, password=PASSWORD)
    for path in (
        "/etc/passwd",
        str(folder / "record.jsonl"),
        str(ROOT / "README.md"),
        str(folder / "sft_vlm_32.pth"),
        "../../../../etc/passwd",
        "http://127.0.0.1/x",
        "http://example.com/x.png",
    ):
        assert client.status(f"/gradio_api/file={urllib.parse.quote(path)}") == 403
        assert client.status(f"/file={urllib.parse.quote(path)}") in (403, 404)
    config = json.loads(client.get("/config"))
    (submit,) = (d for d in config["dependencies"] if d["targets"][0][1] == "submit")
    num_before = len(site.events("question"))
    for path in ("/etc/passwd", str(folder / "red.png"), "http://example.com/x.png"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        data = [
            {"text": "What is it?", "files": [file]},
            None,
            None,
            "English",
            None,
            "",
            0.6,
            0.8,
            0,
            1,
            5,
            1,
            False,
        ]
        event = {"data": data, "fn_index": submit["id"], "session_hash": "stranger"}
        for kind in ("application/json", "Application/JSON", "application/x+json"):
            assert client.status("/gradio_api/queue/join", json.dumps(event).encode(), kind) in (
                403,
                415,
            )
    assert len(site.events("question")) == num_before


def test_picker_waits_for_the_weights_of_now(site):
    """A choice made before they have come would be lost with the list that it was made in."""
    client = Client(site, password=PASSWORD)
    components = json.loads(client.get("/config"))["components"]
    (picker,) = (c["props"] for c in components if c["props"].get("elem_id") == "weight")
    assert picker["interactive"] is False
