"""Owns starting the page's server: address, password, visitors' folder, Gradio's options."""

import hmac
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from model.generation.sampling import Sampling
from model.serving.connections import close_when_idle
from model.serving.hosts import KnownHosts, allowed_hosts
from model.serving.web.conversation import MAX_UPLOAD_BYTES
from model.serving.web.protection import care
from model.serving.web.protection.quota import Quota
from model.serving.web.text import ANY_NAME, CSS
from model.serving.web.weights import Weights

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MAX_EXAMPLES = 8
EXAMPLES, UPLOADS = "examples", "uploads"  # within the folder that visitors' files lie in
FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
NOT_WANTED: dict[str, Any] = {  # each would contact other machines, or show more than the page
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
    with tempfile.TemporaryDirectory(prefix="minimind-v-") as name:
        # Visitors' files lie in a folder of ours, resolved as Gradio resolves requested paths.
        folder = Path(name).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        care.set_before_import()
        from model.serving.web.page import Page  # imports Gradio

        page = Page(
            weights,
            defaults,
            concurrency=concurrency,
            examples=copy_examples(examples, folder / EXAMPLES),
        )
        # Events that run at once pass through the queue too.
        page.blocks.queue(max_size=max(1, queue))
        care.calm(page.blocks)
        _launch(page.blocks, folder, host=host, port=port, password=password)
        close_when_idle(page.blocks.server.config)
        print(f"talk to it at {page.blocks.local_url} (Ctrl-C ends it)", flush=True)
        page.blocks.block_thread()
    return 0


def _launch(blocks: Any, folder: Path, *, host: str, port: int, password: str | None) -> None:
    """Start Gradio's server in a thread; `blocks` are a `gr.Blocks` with its queue."""
    import gradio as gr

    theme = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=("monospace",)
    )
    blocks.launch(
        server_name=host,
        server_port=port or None,
        max_file_size=MAX_UPLOAD_BYTES,
        css=CSS,
        theme=theme,
        app_kwargs={"lifespan": guarded(folder, names=allowed_hosts(host))},
        auth=None if password is None else lambda _, given: is_same(given, password),
        auth_message=ANY_NAME,
        quiet=True,
        prevent_thread_lock=True,
        state_session_capacity=care.MAX_SESSIONS,
        **NOT_WANTED,
    )


def guarded(
    folder: Path, *, names: list[str]
) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """The lifespan of Gradio's application; at startup it adds our middleware around it."""
    from model.serving.web.guard import Guard
    from model.serving.web.uploads import Uploads

    quota = Quota(folder / UPLOADS)
    keeper = care.Care(folder, quota, uploads=folder / UPLOADS, kept=folder / EXAMPLES)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        guard = Guard(app.middleware_stack, care=keeper, uploads=Uploads(quota), folder=folder)
        app.middleware_stack = KnownHosts(guard, names)
        async with keeper.lifespan(app):
            yield

    return lifespan


def is_same(given: str, password: str) -> bool:
    """Compare in a time that does not depend on where they differ."""
    return hmac.compare_digest(
        *(text.encode("utf-8", "surrogatepass") for text in (given, password))
    )


def copy_examples(source: Path, folder: Path) -> list[Path]:
    """The first pictures of a folder, copied where the page may serve them from."""
    paths = sorted(p for p in source.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    folder.mkdir()
    return [Path(shutil.copy(path, folder)) for path in paths[:MAX_EXAMPLES]]
