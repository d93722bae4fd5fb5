"""Where an expert came from, whole: so that it can be opened again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from polymerge import Bundle, add_expert, merge, plan_merge, verify
from polymerge.errors import SourceError
from polymerge.recipe.source import Source
from polymerge.sources.checkpoint import Origin
from polymerge.sources.opening import open_checkpoint, opened_again
from tests.sources.peft_oracle import by_peft, write_adapter
from tests.test_paths import STRANGE

Checkpoints = Callable[[str], dict[str, Path]]
pytestmark = pytest.mark.filterwarnings("ignore")


class Hub:
    """A hub whose cache holds snapshots by commit; `main` and tags point to commits."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.points: dict[tuple[str, str], str] = {}

    def put(self, repo: str, folder: Path, commit: str, *names: str) -> Path:
        place = self.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
        shutil.copytree(folder, place)
        self.points |= {(repo, name): commit for name in (commit, *names)}
        return place

    def snapshot_download(self, repo: str, *, revision: str | None = None, **options: Any) -> str:
        commit = self.points.get((repo, revision or "main"))
        if commit is None:
            raise LocalEntryNotFoundError(f"no {revision} of {repo}")
        return str(self.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / commit)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def expected_of(adapter: Path, base: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = by_peft(adapter, base).merge_and_unload().state_dict()
    return weights


@pytest.fixture
def adapter(checkpoints: Checkpoints, hub: Hub, tmp_path: Path) -> Path:
    """An adapter that was trained on commit `old` of org/base, which is no longer the newest."""
    experts = checkpoints("llama")
    hub.put("org/base", experts["e0"], "old", "v1")
    hub.put("org/base", experts["e1"], "new", "main")
    folder = write_adapter(tmp_path / "adapter", experts["e0"], target_modules=["q_proj"])
    edit(folder / "adapter_config.json", base_model_name_or_path="org/base", revision="v1")
    return folder


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ({}, "e0"),
        ({"base": "org/base"}, "e0"),
        ({"base": "org/base@main"}, "e1"),
        ({"base": "org/base@new"}, "e1"),
    ],
    ids=str,
)
def test_the_base_is_opened_at_the_revision_that_the_adapter_was_trained_on(
    adapter: Path, checkpoints: Checkpoints, source: dict[str, str], number: str
) -> None:
    checkpoint = open_checkpoint(Source(source=str(adapter), **source))
    for name, value in expected_of(adapter, checkpoints("llama")[number]).items():
        torch.testing.assert_close(checkpoint.read(name), value, rtol=1e-5, atol=1e-6)
    commit = {"e0": "old", "e1": "new"}[number]
    assert checkpoint.whence.base_revision == commit and checkpoint.whence.base in ("org/base", source.get("base"))


def test_another_base_is_not_asked_for_the_first_ones_revision(
    adapter: Path, hub: Hub, checkpoints: Checkpoints
) -> None:
    hub.put("org/copy", checkpoints("llama")["e0"], "c0", "main")
    assert open_checkpoint(Source(source=str(adapter), base="org/copy")).whence.base_revision == "c0"


def test_a_revision_that_is_no_text_is_one_line(adapter: Path) -> None:
    edit(adapter / "adapter_config.json", revision=3)
    with pytest.raises(SourceError, match=r"adapter_config\.json: revision must be a text, found 3"):
        open_checkpoint(adapter)


@pytest.mark.parametrize(
    "source",
    [
        Source(source="org/base"),
        Source(source="org/base@v1"),
        Source(source="org/base", revision="v1"),
    ],
    ids=str,
)
def test_a_hub_id_is_known_by_its_commit(hub: Hub, adapter: Path, source: Source) -> None:
    checkpoint = open_checkpoint(source)
    commit = "new" if source == Source(source="org/base") else "old"
    assert checkpoint.whence == Origin(source.source, commit)
    hub.points[("org/base", "main")] = hub.points[("org/base", "v1")] = "elsewhere"
    again = opened_again(checkpoint.whence)
    assert again.folder == checkpoint.folder and again.whence == checkpoint.whence


