"""Scores and events in OpenAI's shapes, where texts hold parts of characters and odd ends of lines."""

import json

from polymerge.engine.streaming import Piece, TokenScore
from polymerge.serve.answers import Gathered
from polymerge.serve.shapes import CompletionShape, event


def test_an_event_is_one_line_for_every_client() -> None:
    text = "a\u2028b\u2029c\x85d\ne"
    sent = event({"text": text}).decode()
    assert len(sent.splitlines()) == 2 and sent.endswith("\n\n")
    assert json.loads(sent.removeprefix("data: "))["text"] == text


def part(start: int, text: str = "\ufffd") -> TokenScore:
    return TokenScore(text, -1.0, ((text, -1.0), ("\ufffd", -2.0), ("b", -3.0), ("\ufffd", -4.0)), (7, 8, 9, 10), start)


def test_offsets_are_places_in_the_text_and_all_alternatives_stay() -> None:
    shape = CompletionShape("m", "f" * 16, scored=True, echoes=["x🙂"])
    prompt = (TokenScore("x", None, start=0), part(1), part(1), part(1))
    answer = Gathered("é!", 3, "stop", [part(0), part(0), part(1, "!")], list(prompt))
    told = shape.choice(0, answer)["logprobs"]
    assert told["text_offset"] == [0, 1, 1, 1, 2, 2, 3]  # where each token's character begins in "x🙂é!"
    assert told["top_logprobs"][1] == {"\ufffd": -1.0, "token_id:8": -2.0, "b": -3.0, "token_id:10": -4.0}
    assert [len(top or ()) for top in told["top_logprobs"]] == [0, 4, 4, 4, 4, 4, 4]


def test_a_stream_has_the_offsets_of_the_whole() -> None:
    scores = [TokenScore("é", -1.0, start=0), TokenScore(" b", -1.0, start=1)]
    for echoes, first in ((["x🙂"], 2), (None, 0)):
        shape = CompletionShape("m", "f" * 16, scored=True, echoes=echoes)
        pieces = [
            shape.delta(0, Piece("é", 1, None, (scores[0],))),
            shape.delta(0, Piece(" b", 2, "stop", (scores[1],))),
        ]
        assert [piece["logprobs"]["text_offset"] for piece in pieces] == [[first], [first + 1]]


def test_engines_that_know_no_places_count_characters() -> None:
    shape = CompletionShape("m", "f" * 16, scored=True, echoes=None)
    scores = [TokenScore("ab", -1.0), TokenScore("c", -1.0)]
    assert shape.choice(0, Gathered("abc", 2, "stop", scores))["logprobs"]["text_offset"] == [0, 2]
