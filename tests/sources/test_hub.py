"""A hub that cannot be reached is told of within seconds."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from polymerge.errors import SourceError
from polymerge.merging.plan import plan_merge
from polymerge.sources import hub
from polymerge.sources.opening import open_checkpoint


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The address of a hub at which nobody listens."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "getproxies", dict)
    return url


def test_without_a_network_a_hub_id_is_one_line_at_once(nobody: str) -> None:
    began = time.monotonic()
    with pytest.raises(
        SourceError, match=r"org/none: not a local folder, .* not in the cache, and http.* cannot be reached"
    ):
        open_checkpoint("org/none")
    assert time.monotonic() - began < 5


def test_the_line_of_the_recipe_and_the_expert_are_named(nobody: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("experts:\n  math: org/none\n  code: ./lost\n")
    with pytest.raises(SourceError, match=r"recipe\.yaml, line 2: expert 'math': org/none: not a local folder"):
        plan_merge(recipe)
    recipe.write_text("experts:\n  math: ./lost\n  code: org/none\n")
    with pytest.raises(SourceError, match=r"recipe\.yaml, line 2: expert 'math': .*lost: no such folder or file"):
        plan_merge(recipe, code="int4")


def test_who_listens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "getproxies", dict)
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        place.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{place.getsockname()[1]}")
        assert not hub.hub_answers()  # who says that there is no network is believed
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert hub.hub_answers()


def test_a_resolver_that_hangs_and_addresses_that_drop_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked one after the other, or waited for, each would cost its own time-out."""
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub, "REACH_SECONDS", 0.5)
    places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"198.51.100.{n}", 443)) for n in range(1, 9)]
    resolve, connect, dropped = socket.getaddrinfo, socket.create_connection, threading.Event()

    def drops(address: tuple[str, int], timeout: float) -> socket.socket:
        if address[0].startswith("198.51.100."):
            dropped.wait(timeout)
            raise TimeoutError
        return connect(address, timeout=timeout)

    monkeypatch.setattr(socket, "create_connection", drops)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: places)
    began = time.monotonic()
    assert not hub._listens("https://none.test")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [dropped.wait(30)][:0])
    assert not hub._listens("https://slow.test")
    assert time.monotonic() - began < 3
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        place.listen()
        port = place.getsockname()[1]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [*places, *resolve("127.0.0.1", port)])
        assert hub._listens(f"http://some.test:{port}")  # one of nine
    dropped.set()
