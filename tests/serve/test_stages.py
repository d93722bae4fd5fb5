"""The model `staged` with the real pipeline: the formatter writes in the running batch, the thinker is scripted."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from polymerge.engine.local.batching import BatchingEngine
from polymerge.errors import RecipeError
from polymerge.serve.app import create_app
from polymerge.serve.run import ThinkerChoice, serve
from polymerge.staged import Thought
from tests.conftest import Merged
from tests.serve.conftest import ScriptedPipeline, ScriptedRouter, Staged, running


class Thinker:
    name = fingerprint = "scripted"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def think(self, prompts: Sequence[str], *, max_tokens: int, deadline: float | None = None) -> list[Thought]:
        self.batches.append(len(prompts))
        return [Thought("w20 w21", 5, 2) for _ in prompts]

    def unload(self) -> None: ...


def test_many_ask_the_thinker_at_once_and_get_their_own_answers(
    engine: BatchingEngine, merged: Merged, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinker = Thinker()
    monkeypatch.setattr("polymerge.staged.open_thinker", lambda settings, device: thinker)
    bundle, router = merged("llama")[0], ScriptedRouter()
    pipeline = ThinkerChoice(thinker="https://host/v1", model="big", use="always").open(bundle, engine, router)
    with running(create_app(engine, router, pipeline), engine) as server, ThreadPoolExecutor(6) as pool:

        def ask(number: int) -> Any:
            text = ("w10", "w11", "w12")[number % 3] + f" w{30 + number}"
            return server.client().chat.completions.create(
                model="staged",
                messages=[{"role": "user", "content": text}],
                max_tokens=4,
                extra_body={"polymerge": {"thoughts": True}},
            )

        for number, answer in enumerate(pool.map(ask, range(6))):
            told = answer.polymerge
            assert (told["expert"], told["stage"], told["thoughts"]) == (f"e{number % 3}", "staged", "w20 w21")
            assert answer.usage.completion_tokens <= 2 + 4
    assert sum(thinker.batches) == 6


def test_without_a_number_an_answer_leaves_room_for_the_prompt(engine: BatchingEngine) -> None:
    """The tiny model's context is shorter than what a server gives at most."""
    asked: list[int] = []

    class Pipeline(ScriptedPipeline):
        def respond(self, questions: Sequence[Any], *, deadline: float | None = None) -> list[Staged]:
            asked.extend(question.max_new_tokens for question in questions)
            return super().respond(questions)

    with running(create_app(engine, None, Pipeline()), engine) as server:
        client, turn = server.client(), [{"role": "user", "content": "w5 " * 20}]
        client.chat.completions.create(model="staged", messages=turn)
        client.chat.completions.create(model="staged", messages=turn, max_tokens=7)
        with pytest.raises(openai.BadRequestError, match="the context is 128"):
            client.chat.completions.create(model="staged", messages=turn, max_tokens=120)
    assert asked == [(128 - 22) // 2, 7]


def test_a_thinker_that_cannot_be_is_a_line(engine: BatchingEngine, merged: Merged) -> None:
    with pytest.raises(RecipeError):
        ThinkerChoice(thinker="https://host/v1").open(merged("llama")[0], engine, None)  # an endpoint needs a model
    with pytest.raises(RecipeError):
        ThinkerChoice(use="sometimes").open(merged("llama")[0], engine, None)


def test_a_recipe_that_cannot_be_used_is_told_before_the_bundle_is_loaded(merged: Merged, tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(RecipeError, match="gone"):
        serve(merged("llama")[0].path, port=0, stages=ThinkerChoice(tmp_path / "gone.yaml"), say=told.append)
    assert told == []
