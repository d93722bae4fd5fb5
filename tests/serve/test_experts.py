"""Experts that come and go while a bundle is served, for an admin's key; and several of them by weight."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from polymerge import Bundle, load_model, merge
from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.serve.app import create_app
from polymerge.serve.errors import ApiError
from polymerge.serve.experts import LoadedExperts
from polymerge.serve.keys import Keys
from polymerge.serve.settings import ServeSettings
from tests.conftest import Merged
from tests.serve.conftest import KEY, TEMPLATE, ScriptedRouter, Server, running
from tests.tiny import tiny_tokenizer

ADMIN = {"authorization": "Bearer " + "a" * 16}
USER = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def served(merged: Merged) -> Iterator[Server]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE

    def load(bundle: Bundle, beside: Any = None) -> HFEngine:
        return HFEngine(load_model(bundle, beside=beside), tokenizer, fingerprint=bundle.digest)

    bundle = merged("llama")[0]
    engine = BatchingEngine(load(bundle))
    settings = ServeSettings(keys=Keys({"admin": "a" * 16, "user": KEY}, frozenset({"admin"})))
    app = create_app(engine, ScriptedRouter(), None, settings, LoadedExperts(bundle, engine, load, 30))
    with running(app, engine) as server:
        yield server
    engine.close(0)


def ask(server: Server, model: str, text: str = "w5 w6") -> httpx2.Response:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 5, "temperature": 0}
    return httpx2.post(f"{server.url}/v1/chat/completions", json=body, headers=USER, timeout=60)


def loaded(answer: httpx2.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [one["id"] for one in answer.json()["data"] if one["loaded"]]


def test_an_expert_is_unloaded_and_loaded_again(served: Server) -> None:
    url = f"{served.url}/v1/experts"
    before = ask(served, "e1").json()["choices"]
    other = ask(served, "e0").json()["choices"]
    assert loaded(httpx2.get(url, headers=ADMIN)) == ["e0", "e1", "e2"]
    assert loaded(httpx2.delete(f"{url}/e1", headers=ADMIN, timeout=60)) == ["e0", "e2"]
    gone = ask(served, "e1")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    models = httpx2.get(f"{served.url}/v1/models", headers=USER).json()["data"]
    assert "e1" not in [model["id"] for model in models]
    assert ask(served, "e0").json()["choices"] == other
    routed = ask(served, "auto", "w11").json()["polymerge"]  # the router knows e1 still
    assert routed["expert"] == "average" and "e1, which is not loaded" in routed["reason"]
    assert httpx2.delete(f"{url}/e1", headers=ADMIN).status_code == 404
    assert loaded(httpx2.post(url, json={"name": "e1"}, headers=ADMIN, timeout=60)) == ["e0", "e1", "e2"]
    assert ask(served, "e1").json()["choices"] == before


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "", {"name": "e0"}, 409),
        ("POST", "", {"name": "../e0"}, 404),
        ("POST", "", {"nome": "e0"}, 400),
        ("DELETE", "/nobody", None, 404),
    ],
)
def test_what_cannot_be_is_said(served: Server, method: str, path: str, body: Any, status: int) -> None:
    answer = httpx2.request(method, f"{served.url}/v1/experts{path}", json=body, headers=ADMIN, timeout=60)
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("POST", ""), ("DELETE", "/e0")])
def test_experts_are_an_admins_business(served: Server, method: str, path: str) -> None:
    body = {"name": "e0"} if method == "POST" else None
    answer = httpx2.request(method, f"{served.url}/v1/experts{path}", json=body, headers=USER)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_key_needed")


def test_a_mixture_is_a_model(served: Server) -> None:
    mixed = ask(served, "e0:3+e1").json()
    assert mixed["polymerge"]["expert"] == {"e0": 3.0, "e1": 1.0}
    same = ask(served, "e0:0.75+e1:0.25").json()
    assert same["choices"] == mixed["choices"]
    assert ask(served, "e0:1").json()["choices"] == ask(served, "e0").json()["choices"]
    for wrong, status in (("e0:0.5+e9:0.5", 404), ("e0:-1+e1:2", 400), ("e0+auto", 400)):
        refused = ask(served, wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (status, "model")


def test_experts_that_share_factors_stay_and_it_is_said_why(merged: Merged, tmp_path: Path) -> None:
    """Two experts merged by default do: `cannot be changed now; the server's log says why` helped nobody."""
    sources = {name: str(path) for name, path in merged("llama")[1].items() if name != "e0"}
    bundle = merge(sources, tmp_path / "two")
    assert bundle.shared
    experts = LoadedExperts(bundle, SimpleNamespace(experts=list(bundle.experts)), lambda *_: None, 1.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ApiError, match=r"share factors: all are loaded, or none; see `method: published`") as raised:
        experts.unload("e1")
    assert raised.value.status == 409
