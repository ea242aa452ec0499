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
from model.serving.web.protection.keeping import Kept
from model.serving.web.protection.quota import Quota
from model.serving.web.text import ANY_NAME, browser_words
from model.serving.web.weights import Weights

HERE = Path(__file__).parent  # of the page's style and script
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MAX_EXAMPLES = 8
OTHER_THREADS = 16
EXAMPLES, UPLOADS = "examples", "uploads"  # within the folder that visitors' files lie in
FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
CONTRAST = {  # where the theme's own colours are hard to read
    "block_title_text_color": "*primary_700",
    "block_label_text_color": "*primary_700",
    "checkbox_label_background_fill_selected": "*primary_600",
    "button_secondary_background_fill_hover_dark": "*primary_600",
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
}
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

        kept: Kept[Any] = Kept(max_kept=care.MAX_SESSIONS)
        page = Page(
            weights,
            defaults,
            concurrency=concurrency,
            kept=kept,
            examples=copy_examples(examples, folder / EXAMPLES),
        )
        # Events that run at once pass through the queue too.
        page.blocks.queue(max_size=max(1, queue))
        care.calm(page.blocks)
        threads = {"max_threads": concurrency + OTHER_THREADS}  # each answer's reader waits in one
        where = {"host": host, "port": port, "password": password}
        _launch(page.blocks, folder, kept, **where, **threads)
        close_when_idle(page.blocks.server.config)
        print(f"talk to it at {page.blocks.local_url} (Ctrl-C ends it)", flush=True)
        page.blocks.block_thread()
    return 0


def _launch(
    blocks: Any,
    folder: Path,
    kept: Kept[Any],
    *,
    host: str,
    port: int,
    password: str | None,
    max_threads: int,
) -> None:
    """Start Gradio's server in a thread; `blocks` are a `gr.Blocks` with its queue."""
    import gradio as gr

    theme = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=("monospace",)
    ).set(**CONTRAST)
    blocks.launch(
        server_name=host,
        server_port=port or None,
        max_file_size=MAX_UPLOAD_BYTES,
        head=_head(),
        theme=theme,
        app_kwargs={"lifespan": guarded(folder, kept, names=allowed_hosts(host))},
        auth=None if password is None else lambda _, given: is_same(given, password),
        auth_message=ANY_NAME,
        quiet=True,
        prevent_thread_lock=True,
        max_threads=max_threads,
        state_session_capacity=care.MAX_SESSIONS,
        **NOT_WANTED,
    )


def _head() -> str:
    """The page's style and script. Gradio's `css` would put all rules below a part of the page."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return f"<style>{style}</style><script>{browser_words()}\n{script}</script>"


def guarded(
    folder: Path, kept: Kept[Any], *, names: list[str]
) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """The lifespan of Gradio's application; at startup it adds our middleware around it."""
    from model.serving.web.guard import Guard
    from model.serving.web.uploads import Uploads

    quota = Quota(folder / UPLOADS)
    paths = {"uploads": folder / UPLOADS, "kept": folder / EXAMPLES}
    keeper = care.Care(folder, quota, conversations=kept, **paths)

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
