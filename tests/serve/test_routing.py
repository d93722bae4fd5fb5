"""Which expert answers a conversation."""

import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest

from polymerge import Bundle
from polymerge.engine.local.batching import BatchingEngine
from polymerge.router import Route
from polymerge.router.embed import EmbedSettings
from polymerge.router.fit import fit_samples
from polymerge.router.samples import Sample
from polymerge.router.settings import FitSettings
from polymerge.serve.app import create_app
from polymerge.serve.errors import ApiError
from polymerge.serve.routing import Choice, Chooser
from polymerge.serve.run import bundle_router
from polymerge.serve.settings import ServeSettings
from tests.conftest import Merged
from tests.serve.conftest import KEY, ScriptedRouter, Server, running

AUTH = {"authorization": f"Bearer {KEY}"}


class Experts:
    experts = ("e0", "e1", "e2")


class Asked:
    """A chooser that is asked without an event loop of one's own."""

    def __init__(self, chooser: Chooser) -> None:
        self._chooser, self.models = chooser, chooser.models

    def choose(self, *args: Any, **more: Any) -> Choice:
        return asyncio.run(self._chooser.choose(*args, **more))

    @property
    def known(self) -> int:
        return len(self._chooser._known)


def chooser(router: Any = None, **limits: Any) -> Asked:
    return Asked(Chooser(Experts(), router, ServeSettings(**limits)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("turns", "sticky", "expert"),
    [
        (["w10"], True, "e0"),
        (["w10", "w11"], True, "e1"),  # sure of the new field: the expert changes
        (["w10", "w11 w13"], True, "e0"),  # not sure enough
        (["w10", "w11 w13"], False, "e1"),
        (["w10", "w5"], True, "e0"),  # says nothing: the conversation stays where it is
        (["w10", "w5"], False, None),
        (["w5", "w11 w13"], True, "e1"),  # nothing was known before
        (["w10", "w11", "w12 w13"], True, "e1"),
        (["w10", "w10 w13"], True, "e0"),
        (["w10", "  "], True, "e0"),
        ([" "], True, None),
        ([], True, None),
    ],
)
def test_a_conversation_changes_its_expert_only_for_a_clearly_likelier_field(
    turns: list[str], sticky: bool, expert: str | None
) -> None:
    assert chooser(ScriptedRouter()).choose("auto", turns, sticky=sticky).expert == expert


@pytest.mark.parametrize(("turn", "alone"), [("w11 w13", "one"), ("w5", "the fallback")])
def test_a_kept_expert_says_where_the_turn_alone_would_go(turn: str, alone: str) -> None:
    choice = chooser(ScriptedRouter()).choose("auto", ["w10", turn])
    assert choice.kept and choice.reason.endswith(f"alone would go to {alone}")


def test_only_new_turns_are_embedded_and_few_are_remembered() -> None:
    router = ScriptedRouter()
    choose = chooser(router, max_routes=30)
    choose.choose("auto", ["w10"])
    choose.choose("auto", ["w10", "w11"])
    choose.choose("auto", ["w10", "w11", "w11"])
    assert router.asked == ["w10", "w11"]
    for number in range(40):
        choose.choose("auto", [f"text {number}"])
    assert choose.known == 30


def test_only_the_latest_turns_and_a_clear_lead_count() -> None:
    turns = ["w10", "w5", "w5"]
    assert chooser(ScriptedRouter(), max_turns=3).choose("auto", turns).expert == "e0"
    assert chooser(ScriptedRouter(), max_turns=2).choose("auto", turns).expert is None
    turns = ["w10", "w11 w13"]  # 0.1 ahead
    assert chooser(ScriptedRouter(), margin=0.05).choose("auto", turns).expert == "e1"
    assert chooser(ScriptedRouter(), margin=0.15).choose("auto", turns).expert == "e0"


def test_without_a_router_there_is_no_auto() -> None:
    choose = chooser()
    assert choose.models == ["e0", "e1", "e2", "average"]
    with pytest.raises(ApiError, match="no router") as raised:
        choose.choose("auto", ["w10"])
    assert raised.value.status == 404 and raised.value.param == "model"


def test_headers_are_ascii_whatever_fields_and_mixtures_are_called() -> None:
    route = Route({"müh": 0.5, "e1": 0.5}, "Größe\r\nx: y", 0.5, {})
    headers = Choice(route.expert, route).headers
    assert all(value.isascii() and "\n" not in value for value in headers.values())
    assert Choice(route.expert, route).body["expert"] == {"müh": 0.5, "e1": 0.5}


def test_the_route_endpoint_tells_routes_and_makes_no_tokens(server: Server) -> None:
    def ask(body: Any) -> Any:
        answer = httpx2.post(f"{server.url}/v1/route", json=body, headers=AUTH)
        return answer.json() | {"status": answer.status_code}

    one = ask({"input": "w11"})
    assert one["data"][0]["expert"] == "e1" and one["data"][0]["scores"]["one"] == 0.9
    assert [route["expert"] for route in ask({"input": ["w10", "w12"]})["data"]] == ["e0", "e2"]
    turns = [{"role": "user", "content": "w10"}, {"role": "user", "content": "w5"}]
    kept = ask({"messages": turns})
    assert kept["polymerge"]["expert"] == "e0" and kept["polymerge"]["kept"] and kept["route"]["field"] == "zero"
    alone = ask({"messages": turns, "polymerge": {"sticky": False}})
    assert alone["polymerge"]["expert"] == "average" and alone["polymerge"]["fallback"]
    for body in ({}, {"input": " "}, {"input": "w5", "messages": turns}, {"input": []}):
        assert ask(body)["status"] == 400


def test_embeddings_are_the_routers_where_it_has_some(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Embedder:
        def embed(self, texts: list[str]) -> Any:
            vectors = np.ones((len(texts), 2), dtype=np.float32)
            return SimpleNamespace(vectors=vectors, truncated=[0, 3][: len(texts)])

    router = ScriptedRouter()
    router.embedder = Embedder()  # type: ignore[attr-defined]
    with running(create_app(server.engine, router), server.engine) as other:
        body = {"model": "auto", "input": ["w5", "w6"]}
        reply = httpx2.post(f"{other.url}/v1/embeddings", json=body).json()
        assert [one["embedding"] for one in reply["data"]] == [[1.0, 1.0]] * 2
        assert [one.get("cut_tokens") for one in reply["data"]] == [None, 3]
        assert httpx2.post(f"{other.url}/v1/embeddings", json=body | {"input": " "}).status_code == 400


def test_the_bundles_own_router_embeds_through_the_running_engine(
    engine: BatchingEngine, merged: Merged, tmp_path: Path
) -> None:
    """A router that was really fitted: `auto` goes where it says, /v1/embeddings gives what it judges by."""
    bundle = Bundle.open(shutil.copytree(merged("llama")[0].path, tmp_path / "bundle"))
    assert bundle_router(bundle, engine) is None
    fields = {"zero": "w10", "one": "w11", "two": "w12"}
    training = [Sample(f"{word} w{20 + n} {word}", field) for field, word in fields.items() for n in range(12)]
    settings = FitSettings(embed=EmbedSettings(template="{input} w3", layers=(-1,)))
    experts = {"zero": "e0", "one": "e1", "two": "e2"}
    fit_samples(bundle, engine, training, settings=settings, experts=experts).router.save(bundle)
    router: Any = bundle_router(bundle, engine)
    text = "w11 w40 w11"
    with running(create_app(engine, router), engine) as server:
        route = httpx2.post(f"{server.url}/v1/route", json={"input": text}).json()["data"][0]
        expected = router.route([text])[0]
        assert route["field"] == expected.field and route["confidence"] == pytest.approx(expected.confidence, abs=1e-4)
        body = {"model": "auto", "messages": [{"role": "user", "content": text}], "max_tokens": 2}
        answer = httpx2.post(f"{server.url}/v1/chat/completions", json=body)
        assert answer.json()["polymerge"]["expert"] == (expected.expert or "average")
        vectors = httpx2.post(f"{server.url}/v1/embeddings", json={"input": text}).json()["data"][0]["embedding"]
        assert np.allclose(vectors, router.embedder.embed([text]).vectors[0], atol=1e-4)
