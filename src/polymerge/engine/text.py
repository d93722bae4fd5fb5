"""From tokens to text that may be shown at once: whole characters only, and nothing that may begin a stop text.

Stop texts are looked for in the text with its special tokens, so that `<|im_end|>` is seen; what is shown is without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress

from ..errors import ModelError

# (token ids, with special tokens) -> text
Decode = Callable[[Sequence[int], bool], str]
UNFINISHED = "\ufffd"  # what a tokenizer writes for the bytes of a character that is not whole yet
# A character has at most four bytes; a run of more tokens without a whole one is text that holds the sign itself.
MAX_HELD_TOKENS = 8


def check_text(text: str) -> None:
    """Raises ModelError for what is no text: a lone half of a character (surrogate) has no bytes and no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        message = f"the text holds {half} at place {error.start}, which is half a character and no text"
        raise ModelError(message) from None


def in_vocabulary(ids: Sequence[int], tokens: int) -> list[int]:
    """Token ids as they are. Raises ModelError for one outside a vocabulary of so many."""
    if ids and not (min(ids) >= 0 and max(ids) < tokens):
        wrong = next(token for token in ids if not 0 <= token < tokens)
        raise ModelError(f"token {wrong}: the vocabulary ends at {tokens - 1}")
    return list(ids)


class TextStream:
    """The text of one answer, token by token.

    Args:
        stops: texts at which the answer ends.

    Attributes:
        read: characters that the tokens so far have made, up to a stop text.
        shown: characters that were given out.
        stopped: whether a stop text has come; nothing does after it.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        # Tokenizers drop a text's first space and join some tokens, so a token's own text is what it adds to the text
        # of those before it: `_ids` are the tokens of the latest piece, `_known` of them, and what has come after them.
        self._ids: list[int] = []
        self._known = 0
        self._taken = self._taken_shown = 0  # characters of these tokens that were taken: with special tokens, without
        self._held = ""
        self._marks: list[bool] = []  # which characters of what is held may be shown
        self.read = self.shown = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """One more token. Returns what may be shown now."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._show(*self._take(final=False), final=False)

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        return "" if self.stopped else self._show(*self._take(final=True), final=True)

    def _take(self, *, final: bool) -> tuple[str, str]:
        """The next characters, with special tokens and without."""
        whole, shown = self._texts()
        waiting = whole.endswith(UNFINISHED) and len(self._ids) - self._known <= MAX_HELD_TOKENS
        if waiting and not final:
            return "", ""
        new, new_shown = whole[self._taken :], shown[self._taken_shown :]
        if new_shown:
            self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
            self._taken, self._taken_shown = (len(text) for text in self._texts())
        else:
            self._taken = max(self._taken, len(whole))
        return new, new_shown

    def _texts(self) -> tuple[str, str]:
        shown = self._decode(self._ids, False)
        return (self._decode(self._ids, True) if self._stops else shown), shown

    def _show(self, new: str, new_shown: str, *, final: bool) -> str:
        if not self._stops:
            self.read = self.shown = self.shown + len(new_shown)
            return new_shown
        new, marks = _marked(new, new_shown)
        text, marks = self._held + new, self._marks + marks
        before, self.stopped = first_stop(text, self._stops)
        kept = 0 if final or self.stopped else self._may_begin_a_stop(text)
        cut = len(before) - kept
        shown = "".join(compress(text[:cut], marks))
        self.read = self.shown + sum(marks[: len(before)])
        self.shown += len(shown)
        self._held, self._marks = text[cut:], marks[cut:]
        return shown

    def _may_begin_a_stop(self, text: str) -> int:
        """How many of the last characters may be the start of a stop text."""
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def first_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before its first stop text, and whether there was one."""
    places = [place for place in (text.find(stop) for stop in stops if stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _marked(whole: str, shown: str) -> tuple[str, list[bool]]:
    """A text with its special tokens, and which of its characters are those of the text without.

    Matched from the end: what a tokenizer leaves out of a piece stands before its word. Where the one is no part of the
    other, all is as it is shown, and there are no special tokens to be seen.
    """
    if whole == shown:
        return whole, [True] * len(whole)
    marks, left = [False] * len(whole), len(shown)
    for place in reversed(range(len(whole))):
        if left and whole[place] == shown[left - 1]:
            marks[place], left = True, left - 1
    return (shown, [True] * len(shown)) if left else (whole, marks)
