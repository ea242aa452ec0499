"""Owns ending a text that comes in pieces at a stop string."""


class StopText:
    """Ends a text that comes in pieces in front of the first stop string that is complete.

    Of two that end at the same character the longer one counts. Runs in time linear in the text,
    by the automaton of Knuth, Morris and Pratt.
    Source: D. Knuth, J. Morris, V. Pratt, "Fast pattern matching in strings" (1977).
    """

    def __init__(self, stops: list[str]):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        # Of each stop string: the length of its longest prefix that the text ends with.
        self._num_matched = [0] * len(stops)
        self._held = ""  # may be the start of a stop string
        self.is_found = False
        self.num_withheld = 0  # characters pushed and not returned, so far or for good

    def push(self, piece: str) -> str:
        """Text that cannot belong to a stop string."""
        text = self._held + piece
        for end, character in enumerate(piece, start=len(self._held) + 1):
            complete = 0
            for i, (stop, borders) in enumerate(self._stops):
                n = self._num_matched[i]
                while n and stop[n] != character:
                    n = borders[n]
                n += stop[n] == character
                self._num_matched[i] = n
                complete = max(complete, n if n == len(stop) else 0)
            if complete:
                self.is_found, self._held = True, ""
                self.num_withheld = len(text) - (end - complete)
                return text[: end - complete]
        num_certain = len(text) - max(self._num_matched, default=0)
        self._held = text[num_certain:]
        self.num_withheld = len(self._held)
        return text[:num_certain]

    def rest(self) -> str:
        """The text held back, once the answer has ended without a stop string."""
        held, self._held = self._held, ""
        self.num_withheld -= len(held)
        return held


def _borders(word: str) -> list[int]:
    """For each prefix of the word, by length: its longest proper prefix that is also its suffix."""
    borders = [0, 0]
    for character in word[1:]:
        n = borders[-1]
        while n and word[n] != character:
            n = borders[n]
        borders.append(n + (word[n] == character))
    return borders
