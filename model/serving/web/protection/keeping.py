"""Owns the conversations that a page which is opened again gets back.

The browser's tab keeps a ticket that nobody can guess; the server the conversation, for as long
as it keeps files of a visitor who has left.
"""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Conversation = TypeVar("Conversation")


class Kept(Generic[Conversation]):
    """Conversations by ticket. Safe to share between threads.

    Args:
        max_kept: beyond that the one not used for longest is forgotten.
        clock: monotonic seconds.
    """

    def __init__(self, *, max_kept: int, clock: Callable[[], float] = time.monotonic):
        self._max_kept, self._clock, self._lock = max_kept, clock, threading.Lock()
        self._kept: OrderedDict[str, tuple[float, Conversation]] = OrderedDict()  # oldest first

    @staticmethod
    def new_ticket() -> str:
        return secrets.token_urlsafe(16)

    def put(self, ticket: str, conversation: Conversation) -> None:
        with self._lock:
            self._kept.pop(ticket, None)
            self._kept[ticket] = (self._clock(), conversation)
            while len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)

    def get(self, ticket: str) -> Conversation | None:
        with self._lock:
            found = self._kept.get(ticket)
        return None if found is None else found[1]

    def drop(self, ticket: str) -> None:
        with self._lock:
            self._kept.pop(ticket, None)

    def forget_older(self, than_s: float) -> None:
        """Forget those not put for longer than that."""
        oldest_s = self._clock() - than_s
        with self._lock:
            while self._kept and next(iter(self._kept.values()))[0] < oldest_s:
                self._kept.popitem(last=False)
