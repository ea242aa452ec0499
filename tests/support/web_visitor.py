"""Offers visitors of the web page: the running page, a real Chromium, and plain HTTP."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.scripts import free_port, start_cold
from support.tiny_parts import make_tokenizer, make_tower
from support.tiny_vlm import make_loaded, save_tiny
from support.warm import Program

PASSWORD = "open sesame"
PATIENCE_S = int(os.environ.get("BROWSER_PATIENCE_S", 120))  # until the page does what it should
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
ENTER_TRIES = 5
SETTLED_MS = 200  # an opened part of the page stands
HUNG_UP = 0  # instead of a status: the server did not even read to the end
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",  # a camera
)  # fmt: skip


@dataclass
class Site:
    """A running page."""

    url: str
    record: Path
    folder: Path
    pid: int

    def events(self, kind: str) -> list[dict]:
        if not self.record.is_file():
            return []
        lines = self.record.read_text(encoding="utf-8").splitlines()
        return [e for e in map(json.loads, lines) if e["event"] == kind]

    def wait_for(self, kind: str, count: int) -> list[dict]:
        """The events of a kind, once there are that many."""
        deadline_s = time.monotonic() + PATIENCE_S
        while len(found := self.events(kind)) < count:
            assert time.monotonic() < deadline_s, f"{len(found)} of {count} events {kind!r}"
            time.sleep(0.05)
        return found


def make_weights(folder: Path) -> None:
    make_tokenizer(folder / "tokenizer")
    make_tower(folder / "tower", image_size=32, patch_size=8)
    for name, use_moe in (("sft_vlm_32", False), ("other_32_moe", True)):
        save_tiny(make_loaded(folder, use_moe=use_moe), folder / f"{name}.pth")
    shutil.copy(folder / "sft_vlm_32.json", folder / "broken_32.json")
    (folder / "broken_32.pth").write_bytes(b"not a weight")


def model_flags(folder: Path) -> list[str]:
    flags = {
        "save_dir": folder,
        "vision_model_path": folder / "tower",
        "weight": "sft_vlm",
        "tokenizer_path": folder / "tokenizer",
        "device": "cpu",
    }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


@contextmanager
def serving(folder: Path, *flags, cold: bool = False, **environment):
    """The page behind a password, started from another directory; `cold` starts Python for it."""
    port, record = free_port(), folder / "record.jsonl"
    words = ["tests/support/web_site.py", record, *model_flags(folder), "--port", port, *flags]
    outside = socket.create_server(("127.0.0.1", 0))  # stands for the rest of the world
    outside.setblocking(False)
    proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
    environment |= {
        "MINIMIND_PASSWORD": PASSWORD,
        "http_proxy": proxy,
        "https_proxy": proxy,
        "no_proxy": "127.0.0.1,localhost",
    }
    with (folder / "log.txt").open("w") as log:
        start = start_cold if cold else Program
        process = start(*words, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + max(300, PATIENCE_S)
        while "talk to it at" not in (folder / "log.txt").read_text():
            assert process.poll() is None and time.monotonic() < deadline_s, (
                folder / "log.txt"
            ).read_text()
            time.sleep(0.1)
        yield Site(f"http://127.0.0.1:{port}", record, folder, process.pid)
        assert process.poll() is None, "the server died"
        with pytest.raises(BlockingIOError):
            outside.accept()  # nothing has tried to reach the world
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        outside.close()


class Visitor:
    """Someone at the page, in a browser profile of their own."""

    def __init__(self, browser, site: Site, *, locale: str = "en-US", **screen):
        self.site = site
        screen = {"viewport": {"width": 1280, "height": 900}} | screen
        self.context = browser.new_context(locale=locale, accept_downloads=True, **screen)
        self.context.set_default_timeout(1000 * PATIENCE_S)
        self.hosts: set[str] = set()
        self.context.on("request", self._note_host)
        login = self.context.request.post(
            f"{site.url}/login", form={"username": "me", "password": PASSWORD}
        )
        assert login.ok
        self.page = self.context.new_page()
        self.page.goto(site.url)
        self.box = self.page.locator("#box textarea")
        self.box.wait_for()
        self.wait_until_whole()

    def wait_until_whole(self) -> None:
        """The page is whole when what it says of the weight has come."""
        self.page.wait_for_function("document.querySelector('#about p')")

    def _note_host(self, request) -> None:
        address = urllib.parse.urlsplit(request.url)
        if address.scheme in ("http", "https", "ws", "wss"):
            self.hosts.add(address.hostname)

    def attach(self, path: Path) -> None:
        """Choose a file in the browser's own dialog."""
        with self.page.expect_file_chooser() as chooser:
            self.page.get_by_test_id("upload-button").first.click()
        chooser.value.set_files(path)

    def attach_picture(self, path: Path) -> None:
        before = self.page.locator("#box .thumbnail-item").count()
        self.attach(path)
        self.page.locator("#box .thumbnail-item").nth(before).wait_for()

    def hand_over(self, path: Path, event: str, *, at: str = "#box textarea") -> None:
        """Paste a picture into the box, or drop it there, or elsewhere on the page."""
        before = self.page.locator("#box .thumbnail-item").count()
        self.page.locator(at).evaluate(
            """(box, [event, name, text]) => {
                const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
                const data = new DataTransfer();
                data.items.add(new File([bytes], name, {type: "image/png"}));
                box.dispatchEvent(event == "paste"
                    ? new ClipboardEvent(event, {clipboardData: data, bubbles: true})
                    : new DragEvent(event, {dataTransfer: data, bubbles: true}));
            }""",
            [event, path.name, base64.b64encode(path.read_bytes()).decode()],
        )
        self.page.locator("#box .thumbnail-item").nth(before).wait_for()

    def send(self, question: str) -> None:
        self.box.fill(question)
        self.box.press("Enter")

    def ask(self, question: str) -> str:
        """Send and wait for the end of the answer; returns the status line."""
        num_asked = len(self.asked())
        self.send(question)
        self.page.locator("#chat .user .message-content").nth(num_asked).wait_for()
        return self.wait_for_end()

    def wait_for_end(self) -> str:
        """The status line, once the answer that has begun is there."""
        self.page.wait_for_function(
            "/ s · | 秒 · /.test(document.querySelector('#status').textContent)"
        )
        return self.details()

    def details(self) -> str:
        """The figures of the last answer, which are folded."""
        summary, figures = self.page.locator("#status details").evaluate(
            "d => [d.firstChild.textContent, d.lastChild.textContent]"
        )
        assert summary in ("Details", "详情")
        return figures

    def watch_the_answer_grow(self) -> list[str]:
        """The different texts that the answer had on its way to the end."""
        seen = []
        while " s · " not in self.page.locator("#status").text_content():
            said = self.said()
            if said and said[-1] and said[-1] not in seen:
                seen.append(said[-1])
            self.page.wait_for_timeout(20)
        return seen

    def stop(self) -> None:
        # Answers move the page at every word, for which a click would wait until they end.
        self.page.locator("#box .stop-button").click(force=True)

    def regenerate(self) -> None:
        self.page.locator("#chat [data-minimind=retry]").click()

    def said(self) -> list[str]:
        """What the chat shows of the model's words."""
        return self.page.locator("#chat .bot .message-content").all_inner_texts()

    def asked(self) -> list[str]:
        return self.page.locator("#chat .user .message-content").all_inner_texts()

    def is_told(self, message: str, *, shot: tuple[Path, str] | None = None) -> None:
        """Wait for a message that matches, and put it away."""
        toast = self.page.locator(".toast-body", has_text=re.compile(message)).first
        toast.wait_for()
        if shot:
            self.shoot(*shot)
        self.page.evaluate("document.querySelectorAll('.toast-close').forEach(b => b.click())")
        toast.wait_for(state="detached")

    def choose_weight(self, name: str) -> None:
        self.page.locator("#weight input").click()
        self.page.get_by_role("option", name=re.compile(f"^{name}")).click()

    def set_length(self, num_tokens: int) -> None:
        """Move the slider of the longest answer."""
        number = self.page.locator("#max_new_tokens input[type=number]")
        if not number.is_visible():
            self.open("sampling")
        self.enter(number, str(num_tokens))

    def enter(self, field, text: str) -> None:
        """Type and leave the field. A script can be so quick that Gradio sets what the field begins
        with only afterwards, when its part of the page has just been opened."""
        for _ in range(ENTER_TRIES):
            field.fill(text)
            field.press("Tab")
            self.page.wait_for_timeout(SETTLED_MS)
            if field.input_value() == text:
                return
        raise AssertionError(f"the field does not keep {text!r}: {field.input_value()!r}")

    def open(self, part: str) -> None:
        self.page.locator(f"#{part} button.label-wrap").click()

    def shoot(self, folder: Path, name: str) -> None:
        self.page.screenshot(path=folder / f"{name}.png", full_page=True)


@contextmanager
def visiting(browser, site: Site, **options):
    visitor = Visitor(browser, site, **options)
    try:
        yield visitor
        # Nothing of the page comes from anywhere else, and no script of a visitor ran.
        assert visitor.hosts <= {"127.0.0.1"}
        assert visitor.page.evaluate("window.hacked") is None
    finally:
        visitor.context.close()


class Client:
    """Plain HTTP, without a browser."""

    def __init__(self, site: Site, *, password: str | None):
        self.url, self.cookies = site.url, urllib.request.HTTPCookieProcessor()
        self.opener = urllib.request.build_opener(self.cookies)
        if password is not None:
            form = urllib.parse.urlencode({"username": "me", "password": password})
            self.login = self.status("/login", form.encode(), "application/x-www-form-urlencoded")

    def get(self, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        request = urllib.request.Request(self.url + path, data=body, headers={"Content-Type": kind})
        with self.opener.open(request, timeout=60) as answer:
            return answer.read()

    def status(self, *request) -> int:
        try:
            self.get(*request)
        except urllib.error.HTTPError as error:
            return error.code
        except (urllib.error.URLError, ConnectionError):
            return HUNG_UP
        return 200
