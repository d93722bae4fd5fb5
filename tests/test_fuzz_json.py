"""JSON and YAML that lie, made by hypothesis: what reads them ends in a typed error or a right result.

A few hundred cases each; ten thousand in all with `-m slow`.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from polymerge import Bundle, merge, verify
from polymerge.errors import BundleError, PolymergeError, RecipeError, RouterError, SourceError
from polymerge.recipe.merge import Recipe, load_recipe
from polymerge.recipe.rates import rate_of
from polymerge.router.fit import fit_samples
from polymerge.router.router import Router
from polymerge.router.settings import FitSettings
from polymerge.sources.adapter import open_adapter
from polymerge.sources.checkpoint import open_folder
from tests.router.scripted import ScriptedEngine, make_samples
from tests.tiny import COMMON, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {**COMMON, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Q0 = "model.layers.0.self_attn.q_proj"

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["../../x", "/x", "e0", "e1", "E0", "LORA", "average", "mixture", "factors", "int4", "bfloat16"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in the data but the whole."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


@st.composite
def changed(draw: Callable[..., Any], data: Any) -> Any:
    """The data with one to three places taken out, replaced, doubled under another key, or swapped with another."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(places(data)) or [()]))
        if not at:
            return draw(VALUES)
        owner = data
        for key in at[:-1]:
            owner = owner[key]
        kind = draw(st.sampled_from(["replace", "replace", "delete", "key", "swap"]))
        if kind == "delete":
            del owner[at[-1]]
        elif kind == "key" and isinstance(owner, dict):
            owner[draw(st.text(max_size=8) | st.sampled_from(["../../x", "E0", "e1", *map(str, owner)]))] = owner.pop(
                at[-1]
            )
        elif kind == "swap":
            other = draw(st.sampled_from(list(owner) if isinstance(owner, dict) else range(len(owner))))
            owner[at[-1]], owner[other] = owner[other], owner[at[-1]]
        else:
            owner[at[-1]] = draw(VALUES)
    return draw(VALUES) if draw(st.integers(0, 40)) == 0 else data


def cases(count: int, data: Any, check: Callable[[Any], None]) -> None:
    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(changed(data))
    def each(lie: Any) -> None:
        check(lie)

    each()


