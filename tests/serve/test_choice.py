"""Which engine serves where nobody said, and why."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from polymerge.errors import BundleError, MissingExtraError, PolymergeError
from polymerge.serve import choice, start
from polymerge.serve.choice import choose_engine
from tests.conftest import Merged


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(choice, "installed", lambda: "xllamacpp 1")


def test_an_export_is_served_by_what_it_was_made_for(tmp_path: Path) -> None:
    for note, engine in ((choice.VLLM_NOTE, "vllm"), (choice.GGUF_NOTE, "llamacpp")):
        folder = tmp_path / engine
        folder.mkdir()
        (folder / note).write_text("{}")
        assert choose_engine(folder, asked={"--base": True}).engine == engine


def test_llamacpp_is_for_cpus_and_bundles_that_it_holds(
    merged: Merged, on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = merged("llama")
    picked = choose_engine(bundle.path, asked={})  # its tokenizer is not one of llama.cpp's
    assert picked.engine == "transformers" and "llama.cpp cannot hold this bundle" in picked.why
    monkeypatch.setattr(choice, "plan_gguf", lambda bundle: type("Plan", (), {"lost": ()}))
    assert choose_engine(bundle.path, asked={"--base": False}).engine == "llamacpp"
    monkeypatch.setattr(choice, "plan_gguf", lambda bundle: type("Plan", (), {"lost": ("e0: biases",)}))
    assert "(e0: biases)" in choose_engine(bundle.path, asked={}).why
    monkeypatch.setattr(choice, "installed", lambda: None)
    assert "not installed (extra llamacpp)" in choose_engine(bundle.path, asked={}).why


def test_what_only_transformers_does_decides(merged: Merged, on_a_cpu: None) -> None:
    bundle, _ = merged("llama")
    picked = choose_engine(bundle.path, asked={"`staged`": False, "--residuals": True})
    assert (picked.engine, picked.why) == ("transformers", "--residuals is its alone")


def test_on_a_gpu_the_reason_names_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(choice, "pick_device", lambda device: type("Device", (), {"type": "cuda"}))
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    assert choose_engine(tmp_path, asked={}).why == "there is a GPU, and vLLM is not installed here"
    monkeypatch.setattr(choice, "find_spec", lambda name: object())
    assert "export --to vllm" in choose_engine(tmp_path, asked={}).why


def test_what_is_no_bundle_is_one_line(on_a_cpu: None, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no polymerge\.json"):
        choose_engine(tmp_path, asked={})


def test_serve_says_which_engine_and_why(merged: Merged, on_a_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = merged("llama")
    said: list[str] = []
    served: dict[str, Any] = {}
    pytest.importorskip("fastapi")
    from polymerge.serve import run

    monkeypatch.setattr(run, "serve", lambda source, **options: served.update(options))
    start.serve_bundle(bundle.path, say=said.append)
    assert said[0].startswith("engine transformers: llama.cpp cannot hold this bundle") and served
    said.clear()
    start.serve_bundle(bundle.path, engine="transformers", say=said.append)
    assert not said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "transformers", "vllm": True}, "--engine transformers: leave --vllm and --vllm-url out"),
        ({"engine": "llamacpp", "vllm_url": "http://x"}, "--engine llamacpp: leave --vllm and --vllm-url out"),
        ({"engine": "transformers", "vllm_arg": ["--x"]}, "--vllm-python and --vllm-arg belong to --engine vllm"),
        ({"engine": "llamacpp", "vllm_python": "python"}, "--vllm-python and --vllm-arg belong to --engine vllm"),
        ({"vllm": True, "thinker": "t"}, "--engine vllm serves no `staged`"),
        ({"engine": "transformers", "gguf": "x"}, "--gguf and --llama-url belong to --engine llamacpp"),
        ({"engine": "vllm", "base": "int8"}, "--base and --residuals belong to the engine transformers"),
    ],
)
def test_options_of_another_engine_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    with pytest.raises(PolymergeError, match=re.escape(said)):
        start.serve_bundle(tmp_path, **options)


def test_a_missing_llamacpp_is_missed_before_anything_is_exported(
    merged: Merged, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi")
    bundle, _ = merged("llama")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # as if it were not installed
    monkeypatch.setattr("polymerge.serve.gguf.export_of", lambda *_: pytest.fail("was exported"))
    with pytest.raises(MissingExtraError, match=r"xllamacpp is not installed; pip install -e '\.\[llamacpp\]'"):
        start.serve_bundle(bundle.path, engine="llamacpp", port=0)
