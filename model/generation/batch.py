"""Owns decoding the answers of many requests in one batch that grows and shrinks.

Requests join between two token steps, once their prompts are computed, and leave when they end, are
cancelled or fail; nobody waits for anybody else's answer. Each takes its tokens at its own pace.
What fails is told to the request that it failed for alone.

All is computed in one thread, which lives while there are answers to give: several would share the
cores, and each would read all weights for its own tokens.

Shapes: B rows, V vocabulary.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Generator

import torch
from torch import Tensor

from model.generation.decoding import token_scores
from model.generation.member import Member
from model.generation.prefill import Filled, go_together, prefill
from model.generation.prefixes import Prefixes
from model.generation.sampler import choose_each
from model.generation.shelves import Shelves
from model.generation.stream import NO_ROOM_ADVICE
from model.generation.token_step import TokenStep
from model.machine.device import OutOfMemory, out_of_memory_line
from model.model_vlm import MiniMindVLM

ROWS = 32  # answers at once, unless a flag says otherwise
MAX_WAIT_S = 600  # for room in the batch
FULL_CONTEXTS = 2  # the tokens that all rows together may come to hold


class Batch:
    """The batch of a model, and its thread.

    Between two steps prompts are computed for about as long as a step takes: answers that are
    being read never stop for those that begin. Requests begin in the order in which they came.

    Args:
        step: of the same model.
        num_rows: most answers at once.
        max_tokens: of the model's context. All rows together may come to hold `FULL_CONTEXTS` of
            it, so that many take no more memory than a few; one always has room.
    """

    def __init__(self, model: MiniMindVLM, step: TokenStep, *, num_rows: int, max_tokens: int):
        self._model, self._step = model, step
        self._num_rows, self._most_tokens = num_rows, FULL_CONTEXTS * max_tokens
        self._past: Shelves[Member] = Shelves()
        self._prefixes = Prefixes(num_image_tokens=model.config.num_image_tokens)
        self._lock = threading.Lock()  # of what follows
        self._waiting: deque[Member] = deque()
        self._thread: threading.Thread | None = None
        self._beginning: tuple[list[Member], Generator[None, None, list[Filled]]] | None = None
        self._step_s = 0.0  # of the last step

    def join(self, member: Member) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="batch")
                thread.start()
                self._thread = thread
            member.joined_s = time.monotonic()
            self._waiting.append(member)

    @torch.inference_mode()
    def _run(self) -> None:
        while self._has_work():
            try:
                self._drop_ended()
                self._begin()
                self._advance()
            except Exception as error:  # of no single row: nobody must wait for ever
                self._fail_all(error)

    def _has_work(self) -> bool:
        """False ends the thread: there is nobody to answer, or the program ends."""
        if not threading.main_thread().is_alive():
            self._fail_all(None)
        with self._lock:
            if self._waiting or self._beginning or self._past.owners:
                return True
            self._thread = None
            return False

    def _drop_ended(self) -> None:
        """Those whose readers want no more leave; so do those that have waited too long."""
        for member in self._past.owners:
            if member.wants_no_more:
                self._past.drop(member)
                member.tell(None)
        if self._beginning and all(member.wants_no_more for member in self._beginning[0]):
            for member in self._beginning[0]:
                member.tell(None)
            self._beginning = None
        with self._lock:
            waiting, self._waiting = list(self._waiting), deque()
            for member in waiting:
                if member.wants_no_more:
                    member.tell(None)
                elif time.monotonic() - member.joined_s > MAX_WAIT_S:
                    member.tell(TimeoutError("no room for this answer; try again later"))
                else:
                    self._waiting.append(member)

    def _begin(self) -> None:
        """Compute prompts of those who wait, for about as long as a step takes."""
        until_s = time.perf_counter() + self._step_s
        while self._beginning or self._take_next():
            assert self._beginning is not None
            members, pieces = self._beginning
            try:
                next(pieces)
            except StopIteration as end:
                self._beginning = None
                for member, filled in zip(members, end.value, strict=True):
                    self._put(member, filled)
            except Exception as error:
                self._beginning = None
                self._begin_apart(members, error)
            if time.perf_counter() >= until_s:
                return

    def _take_next(self) -> bool:
        """Begin with the first of those who wait, if there is room for it, and with those behind it
        whose prompts go together with its."""
        chosen: list[Member] = []
        with self._lock:
            while self._waiting and self._fits(chosen, self._waiting[0]):
                chosen.append(self._waiting.popleft())
        if not chosen:
            return False
        prefix = None
        if len(chosen) == 1 and chosen[0].contents is not None:
            mask = chosen[0].inputs["image_mask"][0]
            prefix = self._prefixes.find(chosen[0].contents, mask)
        inputs = [member.inputs for member in chosen]
        self._beginning = chosen, prefill(self._model, inputs, prefix)
        return True

    def _fits(self, chosen: list[Member], more: Member) -> bool:
        """Whether there is room for one more, and it begins together with those chosen before."""
        held = [*self._past.owners, *chosen]
        num_tokens = sum(member.most_tokens for member in (*held, more))
        if held and (len(held) >= self._num_rows or num_tokens > self._most_tokens):
            return False
        both = [*chosen, more]
        is_alone = any(m.begins_alone or "vision_features" in m.inputs for m in both)
        lengths = [member.ahead.num_prompt_tokens for member in both]
        return not chosen or (not is_alone and go_together(lengths))

    def _begin_apart(self, members: list[Member], error: Exception) -> None:
        """After prompts that failed: one by one, so that only those that fail by themselves do."""
        if len(members) == 1:
            members[0].tell(told(error))
            return
        traceback.clear_frames(error.__traceback__)
        for member in members:
            member.begins_alone = True
        with self._lock:
            self._waiting.extendleft(reversed(members))

    def _put(self, member: Member, filled: Filled) -> None:
        """A computed prompt gets its first token, and joins the batch unless that is its last."""
        member.inputs = {}
        try:
            self._choose([member], filled.logits)
            if member.was_broken:
                return
            if member.contents is not None:
                self._prefixes.keep(member.contents, filled.states)
            if not member.has_ended:
                self._past.put(filled.states, member)
        except Exception as error:
            member.tell(told(error))

    def _advance(self) -> None:
        """A token for every row."""
        for member in self._past.full:
            try:
                self._past.move(member)
            except Exception as error:
                self._fail(member, error)
        members = self._past.owners
        if not members:
            return
        started_s = time.perf_counter()
        try:
            logits = self._step(self._newest(members), self._past).float()
        except Exception as error:
            logits = self._each_alone(members, error)
            members = self._past.owners
        if members:
            self._choose(members, logits)
        for member in self._past.owners:
            if member.has_ended:
                self._past.drop(member)
        self._step_s = time.perf_counter() - started_s

    def _newest(self, members: list[Member]) -> Tensor:
        ids = [member.ahead.new_ids[-1] for member in members]
        return torch.tensor(ids, device=self._model.device)

    def _each_alone(self, members: list[Member], error: Exception) -> Tensor:
        """After a step that failed: row by row, so that only rows that fail by themselves leave.

        Returns:
            The logits (B, V) of the rows that are left.
        """
        self._past.close_slot()
        logits = []
        for member in members:
            try:
                if len(members) == 1:
                    raise error
                own = self._step(self._newest([member]), self._past.alone(member)).float()
                logits.append((member, own))
            except Exception as own_error:
                self._fail(member, own_error)
        self._past.open_slot()
        by_owner = {id(member): own for member, own in logits}
        return torch.cat([by_owner[id(m)] for m in self._past.owners]) if logits else torch.empty(0)

    def _choose(self, members: list[Member], logits: Tensor) -> None:
        """Give each the next token by its logits (B, V); numbers that are none fail their row."""
        is_sound = logits.amax(-1).isfinite()  # -inf forbids a token, and is sound beside others
        logits = logits.where(is_sound[:, None], 0)
        tokens = choose_each([m.sampler for m in members], logits)
        rows = zip(members, tokens.tolist(), is_sound.tolist(), strict=True)
        for row, (member, token, is_good) in enumerate(rows):
            if not is_good:
                self._fail(member, RuntimeError("the model gives numbers that are not finite"))
                continue
            place = slice(row, row + 1)
            scores = token_scores(logits[place], tokens[place], num_likeliest=member.num_logprobs)
            member.give(token, scores[0] if scores else None)

    def _fail(self, member: Member, error: Exception) -> None:
        if any(own is member for own in self._past.owners):
            self._past.drop(member)
        member.tell(told(error))

    def _fail_all(self, error: Exception | None) -> None:
        failure = None if error is None else told(error)
        members = self._past.owners
        self._past = Shelves()
        if self._beginning:
            members += self._beginning[0]
            self._beginning = None
        with self._lock:
            members += self._waiting
            self._waiting.clear()
        for member in members:
            member.tell(failure)


def told(error: Exception) -> Exception:
    """An error as its request's reader gets it: its frames hold no tensors any more."""
    traceback.clear_frames(error.__traceback__)
    line = out_of_memory_line(error, advice=NO_ROOM_ADVICE)
    return error if line is None else OutOfMemory(line)