@contextmanager
def refused_in_one_line(*errors: type[PolymergeError]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        assert "\n" not in str(error), str(error)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts, the second in two shards; an adapter over the first; a bundle of both with a router."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name, path in make_experts("llama", folder, count=2, config=LlamaConfig(**TINY)).items():
        path.rename(folder / name)
    merge({"experts": {n: str(folder / n) for n in ("e0", "e1")}, "compress_rate": 0.6}, folder / "bundle")
    tensors = load_file(folder / "e1" / "model.safetensors")
    (folder / "e1" / "model.safetensors").unlink()
    weight_map = {}
    for file, part in zip(SHARDS, (sorted(tensors)[:5], sorted(tensors)[5:]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / "e1" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "e1" / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, folder / "e1 whole")
    (folder / "adapter").mkdir()
    torch.manual_seed(0)
    factors = {
        f"base_model.model.{Q0}.lora_A.weight": torch.randn(2, 16),
        f"base_model.model.{Q0}.lora_B.weight": torch.randn(16, 2),
    }
    save_file(factors, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    engine = ScriptedEngine(("e0", "e1"))
    fitted = fit_samples(
        folder / "bundle",
        engine,
        make_samples(5),
        settings=FitSettings(),
        experts={"math": "e0", "shell": "e1", "json": "e0"},
    )
    fitted.router.save(folder / "bundle")
    return folder


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def manifests(made: Path, scratch: Path, count: int) -> None:
    """An opened bundle is the one that was written, or `verify` says what is wrong, or it says itself."""
    whole = Bundle.open(made / "bundle")
    truth = {(e, t): whole.reconstruct(e, t) for e in whole.experts for t in whole.layers}
    copied = shutil.copytree(made / "bundle", scratch / "bundle", dirs_exist_ok=True)
    data = json.loads((made / "bundle" / "polymerge.json").read_text())

    def check(lie: Any) -> None:
        (copied / "polymerge.json").write_text(json.dumps(lie))
        with refused_in_one_line(PolymergeError):
            bundle = Bundle.open(copied)
            inside = [bundle.expert_folder(expert).resolve() for expert in bundle.experts]
            assert all(folder.parent == (copied / "experts").resolve() for folder in inside)
            if verify(bundle).problems:
                return
            for expert in bundle.experts:
                for tensor in bundle.layers:
                    rebuilt = bundle.reconstruct(expert, tensor)
                    same = (expert, tensor) in truth and rebuilt.shape == truth[expert, tensor].shape
                    assert same or lie["layers"] != data["layers"] or lie["experts"] != data["experts"]

    cases(count, data, check)


def indexes(made: Path, scratch: Path, count: int) -> None:
    truth, file = load_file(made / "e1 whole"), "model.safetensors.index.json"
    copied = shutil.copytree(made / "e1", scratch / "e1", dirs_exist_ok=True)

    def check(lie: Any) -> None:
        (copied / file).write_text(json.dumps(lie))
        with refused_in_one_line(SourceError):
            checkpoint = open_folder(copied, "e1")
            assert checkpoint.tensors.keys() == truth.keys()
            assert all(torch.equal(checkpoint.read(name), truth[name]) for name in truth)

    cases(count, json.loads((made / "e1" / file).read_text()), check)


ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {},
    "alpha_pattern": {"q_proj": 2},
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "init_lora_weights": True,
    "target_modules": ["q_proj"],
    "modules_to_save": None,
    "base_model_name_or_path": "../e0",
}


def adapters(made: Path, scratch: Path, count: int) -> None:
    base = open_folder(made / "e0", "e0")
    whole = load_file(made / "e0" / "model.safetensors")
    a, b = load_file(made / "adapter" / "adapter_model.safetensors").values()
    update = b @ a
    copied = shutil.copytree(made / "adapter", scratch / "adapter", dirs_exist_ok=True)

    def check(lie: Any) -> None:
        (copied / "adapter_config.json").write_text(json.dumps(lie))
        with refused_in_one_line(SourceError):
            checkpoint = open_adapter(copied, "adapter", base)
            for name in whole:
                read = checkpoint.read(name)
                if name != f"{Q0}.weight":
                    assert torch.equal(read, whole[name])
                elif read.isfinite().all():  # a multiple of B A
                    change = read - whole[name]
                    share = float((change * update).sum() / (update * update).sum())
                    assert torch.allclose(change, share * update, atol=1e-4 * max(1.0, abs(share)))

    cases(count, ADAPTER, check)


RECIPE = {
    "experts": {"math": "./e0", "shell": {"source": "./e1", "base": "./e0", "revision": "main"}}, "compress_rate": 0.9,
    "code": "int8", "scale": "shared", "embeddings": "average", "lm_head": "keep", "norms": "keep", "dtype": "bfloat16",
    "device": "cpu", "workers": 2, "seed": 1, "n_oversamples": 4, "n_iter": 1, "max_error": 0.5, "config": "./c",
    "thinker": {"source": "./t"}, "staged": {"use": "auto"}, "memory_limit": "48 GB", "trust_remote_code": False,
}  # fmt: skip


def recipes(made: Path, scratch: Path, count: int) -> None:
    """Taken is only what a second reading of what was taken takes as the same."""

    def check(lie: Any) -> None:
        (scratch / "recipe.yaml").write_text(yaml.safe_dump(lie), errors="surrogatepass")
        for given_as in (lie, scratch / "recipe.yaml"):
            if not isinstance(given_as, dict | Path):
                continue
            with refused_in_one_line(RecipeError):
                recipe = load_recipe(given_as)
                assert Recipe.model_validate(recipe.model_dump()) == recipe
                assert len(recipe.experts) > 1 and 0 <= rate_of(recipe.compress_rate, "model.layers.0.x") <= 1
                assert recipe.max_error is None or (recipe.max_error > 0 and not math.isnan(recipe.max_error))

    load_recipe(RECIPE)
    cases(count, RECIPE, check)


def routers(made: Path, scratch: Path, count: int) -> None:
    engine, copied = (
        ScriptedEngine(("e0", "e1")),
        shutil.copytree(made / "bundle", scratch / "routed", dirs_exist_ok=True),
    )
    texts = [sample.text for sample in make_samples(2, seed=3)]
    file = copied / "router" / "router.json"

    def check(lie: Any) -> None:
        file.write_text(json.dumps(lie))
        with refused_in_one_line(RouterError):
            for route in Router.load(copied, engine).route(texts):
                names = route.expert if isinstance(route.expert, dict) else {route.expert: 1.0}
                assert set(names) <= {"e0", "e1", None, "average"}
                assert 0 <= route.confidence <= 1

    cases(count, json.loads((made / "bundle" / "router" / "router.json").read_text()), check)


READERS = {"manifests": manifests, "indexes": indexes, "adapters": adapters, "recipes": recipes, "routers": routers}


@pytest.mark.parametrize("reader", READERS)
def test_a_lie_is_refused_or_harmless(made: Path, scratch: Path, reader: str) -> None:
    READERS[reader](made, scratch, 200)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_two_thousand_lies_are_refused_or_harmless(made: Path, scratch: Path, reader: str) -> None:
    READERS[reader](made, scratch, 2000)


def test_what_is_fuzzed_is_read_when_nobody_lies(made: Path) -> None:
    bundle = Bundle.open(made / "bundle")
    assert verify(bundle).ok
    assert Router.load(bundle, ScriptedEngine(("e0", "e1"))).route(["sum plus"])
    assert len(open_folder(made / "e1", "e1").tensors) == len(load_file(made / "e1 whole"))
    with pytest.raises(BundleError):
        Bundle.open(made / "e0")
