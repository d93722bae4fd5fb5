"""A conversation as token ids: with a template once and with its own special tokens, without one as lines."""

from polymerge.engine.chat import chat_ids
from tests.tiny import tiny_tokenizer

TURNS = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]


def test_a_template_writes_its_own_special_tokens_and_waits_for_the_model() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "<s>{% for m in messages %} {{ m['content'] }} </s>{% endfor %}{% if add_generation_prompt %} w9{% endif %}"
    )
    assert chat_ids(tokenizer, TURNS) == [1, 5, 6, 2, 7, 2, 9]


def test_without_a_template_turns_stand_below_each_other() -> None:
    assert chat_ids(tiny_tokenizer(), TURNS) == tiny_tokenizer().encode("w5 w6\nw7\n")
