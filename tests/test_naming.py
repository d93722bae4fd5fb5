"""Names that become paths: whoever wrote them, nothing they say leads out of its folder, on this system or another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from polymerge.bundle.manifest import read_manifest
from polymerge.engine.vllm.folder import NOTE, read_note
from polymerge.errors import BundleError, PolymergeError, RecipeError, RouterError, SourceError
from polymerge.naming import check_expert_name, check_expert_names, check_path, check_paths, is_plain
from polymerge.recipe.merge import load_recipe
from polymerge.router.record import RECORD, read_record
from polymerge.sources.checkpoint import read_weight_map

PARTS = [
    "..",
    ".",
    "",
    "a",
    "e0",
    "experts",
    "C:",
    "c:x",
    "~",
    "~root",
    "nul\0",
    "tab\t",
    "con",
    "x\\..\\..",
    "\\\\host",
    "\ud800",
    "ß",
    "ﬁ",
    "ＡＢ",
    "a" * 300,
    "-rf",
    "$HOME",
    "%TEMP%",
    "a*",
    "a?",
    "|",
    ".polymerge",
]
# Texts as somebody would write them who wants to get out, and any others.
TEXTS = st.one_of(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map("/".join),
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("".join),
    st.builds(lambda up, name: "../" * up + name, st.integers(1, 9), st.sampled_from(["x", "etc/passwd", ""])),
    st.text(max_size=40),
)
quick = settings(max_examples=300, deadline=None, derandomize=True, database=None)
GOOD = ["model.safetensors", "model-00001-of-00002.safetensors", "experts/e0/adapter_config.json", "modeling_x.py",
        "additional_chat_templates/tool use.jinja", "experts/Größe-1.b/x", "a..b", ".hidden"]  # fmt: skip


def assert_inside(path: str) -> None:
    """Taken as text, so that no system's links or drives hide anything."""
    assert path and "\0" not in path and os.fsencode(path)
    assert os.path.normpath(f"/bundle/{path}").startswith("/bundle/") and not PurePosixPath(path).is_absolute()
    for part in PurePosixPath(path).parts:
        assert PureWindowsPath(f"r/{part}").parts == ("r", part) and len(part.encode()) <= 255


@pytest.mark.parametrize("path", GOOD)
def test_ordinary_names_are_taken(path: str) -> None:
    check_path(path)
    assert_inside(path)


@quick
@given(TEXTS)
def test_a_path_that_is_taken_stays_inside_and_is_spelled_in_one_way(path: str) -> None:
    try:
        check_path(path)
    except ValueError:
        assert not is_plain(path)
        return
    assert_inside(path)
    assert os.path.normpath(path) == path


@quick
@given(
    st.lists(st.sampled_from(["a", "A", "a/x", "A/y", "ß", "ss", "SS", "e\u0301", "\u00e9", "b/x", "b/X"]), max_size=4)
)
def test_paths_that_are_taken_together_are_as_many_where_cases_are_one(paths: list[str]) -> None:
    files = set(paths)
    try:
        check_paths(files)
    except ValueError:
        return
    folded = {path.casefold().replace("e\u0301", "\u00e9") for path in files}
    assert len(folded) == len(files)
    assert not {"a/x", "A/y"} <= files and not {"a", "A/y"} <= files


def test_files_whose_folders_differ_in_case_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="upper and lower case"):
        check_paths(["experts/a/x", "experts/A/y"])


@quick
@given(TEXTS)
def test_an_experts_name_that_is_taken_is_one_plain_part_and_a_header(name: str) -> None:
    try:
        check_expert_name(name)
    except ValueError:
        return
    assert_inside(name)
    assert is_plain(name) and name.isascii() and name.isprintable() and not name.startswith((".", "-"))


def test_names_that_differ_in_case_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="upper and lower case"):
        check_expert_names(["math", "Math"])


LAYER = {
    "tensor": "w",
    "module": "w",
    "parameter": "weight",
    "role": "linear",
    "transposed": False,
    "shape": [2, 2],
    "rank": 1,
    "mean_scale": 1.0,
}
RECORDED = {"source": "s", "sha256": "0", "dtype": "float32"}
MANIFEST: dict[str, Any] = {
    "format": "polymerge-bundle", "format_version": 1, "polymerge_version": "0", "dtype": "float32",
    "method": {"compress_rate": 0.5, "scale": "shared", "embeddings": "keep", "lm_head": "keep", "norms": "keep",
               "n_oversamples": 1, "n_iter": 1, "seed": 0},
    "architecture": "X", "layers_from": "shapes", "experts": {"e0": RECORDED}, "scale_ratio_range": [1, 1],
    "layers": [LAYER], "files": {}, "versions": {},
}  # fmt: skip
ROUTER: dict[str, Any] = {
    "polymerge_version": "0", "bundle": "0", "model": None, "fingerprint": "0", "format_version": 1,
    "embed": {}, "classifier": "knn", "fields": ["f"], "experts": {"f": "e0"}, "fallback": "average",
    "temperature": 1, "threshold": 0.5,
}  # fmt: skip
PROBE = {"ids": [1], "expert": [], "average": []}
SERVED = {"adapter": "adapters/e0", "kl": 0, "kl_unfolded": 0, "kl_average": 0, "same_token": 1, "probe": PROBE}
VLLM: dict[str, Any] = {
    "format_version": 1, "polymerge_version": "0", "bundle": "0", "dtype": "float32", "max_lora_rank": 8,
    "target_modules": ["q_proj"],
    "head_adapters": False, "base_bytes": 1, "slot_bytes": 1, "calibration_tokens": 1, "experts": {"e0": SERVED},
    "lost": [],
}  # fmt: skip


