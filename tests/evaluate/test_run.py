"""The harness on scripted engines: which expert answers, what it is asked, and what counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from polymerge.errors import DataError, ModelError, RecipeError
from polymerge.evaluate import HarnessSettings, accuracy, chooser, evaluate, jsonl_tasks
from polymerge.evaluate.harness_model import PolymergeLM
from polymerge.evaluate.questions import check_task
from tests.scripted import ScriptedEngine, ScriptedRouter

EXPERTS = ["math", "shell"]
ROUTER = {"add": "math", "list": "shell", "count": "shell"}


def answer(expert: Any, prompt: str) -> str:
    """Each expert knows its own kind of question; the average knows nothing."""
    if expert == "math" and prompt.startswith("add"):
        return f"= {sum(int(word) for word in prompt.split()[1:])}"
    if expert == "shell" and prompt.startswith(("list", "count")):
        return prompt.split()[1]
    return "no idea"


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(answer, EXPERTS)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rows = {
        "math": [{"prompt": f"add {n} 1", "answer": f"{n} + 1 = {n + 1}", "final": str(n + 1)} for n in range(4)],
        "shell": [{"prompt": f"list {x}", "answer": x, "choices": ["a", "bb", "ccc"]} for x in ("a", "bb", "ccc")],
    }
    paths = {}
    for name, samples in rows.items():
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in samples))
    return paths


def accuracies(results: dict[str, Any]) -> dict[str, float | None]:
    return {task: accuracy(metrics) for task, metrics in results["results"].items()}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("average", {"math": 0.0, "shell": 0.0}),
        ("expert:math", {"math": 1.0, "shell": 0.0}),
        ("routed", {"math": 1.0, "shell": 1.0}),
        ("oracle", {"math": 1.0, "shell": 1.0}),
    ],
)
def test_a_mode_decides_what_is_right(
    engine: ScriptedEngine, files: dict[str, Path], mode: str, expected: dict[str, float]
) -> None:
    choose = chooser(mode, EXPERTS, router=ScriptedRouter(ROUTER))
    results = evaluate(engine, jsonl_tasks(files, ending="\n"), choose)
    if mode == "average":  # the shortest choice is the likeliest of three that nobody knows
        expected = {"math": 0.0, "shell": pytest.approx(1 / 3)}
    if mode == "expert:math":
        expected = {"math": 1.0, "shell": pytest.approx(1 / 3)}
    assert accuracies(results) == expected
    assert results["polymerge"]["fingerprint"] == "scripted"
    assert sum(results["polymerge"]["answered_by"]["shell"].values()) == 3


def test_all_choices_of_a_question_meet_the_expert_that_its_context_chose(engine: ScriptedEngine) -> None:
    router = ScriptedRouter(ROUTER)
    model = PolymergeLM(engine, chooser("routed", EXPERTS, router=router))
    pairs = [("list a", " add"), ("list a", " list"), ("", " add"), ("add 1 1", " list")]
    places = [("t", 0, 1), ("t", 0, 1), ("t", 0, 1), ("t", 1, 1)]
    model.loglikelihood(
        [Instance("loglikelihood", {}, pair, 0, place) for pair, place in zip(pairs, places, strict=True)]
    )
    assert [request.expert for request in engine.asked] == ["shell", "shell", "shell", "math"]
    assert router.seen == ["list a", "add 1 1"]
    assert {task: dict(counts) for task, counts in model.chosen.items()} == {"t": {"shell": 1, "math": 1}}


def test_white_space_between_context_and_continuation_belongs_to_the_continuation(engine: ScriptedEngine) -> None:
    model = PolymergeLM(engine)
    before, after = model.encode_pair("Question: \n", "yes")
    assert (engine.decode(before), engine.decode(after)) == ("Question:", " \nyes")
    assert model.encode_pair("", " yes") == ([], engine.encode(" yes", special=False))
    assert model.encode_pair(" \n", "yes")[0] == []


def test_the_first_token_stands_once_and_twice_is_refused() -> None:
    model = PolymergeLM(ScriptedEngine(answer, bos=True))
    assert model.encode_pair("ab", "c") == ([1, 97, 98], [99])
    assert model.encode_pair("¤ab", "c") == ([1, 97, 98], [99])  # ¤ is the first token as text
    with pytest.raises(ModelError, match="first token twice"):
        model.encode_pair("¤¤ab", "c")


class Template:
    """A tokenizer that has nothing but a chat template."""

    chat_template = "[user]content[model]"

    def apply_chat_template(self, history: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"[{message['role']}]{message['content']}" for message in history) + "[model]"


def test_a_router_sees_the_users_words_and_the_engine_the_chat_template(
    engine: ScriptedEngine, files: dict[str, Path]
) -> None:
    router = ScriptedRouter(ROUTER)
    settings = HarnessSettings(apply_chat_template=True, system_instruction="Be brief.", limit=2)
    choose = chooser("routed", EXPERTS, router=router)
    results = evaluate(engine, jsonl_tasks({"math": files["math"]}), choose, settings=settings, tokenizer=Template())
    assert router.seen == ["add 0 1", "add 1 1"]
    assert engine.decode(engine.asked[0].prompt) == "[system]Be brief.[user]add 0 1[model]"  # type: ignore[union-attr]
    assert results["polymerge"]["answered_by"] == {"math": {"math": 2}}


def test_a_chat_template_that_is_not_there_is_refused(engine: ScriptedEngine, files: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        evaluate(engine, jsonl_tasks(files), settings=HarnessSettings(apply_chat_template=True))


def test_a_rolling_log_likelihood_counts_every_token_once() -> None:
    engine = ScriptedEngine(answer)
    engine.max_length = 9
    model = PolymergeLM(engine)
    model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("abcdefghijklmnopqrst",), 0, ("t", 0, 1))])
    assert "".join(engine.decode(request.continuation) for request in engine.asked) == "abcdefghijklmnopqrst"  # type: ignore[union-attr]
    assert all(len(r.context) + len(r.continuation) <= 9 for r in engine.asked)  # type: ignore[union-attr]


def test_stop_texts_budgets_and_sampling_reach_the_engine_and_unknown_settings_do_not(engine: ScriptedEngine) -> None:
    model = PolymergeLM(engine)
    settings = {"until": ["\n", ""], "max_gen_toks": 5, "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    ask: Callable[..., Instance] = lambda kw: Instance("generate_until", {}, ("add 1 2", kw), 0, ("t", 0, 1))  # noqa: E731
    model.generate_until([ask(settings)])
    request: Any = engine.asked[0]
    assert (request.stop, request.max_new_tokens, request.temperature, request.top_p) == (("\n",), 5, 0.5, 0.9)
    with pytest.raises(ModelError, match="top_k is not one of"):
        model.generate_until([ask({"top_k": 3})])


def test_a_yaml_task_of_a_folder_runs_with_no_network(
    engine: ScriptedEngine, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(
        f"task: my_sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {files['shell']}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{choices.index(answer)}}'\nmetric_list: [{metric: acc}]\n"
    )
    choose = chooser("expert:shell", EXPERTS)
    results = evaluate(engine, ["my_su*"], choose, include_path=tmp_path / "tasks")
    assert accuracies(results) == {"my_sums": 1.0}
    by_path = evaluate(engine, [str(tmp_path / "tasks" / "sums.yaml")], choose)
    assert accuracies(by_path) == {"my_sums": 1.0}


@pytest.mark.parametrize(
    ("tasks", "path", "message"),
    [
        pytest.param(["helaswag"], None, "did you mean hellaswag", marks=pytest.mark.slow),
        (["nothing.yaml"], None, "no such task file"),
        (["x"], "/nowhere", "no such folder"),
        ([], None, "no tasks given"),
    ],
)
def test_an_unknown_task_is_one_line(engine: ScriptedEngine, tasks: list[str], path: str | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        evaluate(engine, tasks, include_path=path)


def test_rows_of_two_forms_in_one_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "q", "answer": "a"}\n{"prompt": "q", "answer": "a", "choices": ["a", "b"]}\n')
    with pytest.raises(DataError, match="put them into two files"):
        jsonl_tasks({"a": file})


@pytest.mark.parametrize(
    ("choices", "label", "said"),
    [
        (["a", "a", "b"], 0, "task shell, question 1: two choices are the same: 'a'"),
        (["a", "b", "a "], 0, "task shell, question 1: two choices are the same: 'a'"),
        (["a", " ", "b"], 0, "task shell, question 1: a choice is empty"),
        (["a", "", "b"], 0, "task shell, question 1: a choice is empty"),
        ([], 0, "task shell, question 1: it has no choices"),
        (["a"], 0, "task shell, question 1: it has one choice alone, which is always right"),
        (["a", 2], 0, "task shell, question 1: the choice 2 is no text"),
        (["a", None], 0, "task shell, question 1: the choice None is no text"),
        (["a", "b"], 2, "question 1: the label 2 is the number of none of the 2 choices, from 0"),
        (["a", "b"], -1, "question 1: the label -1 is the number of none"),
        (["a", "b"], "c", "question 1: the label 'c' is not one of the choices"),
        (["a", "b"], "", "question 1: the label '' is not one of the choices"),
        (["a", "b"], None, "question 1: the label None is not one of the choices"),
        (["a", "b"], [0, 5], "question 1: the label 5 is the number of none"),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_a_task_whose_choices_measure_nothing_is_one_line(
    engine: ScriptedEngine, files: dict[str, Path], choices: list[Any], label: Any, said: str, first: bool
) -> None:
    """In its second question; in its first one the harness itself stumbles over some."""
    [task] = jsonl_tasks({"shell": files["shell"]})
    odd = (lambda row: True) if first else (lambda row: row["answer"] == "bb")
    task |= {
        "doc_to_choice": lambda row: choices if odd(row) else list(row["choices"]),
        "doc_to_target": lambda row: label if odd(row) else 0,
    }
    problem = f"({said.replace('question 1', 'question 0')}|questions cannot be judged)" if first else said
    with pytest.raises(DataError, match=problem):
        evaluate(engine, [task])
    assert not engine.asked


def test_a_free_question_with_a_blank_answer_is_one_line(engine: ScriptedEngine, files: dict[str, Path]) -> None:
    [task] = jsonl_tasks({"math": files["math"]})
    del task["process_results"]
    task["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    task["doc_to_target"] = lambda row: " " if row["prompt"] == "add 2 1" else row["answer"]
    with pytest.raises(DataError, match="task math, question 2: the answer is empty"):
        evaluate(engine, [task])
    evaluate(engine, [task], settings=HarnessSettings(limit=2))  # what is not asked is not looked at


def test_answers_that_are_not_judged_need_no_right_one(engine: ScriptedEngine, files: dict[str, Path]) -> None:
    tasks = jsonl_tasks(files)
    for task, hidden in zip(tasks, ("", -1), strict=True):
        task.pop("process_results", None)
        task["doc_to_target"] = lambda row, hidden=hidden: hidden
    with pytest.raises(DataError, match="question 0"):
        evaluate(engine, tasks)
    assert not engine.asked
    results = evaluate(engine, tasks, settings=HarnessSettings(predict_only=True))
    assert {name: len(asked) for name, asked in results["samples"].items()} == {"math": 4, "shell": 3}
    [task] = jsonl_tasks({"shell": files["shell"]})
    evaluate(engine, [task | {"doc_to_choice": ["a", "a"]}], settings=HarnessSettings(predict_only=True))


def test_true_is_the_second_choice_as_the_harness_has_it(engine: ScriptedEngine, files: dict[str, Path]) -> None:
    [task] = jsonl_tasks({"shell": files["shell"]})
    task |= {"doc_to_choice": ["wrong, and long", "a"], "doc_to_target": lambda row: True}
    assert accuracies(evaluate(engine, [task])) == {"shell": 1.0}  # nobody knows, and the shorter one is likelier


def test_of_a_share_only_what_will_be_asked_is_looked_at(engine: ScriptedEngine, files: dict[str, Path]) -> None:
    [task] = jsonl_tasks({"shell": files["shell"]})
    task["doc_to_target"] = lambda row: 7 if row["answer"] == "ccc" else 0
    results = evaluate(engine, [task], settings=HarnessSettings(limit=0.5))
    assert results["n-samples"]["shell"]["effective"] == 2  # of 3, rounded up
    with pytest.raises(DataError, match="question 2: the label 7"):
        evaluate(engine, [task], settings=HarnessSettings(limit=0.9))


def test_a_task_that_judges_by_itself_is_not_judged_before(files: dict[str, Path]) -> None:
    from lm_eval.api.task import ConfigurableTask

    class Lenient(ConfigurableTask):  # type: ignore[misc]
        def process_results(self, doc: Any, results: Any) -> dict[str, float]:
            return {"acc": 1.0}

    [config] = jsonl_tasks({"shell": files["shell"]})
    config["doc_to_target"] = lambda row: 7 if row["answer"] == "bb" else 0
    check_task("shell", Lenient(config=dict(config)), None)
    with pytest.raises(DataError, match="the label 7"):
        check_task("shell", ConfigurableTask(config=dict(config)), None)


def test_a_misspelled_key_of_a_task_is_named(engine: ScriptedEngine, files: dict[str, Path]) -> None:
    [task] = jsonl_tasks({"shell": files["shell"]})
    with pytest.raises(RecipeError, match="no key 'doc_to_choise'; did you mean doc_to_choice"):
        evaluate(engine, [task | {"doc_to_choise": ["a", "b"]}])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "answer": "a", "choices": ["a", "b", "a"]}, "two choices are the same"),
        ({"prompt": "q", "answer": "a", "choices": ["a", "  "]}, "a choice is empty"),
        ({"prompt": "q", "answer": "a", "choices": ["a", "a "]}, "two choices are the same"),
        ({"prompt": "q", "answer": "a", "choices": []}, "choices: is empty"),
        ({"prompt": "q", "answer": "a", "choices": ["a"]}, "one choice alone"),
        ({"prompt": "q", "answer": "c", "choices": ["a", "b"]}, "the answer is not one of the choices"),
        ({"prompt": "q", "answer": "1", "choices": [1, "1"]}, "two choices are the same"),
        ({"prompt": "q", "answer": "a", "choices": ["a", True]}, "choices"),
        ({"prompt": "q", "answer": "a", "choices": ["a", None]}, "choices"),
        ({"prompt": "q", "answer": "a", "choices": "ab"}, "choices"),
        ({"prompt": "q", "answer": 7, "choices": ["a", "b"]}, "the answer is not one of the choices"),
        ({"prompt": "q", "answer": " "}, "the answer is empty"),
        ({"prompt": "q", "answer": ""}, "the answer is empty"),
    ],
)
def test_a_row_that_measures_nothing_is_one_line(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"x.jsonl.*{said}"):
        jsonl_tasks({"x": file})


MC = """task: t
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{c}}"
doc_to_target: "{{a}}"
metric_list: [{metric: acc}]
"""
FREE = (
    MC.replace("multiple_choice", "generate_until")
    .replace('doc_to_choice: "{{c}}"\n', "")
    .replace("acc", "exact_match")
)
GOOD = '{"q": "x", "c": ["a", "b"], "a": 0}\n'


@pytest.mark.parametrize(
    ("task", "rows", "said"),
    [
        (MC, '{"q": "x", "a": 0}\n', "t.yaml: its first question cannot be read: 'c' is undefined"),
        (MC, '{"c": ["a", "b"], "a": 0}\n', "'q' is undefined"),
        (MC.replace("{{q}}", "{{q"), GOOD, "t.yaml: its first question cannot be read: unexpected end of template"),
        (MC.replace("{{q}}", "{{q|zz}}"), GOOD, "No filter named 'zz'"),
        ("task: [\n", GOOD, r"cannot be read.*t.yaml"),
        (MC, "", "cannot be read"),
        (MC, "zz\n", "cannot be read"),
        (FREE, '{"q": "x", "a": null}\n{"q": "x", "a": "z"}\n', "task t, question 0: the answer is null"),
    ],
)
def test_a_yaml_task_that_cannot_be_read_is_one_line(
    engine: ScriptedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, rows: str, said: str
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "t.yaml").write_text(task.replace("ROWS", str(tmp_path / "rows.jsonl")))
    with pytest.raises(DataError, match=said):
        evaluate(engine, [str(tmp_path / "t.yaml")])
    assert not engine.asked


def test_an_answer_that_is_the_word_none_is_an_answer(
    engine: ScriptedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text('{"q": "x", "a": "None", "note": null}\n')
    (tmp_path / "t.yaml").write_text(FREE.replace("ROWS", str(tmp_path / "rows.jsonl")))
    evaluate(engine, [str(tmp_path / "t.yaml")])
    assert engine.asked


@pytest.mark.parametrize("limit", [0, -1, 1.5, float("nan"), float("inf")])
def test_a_limit_that_is_no_number_of_questions_is_refused(
    engine: ScriptedEngine, files: dict[str, Path], limit: float
) -> None:
    with pytest.raises(RecipeError, match="whole number of questions"):
        evaluate(engine, jsonl_tasks(files), settings=HarnessSettings(limit=limit))


def test_worked_examples_are_none_or_more_and_no_more_than_there_are_rows(
    engine: ScriptedEngine, files: dict[str, Path]
) -> None:
    with pytest.raises(RecipeError, match="0 or more"):
        evaluate(engine, jsonl_tasks(files), settings=HarnessSettings(num_fewshot=-1))
    with pytest.raises(DataError, match="fewer rows than --num-fewshot"):
        evaluate(engine, jsonl_tasks(files), settings=HarnessSettings(num_fewshot=99))


@pytest.mark.parametrize("options", ["max_gen_toks=0", "max_gen_toks=x", "until=3"])
def test_settings_of_an_answer_that_make_none_are_refused(
    engine: ScriptedEngine, files: dict[str, Path], options: str
) -> None:
    with pytest.raises(ModelError, match="generation_kwargs"):
        evaluate(engine, jsonl_tasks({"math": files["math"]}), settings=HarnessSettings(gen_kwargs=options))
