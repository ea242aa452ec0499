"""Owns what Gradio keeps and does by itself, held to what the page needs.

Gradio 6 looks into its queue a thousand times a second, makes a table of all questions so far
after each one, and remembers every page that was ever opened.
"""

import asyncio
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from model.serving.web.protection.presence import Presence
from model.serving.web.protection.quota import Quota

log = logging.getLogger(__name__)
KEEP_S = 3600  # files and conversation of a visitor who has gone
SWEEP_EVERY_S = 60
MAX_SESSIONS = 1000  # pages whose state is kept at once, 70 kB each without its conversation
LOOK_EVERY_S = 0.05  # into the queue: a question waits half of that
PROGRESS_EVERY_S = 3600.0  # progress bars, of which the page has none


def set_before_import() -> None:
    """What Gradio reads from the environment when it is imported."""
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ANALYTICS_MAX_EVENTS": "1",  # the tables of the monitoring page, which is off
        "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(2**62),
    }


def calm(blocks) -> None:
    """Let a queue that has been made look around less often."""
    blocks._queue.sleep_when_free = LOOK_EVERY_S
    blocks._queue.progress_update_sleep_when_free = PROGRESS_EVERY_S


class Care:
    """Who is at the page, and the cleaning up after those who have gone.

    Args:
        folder: of all files that visitors see. What lies in `kept` stays, what lies in `uploads`
            goes with its visitor, and the rest, which Gradio writes, when it is old.
    """

    def __init__(self, folder: Path, quota: Quota, *, uploads: Path, kept: Path):
        self._folder, self._quota = folder, quota
        self._not_swept = {uploads, kept}
        self._app = None
        self.visitors = Presence(lambda name: name in quota)
        self.sessions = Presence(self._has_session)

    def _has_session(self, session: str) -> bool:
        return self._app is not None and session in self._app.state_holder

    def knows(self, session: str) -> bool:
        """Whether something was asked in that session whose answer can be read."""
        queue = self._app.get_blocks()._queue
        return session in queue.pending_messages_per_session

    @asynccontextmanager
    async def lifespan(self, app) -> AsyncIterator[None]:
        """Sweeps while the server runs."""
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
            except Exception:  # the next round may do better; a page without one fills the disk
                log.exception("sweeping after visitors failed")

    async def sweep(self) -> None:
        """Delete the files of visitors, and the state of pages, that have been gone for long."""
        for visitor in self.visitors.pop_gone(KEEP_S):
            self._quota.forget(visitor)
        for session in self.sessions.pop_gone(KEEP_S):
            self._forget_session(session)
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
