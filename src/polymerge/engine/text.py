"""From tokens to text that may be shown at once: whole characters only, and nothing that may begin a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .sampling import first_stop

UNFINISHED = "\ufffd"  # what a tokenizer writes for the bytes of a character that is not whole yet
# A character has at most four bytes; a run of more tokens without a whole one is text that holds the sign itself.
MAX_HELD_TOKENS = 8


class TextStream:
    """The text of one answer, token by token.

    Args:
        decode: token ids -> text.
        stops: texts at which the answer ends.

    Attributes:
        read: characters that the tokens so far have made, up to a stop text.
        shown: characters that were given out.
        stopped: whether a stop text has come; nothing does after it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        # Tokenizers drop a text's first space and join some tokens, so a token's own text is what it adds to the text
        # of those before it: `_ids` are the tokens of the latest piece, and what has come after them.
        self._ids: list[int] = []
        self._known = 0
        self._held = ""
        self.read = self.shown = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """One more token. Returns what may be shown now."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._show(self._take(final=False), final=False)

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        return "" if self.stopped else self._show(self._take(final=True), final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._ids[: self._known])
        text = self._decode(self._ids)
        waiting = text.endswith(UNFINISHED) and len(self._ids) - self._known <= MAX_HELD_TOKENS
        if len(text) <= len(before) or (waiting and not final):
            return ""
        self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
        return text[len(before) :]

    def _show(self, new: str, *, final: bool) -> str:
        text, self.stopped = first_stop(self._held + new, self._stops)
        self.read = self.shown + len(text)
        kept = 0 if final or self.stopped else self._may_begin_a_stop(text)
        self._held = text[len(text) - kept :]
        shown = text[: len(text) - kept]
        self.shown += len(shown)
        return shown

    def _may_begin_a_stop(self, text: str) -> int:
        """How many of the last characters may be the start of a stop text."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
