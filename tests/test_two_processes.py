"""Two processes on one bundle: one writes and the other is refused, or one reads and finds one state, never a mix."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig

import polymerge.merging.grow as grow_module
from polymerge import Bundle, add_expert, load_model, merge, remove_expert, verify
from polymerge.errors import BundleError, LockedError, PolymergeError
from tests.killed import FORKS, content
from tests.tiny import COMMON, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {**COMMON, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}


def work(verb: str, bundle: Path, sources: dict[str, str], stop: Callable[..., None] = lambda *_: None) -> list[str]:
    """Does the verb, and calls `stop` when it is half done. Returns the experts that it ends with."""
    if verb == "merge":
        recipe = {"experts": {name: sources[name] for name in ("e0", "e2")}, "compress_rate": 0.6}
        return merge(recipe, bundle, overwrite=True, progress=stop).experts
    if verb == "add":
        return add_expert(bundle, "e2", sources["e2"], progress=stop).bundle.experts
    if verb == "remove":
        real = grow_module.write_stats

        def stopped(*args: Any) -> None:
            stop()
            real(*args)

        grow_module.write_stats = stopped
        try:
            return remove_expert(bundle, "e1").experts
        finally:
            grow_module.write_stats = real
    real_load = transformers.AutoModelForCausalLM.from_pretrained

    def loaded(*args: Any, **kwargs: Any) -> Any:
        stop()
        return real_load(*args, **kwargs)

    transformers.AutoModelForCausalLM.from_pretrained = loaded
    try:
        return load_model(bundle, device="cpu").experts
    finally:
        transformers.AutoModelForCausalLM.from_pretrained = real_load


def first(verb: str, bundle: Path, sources: dict[str, str], half: Any, go: Any, said: Any) -> None:
    """In the other process: goes half the way, waits, goes on, and says how it ended."""
    torch.set_num_threads(1)

    def stop(*_: Any) -> None:
        if not half.is_set():
            half.set()
            assert go.wait(100)

    try:
        said.put(work(verb, bundle, sources, stop))
    except PolymergeError as error:
        said.put((type(error).__name__, str(error)))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = make_experts("llama", tmp_path_factory.mktemp("tiny"), config=LlamaConfig(**TINY))
    return {name: str(path) for name, path in made.items()}


@pytest.fixture(scope="module")
def old(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = {"experts": {name: sources[name] for name in ("e0", "e1")}, "compress_rate": 0.9}
    return merge(recipe, tmp_path_factory.mktemp("old") / "b").path


ENDS = {"merge": ["e0", "e2"], "add": ["e0", "e1", "e2"], "remove": ["e0"], "load": ["e0", "e1"]}


@pytest.mark.parametrize("second", ENDS)
@pytest.mark.parametrize("verb", ENDS)
def test_two_at_once_never_mix(sources: dict[str, str], old: Path, tmp_path: Path, verb: str, second: str) -> None:
    for name in ("bundle", "alone"):
        shutil.copytree(old, tmp_path / name)
    work(verb, tmp_path / "alone", sources)
    bundle = tmp_path / "bundle"
    half, go, said = FORKS.Event(), FORKS.Event(), FORKS.Queue()
    process: BaseProcess = FORKS.Process(target=first, args=(verb, bundle, sources, half, go, said))
    process.start()
    assert half.wait(100)
    try:
        if second == "load":  # the state before or after, whole
            assert work("load", bundle, sources) in (ENDS["load"], ENDS[verb])
        elif verb == "load":  # a reader holds nobody up
            assert work(second, bundle, sources) == ENDS[second]
        else:
            with pytest.raises(LockedError, match="bundle: another polymerge process is writing to it"):
                work(second, bundle, sources)
    finally:
        go.set()
    ended = said.get(timeout=100)
    process.join(100)
    if verb == "load" and second != "load":
        assert ended[0] == BundleError.__name__ and "was changed by another process while it was read" in ended[1]
    else:
        assert ended == ENDS[verb]
        assert content(bundle) == content(tmp_path / "alone")
    assert verify(bundle).ok and Bundle.open(bundle).experts == (ENDS[second] if verb == "load" else ENDS[verb])
