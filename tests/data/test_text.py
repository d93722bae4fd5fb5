"""Text that cannot be encoded is replaced where it enters."""

import pytest

from polymerge.data.text import encodable


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("plain", "plain"),
        ("", ""),
        ("\U0001f98a", "\U0001f98a"),
        ("\ud83d\udd8a", "\U0001f58a"),  # two halves that stand together are one character
        ("a\ud83db", "a\ufffdb"),
        ("\udd8a\ud83d", "\ufffd\ufffd"),
    ],
)
def test_lone_surrogates_become_the_replacement_character(text: str, clean: str) -> None:
    assert encodable(text) == clean
    assert clean.encode().decode() == clean
