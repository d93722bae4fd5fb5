"""Python's functions, given what is none of theirs: one line, and never an answer to something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import polymerge as pm
from polymerge.errors import PolymergeError
from polymerge.search.examples import Example, read_prompts
from tests.conftest import Merged

SAID: dict[str, tuple[Callable[[Any, Any, Path], Any], str]] = {
    "verify against a mapping": (lambda b, s, out: pm.verify(b, sources={"e0": "x"}), "sources: true or false"),  # type: ignore[arg-type]
    "verify against nothing": (lambda b, s, out: pm.verify(b, source={"e0": None}), "e0: .*write a source"),  # type: ignore[dict-item]
    "no answer to choose from": (lambda b, s, out: pm.generate(b, "w3", choice=[]), "--choice: an empty list"),
    "no codes": (lambda b, s, out: pm.merge(s, out, target="size=9x", codes=[]), "codes: an empty list"),
    "a target in numbers": (lambda b, s, out: pm.merge(s, out, target=3), "target '?3'?: write"),  # type: ignore[arg-type]
    "prompts of nobody": (lambda b, s, out: pm.merge(s, out, target="kl=1", prompts=["x"]), "prompts: a list"),  # type: ignore[arg-type]
    "rows for examples": (
        lambda b, s, out: pm.merge(s, out, target="kl=1", prompts={"e0": [{"prompt": "w3"}]}),  # type: ignore[list-item]
        "prompts of 'e0': a dict is no example",
    ),
    "no rows": (
        lambda b, s, out: pm.merge(s, out, target="kl=1", prompts={"e0": [Example("w3")]}, limit=0),
        "limit: 0 is no number of rows",
    ),
    "an executor's name": (lambda b, s, out: pm.merge(s, out, executor="dask"), "executor: 'dask' does no tensors"),  # type: ignore[arg-type]
    "rates in a text": (lambda b, s, out: pm.sweep(s, _prompts(s), out, rates="x"), "rates: 'x' is not a number"),  # type: ignore[arg-type]
    "no rates": (lambda b, s, out: pm.sweep(s, _prompts(s), out, rates=[]), "rates: give one number or more"),
    "true for a rate": (lambda b, s, out: pm.sweep(s, _prompts(s), out, rates=[True]), "rates: True is not a number"),
    "a name in numbers": (lambda b, s, out: pm.add_expert(b, 3, "x"), "expert name 3 is no text"),  # type: ignore[arg-type]
    "names": (lambda b, s, out: pm.remove_expert(b, ["e0"]), "no expert .'e0'"),  # type: ignore[arg-type]
    "true for memory": (lambda b, s, out: pm.plan_merge(s, gpu=True), "gpu: true is not a number"),
    "beside a path": (lambda b, s, out: pm.load_model(b, beside=b), "beside: a Bundle is no loaded bundle"),  # type: ignore[arg-type]
}


def _prompts(sources: Any) -> dict[str, list[Example]]:
    return {name: [Example("w3 w4")] for name in sources}


@pytest.mark.parametrize("what", SAID)
def test_what_is_no_argument_is_one_line(merged: Merged, tmp_path: Path, what: str) -> None:
    bundle, experts = merged("llama")
    call, words = SAID[what]
    with pytest.raises(PolymergeError, match=words) as raised:
        call(bundle, {name: str(path) for name, path in experts.items()}, tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_a_checkpoint_may_be_a_path_and_examples_a_generator(merged: Merged, tmp_path: Path) -> None:
    bundle, experts = merged("llama")
    assert pm.verify(bundle, source={name: Path(path) for name, path in experts.items()}).ok  # type: ignore[misc]
    read = read_prompts({"e0": (Example(text) for text in ("w3", "w4"))})  # type: ignore[dict-item]
    assert read == {"e0": [Example("w3"), Example("w4")]}