def dumped(file: Path, data: Any) -> Path:
    file.write_text(json.dumps(data))
    return file.parent


def manifest_expert(folder: Path, text: str) -> list[str]:
    return [*read_manifest(dumped(folder / "polymerge.json", {**MANIFEST, "experts": {text: RECORDED}})).experts]


def manifest_file(folder: Path, text: str) -> list[str]:
    files = {text: {"bytes": 1, "sha256": "0"}}
    return [*read_manifest(dumped(folder / "polymerge.json", {**MANIFEST, "files": files})).files]


def index_shard(folder: Path, text: str) -> list[str]:
    return [*read_weight_map(dumped(folder / "i", {"weight_map": {"w": text}}) / "i").values()]


def recipe_expert(folder: Path, text: str) -> list[str]:
    return [*load_recipe({"experts": {text: "./x", "other": "./y"}}).experts]


def recipe_file_expert(folder: Path, text: str) -> list[str]:
    (folder / "r.yaml").write_text(yaml.safe_dump({"experts": {text: "./x", "other": "./y"}}), errors="surrogatepass")
    return [*load_recipe(folder / "r.yaml").experts]


def router_weights(folder: Path, text: str) -> list[str]:
    return [read_record(dumped(folder / RECORD, {**ROUTER, "weights": text})).weights or "none"]


def router_samples(folder: Path, text: str) -> list[str]:
    return [read_record(dumped(folder / RECORD, {**ROUTER, "samples": text})).samples or "none"]


def router_expert(folder: Path, text: str) -> list[str]:
    return [*read_record(dumped(folder / RECORD, {**ROUTER, "experts": {"f": text}})).experts.values()]


def router_fallback(folder: Path, text: str) -> list[str]:
    return [read_record(dumped(folder / RECORD, {**ROUTER, "fallback": text})).fallback]


def vllm_expert(folder: Path, text: str) -> list[str]:
    return [*read_note(dumped(folder / NOTE, {**VLLM, "experts": {text: SERVED}})).experts]


def vllm_adapter(folder: Path, text: str) -> list[str]:
    experts = {"e0": {**SERVED, "adapter": text}}
    return [
        served.adapter for served in read_note(dumped(folder / NOTE, {**VLLM, "experts": experts})).experts.values()
    ]


def vllm_module(folder: Path, text: str) -> list[str]:
    return [*read_note(dumped(folder / NOTE, {**VLLM, "target_modules": [text]})).target_modules]


# What parses a text that becomes a path, a text that it takes, and what it says to others.
PARSERS: dict[str, tuple[Callable[[Path, str], list[str]], str, type[Exception]]] = {
    "an expert of a manifest": (manifest_expert, "e1", BundleError),
    "a file of a manifest": (manifest_file, "experts/e1/x.json", BundleError),
    "a shard of an index": (index_shard, "i", SourceError),
    "an expert of a recipe": (recipe_expert, "e1", RecipeError),
    "an expert of a recipe's file": (recipe_file_expert, "e1", RecipeError),
    "the weights of a router": (router_weights, f"weights-{'0' * 16}.safetensors", RouterError),
    "the samples of a router": (router_samples, f"samples-{'f' * 16}.jsonl", RouterError),
    "an expert of a router": (router_expert, "e1", RouterError),
    "the fallback of a router": (router_fallback, "e1", RouterError),
    "an expert of vLLM's note": (vllm_expert, "e1", BundleError),
    "an adapter of vLLM's note": (vllm_adapter, "adapters/e1", BundleError),
    "a module of vLLM's note": (vllm_module, "k_proj", BundleError),
}


@pytest.mark.parametrize("name", PARSERS)
def test_no_text_that_becomes_a_path_leads_outside(name: str, tmp_path: Path) -> None:
    parse, good, error = PARSERS[name]
    assert good in parse(tmp_path, good)
    with pytest.raises(error, match=r"\.\./outside|should match pattern"):
        parse(tmp_path, "../../outside")

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(TEXTS)
    def each(text: str) -> None:
        try:
            paths = parse(tmp_path, text)
        except PolymergeError as refused:
            assert "\n" not in str(refused)
            return
        except error:
            return
        for path in paths:
            assert_inside(path)
            assert name != "a module of vLLM's note" or not path.startswith("-")  # a word of a command line

    each()
