"""Other people's clients against the server, unchanged: LiteLLM, lm-eval's models of both APIs, schemathesis."""

import os
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from polymerge.engine import GenerateRequest, ScoreRequest
from tests.serve.conftest import KEY, Server
from tests.tiny import tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.clients]

HELLO = [{"role": "user", "content": "w11 w20"}]


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(os.environ, "LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    return pytest.importorskip("litellm")


def test_litellm_answers_streams_and_embeds(server: Server, litellm: Any) -> None:
    options: dict[str, Any] = {"api_base": f"{server.url}/v1", "api_key": KEY}
    ask: dict[str, Any] = {"model": "openai/auto", "messages": HELLO, "temperature": 0, "max_tokens": 8, **options}
    expected = server.engine.generate([GenerateRequest(server.engine.chat_prompt(HELLO), "e1", 8)])[0]
    answer = litellm.completion(**ask)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.completion_tokens == expected.tokens
    chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert any(getattr(chunk, "usage", None) for chunk in chunks)
    seeded = litellm.completion(**ask | {"temperature": 1.0}, n=2, seed=3, top_p=0.9, stop=["w999"], logprobs=True)
    assert len(seeded.choices) == 2
    text = litellm.text_completion(
        model="text-completion-openai/e0", prompt="w5 w6", max_tokens=4, temperature=0, **options
    )
    assert text.choices[0].text == server.engine.generate([GenerateRequest([5, 6], "e0", 4)])[0].text
    vectors = litellm.embedding(model="openai/auto", input=["w5 w6"], encoding_format="float", **options)
    assert len(vectors.data[0]["embedding"]) == 48
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**ask | {"model": "openai/e7"})
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**ask | {"api_key": "wrong"})


@pytest.fixture
def harness(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's model for any OpenAI-compatible server, with the bundle's tokenizer."""
    models = pytest.importorskip("lm_eval.models.openai_completions")
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return models.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="e1", tokenizer=str(tmp_path), max_length=128, batch_size=2
    )


def test_lm_evals_local_completions_scores_as_the_engine_does(server: Server, harness: Any) -> None:
    from lm_eval.api.instance import Instance

    pairs = [("w5 w6 w7", " w8"), ("w5", " w9 w10 w11"), ("w20 w21", " w22 w23"), ("w5 w6 w7", " w40")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    scores = harness.loglikelihood(requests)
    ids = [[server.engine.encode(text, special=False) for text in pair] for pair in pairs]
    expected = server.engine.loglikelihood([ScoreRequest(c, a, "e1") for c, a in ids])
    for (logprob, greedy), score in zip(scores, expected, strict=True):
        assert logprob == pytest.approx(score.log_likelihood, abs=1e-2)
        assert greedy == score.is_greedy
    until = {"until": ["w999"], "max_gen_toks": 6, "do_sample": False, "temperature": 0}
    texts = harness.generate_until([Instance("generate_until", {}, ("w5 w6", until), 0)])
    assert texts == [server.engine.generate([GenerateRequest([5, 6], "e1", 6)])[0].text]


def test_lm_eval_runs_a_local_task(server: Server, harness: Any, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (tmp_path / "rows.jsonl").write_text(
        '{"q": "w5 w6", "c": ["w7", "w8"], "a": 0}\n{"q": "w9", "c": ["w1", "w3"], "a": 1}\n'
    )
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'rows.jsonl'}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: "{{a}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(model=harness, tasks=["tiny"], task_manager=manager, bootstrap_iters=0)
    assert 0 <= results["results"]["tiny"]["acc,none"] <= 1


def test_lm_evals_chat_completions_runs_a_local_task(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `lm_eval --model local-chat-completions --apply_chat_template` asks, with examples as turns."""
    models = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    chat = models.LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", model="e1", max_retries=1)
    (tmp_path / "rows.jsonl").write_text('{"q": "w5 w6", "a": "w7"}\n{"q": "w11", "a": "w3"}\n')
    (tmp_path / "talk.yaml").write_text(
        "task: talk\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'rows.jsonl'}\ntest_split: test\nfewshot_split: test\noutput_type: generate_until\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\nnum_fewshot: 1\n'
        'generation_kwargs:\n  until: ["w999", "w998"]\n  max_gen_toks: 6\n  do_sample: false\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(
        model=chat, tasks=["talk"], task_manager=manager, apply_chat_template=True, fewshot_as_multiturn=True,
        log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    samples = results["samples"]["talk"]
    assert len(samples) == 2
    turns = [{"role": "user", "content": "w11"}, {"role": "assistant", "content": "w3"}]
    asked = server.engine.chat_prompt([*turns, {"role": "user", "content": "w5 w6"}], expert="e1")
    expected = server.engine.generate([GenerateRequest(asked, "e1", 6)])[0].text
    assert expected in {text for sample in samples for text in sample["resps"][0]}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_of_the_schema_is_a_server_error(server: Server, mode: GenerationMode) -> None:
    """schemathesis makes requests from /openapi.json: right ones, and wrong ones."""
    key = {"authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=key)
    asked = set()
    for operation in (described.ok() for described in schema.get_all_operations()):
        if mode == GenerationMode.NEGATIVE and operation.method == "get":
            continue  # there is nothing to be wrong in them

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            case.call_and_validate(headers=key, checks=[not_a_server_error])

        ask()
        asked.add(operation.path)
    answering = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/route"}
    assert answering <= asked