def test_verify_opens_an_adapter_over_the_base_of_the_recipe_and_at_the_commit_of_then(
    adapter: Path, hub: Hub, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    experts = checkpoints("llama")
    edit(adapter / "adapter_config.json", base_model_name_or_path="org/somewhere-else", revision=None)
    other = write_adapter(tmp_path / "other", experts["e2"], target_modules=["v_proj"])
    edit(other / "adapter_config.json", base_model_name_or_path=None)
    bundle = merge(
        {
            "experts": {
                "hub": {"source": str(adapter), "base": "org/base@v1"},
                "local": {"source": str(other), "base": str(experts["e2"])},
                "plain": str(experts["e1"]),
            },
            "compress_rate": 0.0,
        },
        tmp_path / "bundle",
    )
    hub.points[("org/base", "v1")] = "new"
    record = bundle.manifest.experts
    assert (record["hub"].base, record["hub"].base_revision) == ("org/base@v1", "old")
    assert (record["local"].base, record["local"].revision) == (str(experts["e2"]), None)
    report = verify(bundle, sources=True)
    assert report.ok, report.problems
    assert [check.expert for check in report.sources] == ["hub", "local", "plain"]
    assert all(check.worst_error < 1e-6 for check in report.sources)


def test_an_added_adapter_is_known_by_its_base(checkpoints: Checkpoints, tmp_path: Path) -> None:
    experts = checkpoints("llama")
    bundle = merge(
        {"experts": {"a": str(experts["e0"]), "b": str(experts["e1"])}, "compress_rate": 0.0}, tmp_path / "bundle"
    )
    adapter = write_adapter(tmp_path / "adapter", experts["e2"], target_modules=["q_proj"])
    edit(adapter / "adapter_config.json", base_model_name_or_path=None)
    add_expert(bundle, "tuned", Source(source=str(adapter), base=str(experts["e2"])))
    again = Bundle.open(bundle.path)
    assert again.manifest.experts["tuned"].base == str(experts["e2"])
    assert verify(again, sources=True).ok


def test_a_plain_sources_manifest_says_no_more_than_before(checkpoints: Checkpoints, tmp_path: Path) -> None:
    experts = {name: str(path) for name, path in checkpoints("llama").items()}
    bundle = merge({"experts": experts, "compress_rate": 0.0}, tmp_path / "bundle")
    written = json.loads((bundle.path / "polymerge.json").read_text())["experts"]
    assert {tuple(sorted(record)) for record in written.values()} == {("dtype", "sha256", "source")}


@pytest.mark.parametrize("text", STRANGE)
def test_what_is_no_path_is_named_in_one_line_also_as_an_adapters_base(
    text: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="no such folder or file, and not a hub id"):
        open_checkpoint(text)
    write_adapter(tmp_path / "adapter", checkpoints("llama")["e0"])
    with pytest.raises(SourceError, match=r"the adapter's base cannot be opened: .*no such folder or file"):
        open_checkpoint(Source(source=str(tmp_path / "adapter"), base=text))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"revision": "main"}, "has no revision 'main'"),
        ({"base": "org/base"}, "is no adapter and has no base 'org/base'"),
    ],
)
def test_what_a_user_says_of_a_source_in_vain_is_refused(
    checkpoints: Checkpoints, tmp_path: Path, said: dict[str, str], words: str
) -> None:
    paths = {name: str(path) for name, path in checkpoints("llama").items()}
    with pytest.raises(SourceError, match=f"expert 'e0': {paths['e0']}: .*{words}; leave it out"):
        plan_merge({"experts": {"e0": {"source": paths["e0"], **said}, "e1": paths["e1"]}})
    bundle = merge({"e0": paths["e0"], "e1": paths["e1"]}, tmp_path / "bundle")
    with pytest.raises(SourceError, match=words):
        add_expert(bundle, "e2", Source(source=paths["e2"], **said))
