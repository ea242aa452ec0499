"""Owns fitting a conversation into the model's context by dropping its oldest turns.

A turn is a question with its answer. The system message, every turn that shows an image and the
last question always stay.
"""

from bisect import bisect_left, bisect_right
from functools import cache
from itertools import accumulate

from model.vlm_processor import IMAGE_TAG, Message, VLMProcessor

RESERVED_SHARE = 4  # turns are dropped for an answer of up to 1/4 of the context


class Context:
    """The room that a prompt and its answer share.

    Args:
        max_tokens: of prompt and answer together.
    """

    def __init__(self, processor: VLMProcessor, *, max_tokens: int):
        self.max_tokens = max_tokens
        self._processor = processor
        # A byte-level vocabulary spells each byte as one character: a token's length is its bytes.
        self._max_token_bytes = max(map(len, processor.tokenizer.get_vocab()))

    @property
    def max_characters(self) -> int:
        """A text with more characters cannot fit, whatever it says: it need not be tokenized."""
        return self.max_tokens * self._max_token_bytes

    def fit(
        self, messages: list[Message], *, max_new_tokens: int, open_thinking: bool = False
    ) -> tuple[list[Message], int]:
        """Drop the oldest turns until prompt and answer fit.

        Turns are dropped for an answer of up to 1/`RESERVED_SHARE` of the context. A longer answer
        gets what room is left, so that a large `max_new_tokens` does not erase the conversation.

        Args:
            open_thinking: as `VLMProcessor.render` takes it.
        Returns:
            messages, and the number of dropped turns.
        Raises:
            ValueError: even without those turns there is no room for an answer.
        """
        turns = _turns(messages)
        droppable = _droppable(turns)
        reserved = min(max_new_tokens, max(1, self.max_tokens // RESERVED_SHARE))

        def without(num_dropped: int) -> list[Message]:
            dropped = set(droppable[:num_dropped])
            return [m for i, turn in enumerate(turns) if i not in dropped for m in turn]

        @cache
        def num_tokens(num_dropped: int) -> int:
            return self._num_tokens(without(num_dropped), open_thinking=open_thinking)

        def fits(num_dropped: int) -> bool:
            return num_tokens(num_dropped) + reserved <= self.max_tokens

        # A bisection tokenizes the whole prompt at each guess; the sum of the turns' own sizes is
        # nearly always right, so it is tried first.
        fewest = self._fewest_to_drop(turns, droppable)
        room = self.max_tokens - reserved - num_tokens(len(droppable))
        sizes = self._turn_sizes([turns[i] for i in droppable[fewest:]])
        first = len(droppable) - bisect_right(list(accumulate(reversed(sizes))), room)
        is_enough = first == len(droppable) or fits(first)
        if not is_enough or (first > fewest and fits(first - 1)):
            first = fewest + bisect_left(range(fewest, len(droppable)), True, key=fits)
        if num_tokens(first) >= self.max_tokens:
            raise ValueError(
                f"the prompt has {num_tokens(first)} tokens{_without_turns(droppable)}, the model "
                f"takes {self.max_tokens} with the answer; shorten the question or use fewer images"
            )
        return without(first), first

    def check_length(self, messages: list[Message]) -> None:
        """Refuse, before it is tokenized, what cannot fit whatever turns are dropped.

        Raises:
            ValueError: what must stay has more characters than `max_characters`.
        """
        turns = _turns(messages)
        self._fewest_to_drop(turns, _droppable(turns))

    def _fewest_to_drop(self, turns: list[list[Message]], droppable: list[int]) -> int:
        """How many turns must go by the number of characters alone."""
        sizes = [sum(len(message["content"]) for message in turn) for turn in turns]
        left = sum(sizes)
        for num_dropped in range(len(droppable) + 1):
            if left <= self.max_characters:
                return num_dropped
            if num_dropped < len(droppable):
                left -= sizes[droppable[num_dropped]]
        raise ValueError(
            f"the prompt has {left:,} characters{_without_turns(droppable)}, no prompt of over "
            f"{self.max_characters:,} fits: the model takes {self.max_tokens} tokens with the "
            "answer; shorten the question"
        )

    def _turn_sizes(self, turns: list[list[Message]]) -> list[int]:
        """Tokens of each turn on its own; beside its neighbours it may have a few more or fewer."""
        if not turns:
            return []
        tokenizer = self._processor.tokenizer
        start, end = tokenizer.bos_token, tokenizer.eos_token  # ChatML
        texts = ["".join(f"{start}{m['role']}\n{m['content']}{end}\n" for m in t) for t in turns]
        # The tokenizer fails on a lone surrogate; `render` refuses it if its turn stays.
        texts = [text.encode(errors="replace").decode() for text in texts]
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _num_tokens(self, messages: list[Message], *, open_thinking: bool) -> int:
        text = self._processor.render(
            messages, add_generation_prompt=True, open_thinking=open_thinking
        )
        return len(self._processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def _turns(messages: list[Message]) -> list[list[Message]]:
    """Each question begins a turn; messages before the first question are a turn too."""
    turns: list[list[Message]] = []
    for message in messages:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def _droppable(turns: list[list[Message]]) -> list[int]:
    """Indices of the turns that may be dropped, oldest first."""
    return [
        i
        for i, turn in enumerate(turns[:-1])
        if not any(m["role"] == "system" or IMAGE_TAG in m["content"] for m in turn)
    ]


def _without_turns(droppable: list[int]) -> str:
    return " without its earlier text turns" if droppable else ""
