"""Owns limiting what Gradio keeps and does in the background.

Gradio 6 polls its queue a thousand times a second, rebuilds a table of all questions after each
one, and never forgets a page that was opened.
"""

import asyncio
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from model.serving.web.protection.keeping import Kept
from model.serving.web.protection.presence import Presence
from model.serving.web.protection.quota import Quota

log = logging.getLogger(__name__)
KEEP_S = 3600  # for files and conversation of a visitor who has left
SWEEP_EVERY_S = 60
MAX_SESSIONS = 1000  # pages whose state is kept at once, 70 kB each without its conversation
POLL_EVERY_S = 0.05  # between polls of the queue: on average a question waits half of that
PROGRESS_EVERY_S = 3600.0  # progress bars, of which the page has none


def set_before_import() -> None:
    """Set what Gradio reads from the environment when it is imported."""
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ANALYTICS_MAX_EVENTS": "1",  # the tables of the monitoring page, which is off
        "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(2**62),
    }


def calm(blocks: Any) -> None:
    """Make Gradio's queue, once it exists, poll less often."""
    blocks._queue.sleep_when_free = POLL_EVERY_S
    blocks._queue.progress_update_sleep_when_free = PROGRESS_EVERY_S


class Care:
    """Tracks visitors and pages, and deletes what those that have left leave behind.

    Args:
        folder: holds all files that visitors see. Gradio writes into it; its files are deleted when
            they are old.
        conversations: of pages, forgotten after as long.
        uploads: a folder in it; a visitor's files there are deleted when the visitor has left.
        kept: a folder in it that is never deleted from.
    """

    def __init__(
        self, folder: Path, quota: Quota, *, conversations: Kept[Any], uploads: Path, kept: Path
    ):
        self._folder, self._quota, self._conversations = folder, quota, conversations
        self._not_swept = {uploads, kept}
        self._app: Any = None
        self.visitors = Presence(lambda name: name in quota)
        self.sessions = Presence(self._has_session)

    def _has_session(self, session: str) -> bool:
        return self._app is not None and session in self._app.state_holder

    def knows(self, session: str) -> bool:
        """Whether the session has asked something whose answer can be read."""
        queue = self._app.get_blocks()._queue
        return session in queue.pending_messages_per_session

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Sweep at intervals while the server runs."""
        self._app = app
        task = asyncio.create_task(self._sweep_for_ever())
        try:
            yield
        finally:
            task.cancel()

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            try:
                await self.sweep()
            except Exception:  # the next round may succeed; without any the disk would fill
                log.exception("sweeping after visitors failed")

    async def sweep(self) -> None:
        """Delete files of visitors, and state of pages, not seen for `KEEP_S`."""
        for visitor in self.visitors.pop_gone(KEEP_S):
            self._quota.forget(visitor)
        for session in self.sessions.pop_gone(KEEP_S):
            self._forget_session(session)
        self._conversations.forget_older(KEEP_S)
        for paths in self._app.get_blocks().temp_file_sets:
            paths.clear()  # Gradio's own list for deleting, which grows with every file
        await anyio.to_thread.run_sync(self._delete_old)

    def _forget_session(self, session: str) -> None:
        blocks = self._app.get_blocks()
        holder, queue = self._app.state_holder, blocks._queue
        for kept in (
            holder.session_data,
            holder.time_last_used,
            queue.pending_messages_per_session,
            queue.pending_event_ids_session,
            blocks.pending_streams,
            blocks.pending_diff_streams,
        ):
            kept.pop(session, None)

    def _delete_old(self) -> None:
        oldest_s = time.time() - KEEP_S
        for path in self._folder.iterdir():
            if path not in self._not_swept and path.stat().st_mtime < oldest_s:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
