"""Owns serving the page: its address, its password, its folder, and what Gradio is not to do."""

import hmac
import os
import shutil
import tempfile
from pathlib import Path

from model.inference import Sampling
from model.web_chat import MAX_UPLOAD_BYTES
from model.web_guard import NoRemoteFiles
from model.web_text import CSS
from model.web_weights import Weights

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MAX_EXAMPLES = 8
FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
NOT_WANTED = {  # each would reach out of this machine, or show more than the page
    "share": False, "ssr_mode": False, "pwa": False, "mcp_server": False, "run_history": False,
    "enable_monitoring": False, "footer_links": [], "show_error": False,
}  # fmt: skip


def serve_page(
    weights: Weights,
    defaults: Sampling,
    *,
    host: str,
    port: int,
    concurrency: int,
    queue: int,
    password: str | None,
    examples: Path,
) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit status.

    Raises:
        OSError: the address is taken.
    """
    with tempfile.TemporaryDirectory(prefix="minimind-v-") as folder:
        # Gradio reads these when it is imported: files of visitors lie in a folder that is ours.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        import gradio as gr
        from starlette.middleware import Middleware

        from model.web_page import Page

        page = Page(
            weights, defaults, folder=Path(folder), concurrency=concurrency,
            examples=copy_examples(examples, Path(folder) / "examples"),
        )  # fmt: skip
        theme = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=FONTS,
                               font_mono=("monospace",))  # fmt: skip
        page.blocks.queue(max_size=max(1, queue))  # what runs at once passes the queue too
        page.blocks.launch(
            server_name=host, server_port=port or None, max_file_size=MAX_UPLOAD_BYTES, css=CSS,
            theme=theme, app_kwargs={"middleware": [Middleware(NoRemoteFiles)]}, quiet=True,
            auth=None if password is None else lambda _, given: is_same(given, password),
            prevent_thread_lock=True, **NOT_WANTED,
        )  # fmt: skip
        print(f"talk to it at {page.blocks.local_url} (Ctrl-C ends it)", flush=True)
        page.blocks.block_thread()
    return 0


def is_same(given: str, password: str) -> bool:
    """Compare in a time that tells nothing."""
    return hmac.compare_digest(given.encode(), password.encode())


def copy_examples(source: Path, folder: Path) -> list[Path]:
    """The first pictures of a folder, where the page may serve them from."""
    paths = sorted(p for p in source.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    folder.mkdir()
    return [Path(shutil.copy(path, folder)) for path in paths[:MAX_EXAMPLES]]
