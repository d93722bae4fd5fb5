"""Text token by token: whole characters, stop texts across tokens and among special tokens."""

from collections.abc import Sequence

import pytest

from polymerge.engine.text import TextStream
from tests.tiny import byte_tokenizer, tiny_tokenizer


def streamed(tokenizer: object, ids: Sequence[int], *stops: str) -> tuple[list[str], bool, int]:
    """The pieces, whether a stop text came, and how many tokens were read."""

    def decode(ids: Sequence[int], special: bool) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=not special)  # type: ignore[attr-defined]
        return text

    stream = TextStream(decode, stops)
    pieces = []
    for count, token in enumerate(ids, 1):
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, True, count
    pieces.append(stream.finish())
    return pieces, stream.stopped, len(ids)


WORDS = [5, 2, 6, 0, 0, 17, 18]  # w5 </s> w6 <pad> <pad> w17 w18


@pytest.mark.parametrize(
    ("stops", "text", "read"),
    [
        ((), "w5 w6 w17 w18", None),
        (("w99",), "w5 w6 w17 w18", None),
        (("</s>",), "w5", 2),
        (("5 </s> w6",), "w", 3),
        (("<pad> <pad>",), "w5 w6", 5),
        (("<pad> w17",), "w5 w6", 6),
        (("7 w",), "w5 w6 w1", 7),
        (("w6 w17",), "w5 w6 w17 w18", None),  # special tokens stand between the two
        (("17", "w1"), "w5 w6 ", 6),
        (("",), "w5 w6 w17 w18", None),
    ],
)
def test_stop_texts_are_looked_for_with_special_tokens_and_the_text_is_shown_without(
    stops: tuple[str, ...], text: str, read: int | None
) -> None:
    pieces, stopped, count = streamed(tiny_tokenizer(), WORDS, *stops)
    assert "".join(pieces).rstrip() == text.rstrip() and stopped == (read is not None)
    assert count == (read or len(WORDS))


def test_nothing_of_a_stop_text_is_shown_before_it_is_whole() -> None:
    pieces, stopped, _ = streamed(tiny_tokenizer(), [5, 6, 7, 8], "w6 w7 w9")
    assert pieces[:3] == ["w5", " ", ""] and "".join(pieces) == "w5 w6 w7 w8" and not stopped


def test_characters_of_several_tokens_are_shown_whole() -> None:
    tokenizer = byte_tokenizer()
    text = "aé日a本b"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    pieces, _, _ = streamed(tokenizer, ids)
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    for stop, before in (("日", "aé"), ("é日a本", "a"), ("本b", "aé日a"), ("日<s>", text)):
        pieces, stopped, _ = streamed(tokenizer, ids, stop)
        assert "".join(pieces) == before and stopped == (before != text)
    pieces, stopped, count = streamed(tokenizer, [*ids[:6], 1, *ids[6:]], "日<s>")
    assert ("".join(pieces), stopped, count) == ("aé", True, 7)


def test_half_a_character_does_not_hide_a_special_stop_text() -> None:
    tokenizer = byte_tokenizer()
    half = tokenizer.encode("日", add_special_tokens=False)[:2]
    pieces, stopped, count = streamed(tokenizer, [*half, 2, 5], "</s>")
    assert stopped and count == 3 and "".join(pieces).strip("\ufffd") == ""
