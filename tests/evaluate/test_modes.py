"""Every mode sends a question where its name says."""

import pytest

from polymerge.errors import ModelError
from polymerge.evaluate import Question, chooser
from tests.scripted import ScriptedRouter

EXPERTS = ["math", "shell"]
ROUTER = ScriptedRouter({"add": "math", "list": "shell"})
QUESTIONS = [Question("add 2 and 3", "sums"), Question("list files", "shell", {"kind": "files"}), Question("hello")]


def test_average_and_one_expert_do_not_look_at_the_question() -> None:
    assert chooser("average", EXPERTS)(QUESTIONS) == [None] * 3
    assert chooser("expert:shell", EXPERTS)(QUESTIONS) == ["shell"] * 3


def test_routed_takes_the_routers_choice_and_its_fallback() -> None:
    assert chooser("routed", EXPERTS, router=ROUTER)(QUESTIONS) == ["math", "shell", None]


def test_a_question_without_a_text_is_not_routed() -> None:
    router = ScriptedRouter({"add": "math"})
    asked = [Question(""), Question("add 1 1"), Question("")]
    assert chooser("routed", EXPERTS, router=router)(asked) == [None, "math", None]
    assert chooser("mixture", EXPERTS, router=router)(asked)[0] is None
    assert router.seen == ["add 1 1"] * 2


def test_a_mixture_weighs_experts_by_the_probabilities_of_their_fields() -> None:
    [first, *_] = chooser("mixture", EXPERTS, router=ROUTER)(QUESTIONS)
    assert first == pytest.approx({"math": 0.8, "shell": 0.2})
    [first, *_] = chooser("mixture", EXPERTS, router=ROUTER, fields={"math": "shell"})(QUESTIONS)
    assert first == pytest.approx({"shell": 0.8, "average": 0.2})


def test_oracle_goes_by_the_tasks_name_or_by_a_key_of_the_row() -> None:
    assert chooser("oracle", EXPERTS, best={"sums": "math"})(QUESTIONS[:2]) == ["math", "shell"]
    choose = chooser("oracle", EXPERTS, best={"files": "shell"}, label="kind")
    assert choose(QUESTIONS[1:2]) == ["shell"]
    with pytest.raises(ModelError, match="has no key 'kind'"):
        choose(QUESTIONS[:1])


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("expert:maths", {}, "no such expert"),
        ("fastest", {}, "unknown mode 'fastest'"),
        ("routed", {}, "no router"),
        ("oracle", {"best": {"a": "nobody"}}, "no expert 'nobody'"),
    ],
)
def test_a_mode_that_cannot_work_is_refused_before_anything_runs(mode: str, options: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        chooser(mode, EXPERTS, **options)


def test_oracle_without_a_known_expert_says_how_to_name_one() -> None:
    with pytest.raises(ModelError, match="--best sums=EXPERT"):
        chooser("oracle", EXPERTS)(QUESTIONS)
