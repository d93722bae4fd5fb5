"""Checkpoints as people have them on disk and on the hub, against safetensors' and transformers' own."""

import itertools
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, Response
from safetensors.torch import load_file, save_file

from polymerge.errors import SourceError
from polymerge.recipe.source import Source
from polymerge.sources import opening
from polymerge.sources.checkpoint import BinCheckpoint, Checkpoint, SafetensorsCheckpoint
from polymerge.sources.opening import open_checkpoint
from tests.sources.reading import assert_reads_fresh
from tests.tiny import ARCHITECTURES

INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
Checkpoints = Callable[[str], dict[str, Path]]


@pytest.fixture(scope="module")
def whole(checkpoints: Checkpoints) -> Path:
    """One safetensors file."""
    return checkpoints("llama")["e0"]


@pytest.fixture
def sharded(whole: Path, tmp_path: Path) -> Path:
    """The same checkpoint in shards, by transformers."""
    folder = tmp_path / "sharded"
    transformers.AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder, max_shard_size="30kB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def binary(whole: Path, tmp_path: Path) -> Path:
    """The same checkpoint in one `.bin`."""
    folder = tmp_path / "binary"
    folder.mkdir()
    shutil.copy(whole / "config.json", folder)
    torch.save(load_file(whole / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def sharded_binary(whole: Path, tmp_path: Path) -> Path:
    """The same checkpoint in two `.bin` files and their index."""
    folder = tmp_path / "sharded-binary"
    folder.mkdir()
    shutil.copy(whole / "config.json", folder)
    names = list(load_file(whole / "model.safetensors").items())
    weight_map = {}
    for number, part in enumerate((names[:7], names[7:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(dict(part), folder / file)
        weight_map |= {name: file for name, _ in part}
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object], name: str = INDEX) -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def assert_holds(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor), name


@pytest.mark.parametrize("form", ["whole", "sharded", "binary", "sharded_binary"])
def test_every_form_on_disk_gives_the_same_tensors(request: pytest.FixtureRequest, whole: Path, form: str) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(form))
    assert isinstance(checkpoint, BinCheckpoint if "binary" in form else SafetensorsCheckpoint)
    assert_holds(checkpoint, load_file(whole / "model.safetensors"))
    assert checkpoint.config["model_type"] == "llama"


@pytest.mark.parametrize("form", ["whole", "sharded", "binary"])
def test_rows_are_slices_of_the_whole(request: pytest.FixtureRequest, whole: Path, form: str) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(form))
    for name, tensor in load_file(whole / "model.safetensors").items():
        last = tensor.shape[0]
        for start, stop in ((0, 1), (1, last - 1), (last // 2, last), (0, last), (last - 1, last), (3, 3)):
            rows = checkpoint.read_rows(name, start, stop)
            assert torch.equal(rows, tensor[start:stop]), (name, start, stop)
            assert rows.dtype == tensor.dtype


@pytest.mark.parametrize("form", ["whole", "binary"])
def test_what_is_read_can_be_written_to_without_changing_the_checkpoint(
    request: pytest.FixtureRequest, whole: Path, form: str
) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(form))
    name = "model.norm.weight"
    checkpoint.read(name).zero_()
    checkpoint.read_rows(name, 0, 4).zero_()
    assert torch.equal(checkpoint.read(name), load_file(whole / "model.safetensors")[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_type_is_read_as_it_is_stored(whole: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    expected = {name: value.to(dtype) for name, value in load_file(whole / "model.safetensors").items()}
    shutil.copytree(whole, tmp_path / "typed")
    save_file(expected, tmp_path / "typed" / "model.safetensors")
    assert_holds(open_checkpoint(tmp_path / "typed"), expected)


def test_layers_are_listed_in_their_natural_order(tmp_path: Path) -> None:
    names = [f"model.layers.{number}.w" for number in (0, 1, 2, 9, 10, 11, 100)]
    save_file({name: torch.zeros(1) for name in reversed(names)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert list(open_checkpoint(tmp_path).tensors) == names


def test_a_type_that_cannot_be_merged_is_named_and_not_guessed(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.int8), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    tensors = open_checkpoint(tmp_path).tensors
    assert (tensors["a"].dtype, tensors["a"].stored_as) == (None, "I8")
    assert tensors["b"].dtype == torch.float32


def test_safetensors_win_over_bin_files_beside_them(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "both")
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    assert_holds(open_checkpoint(tmp_path / "both"), load_file(whole / "model.safetensors"))


def other_weights(folder: Path) -> None:
    """Zeros in one file, beside which other weights may lie."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in tensors.items()}, folder / "model.safetensors")


def put_one_file(folder: Path, whole: Path) -> None:
    shutil.copy(whole / "model.safetensors", folder)
    other_weights(folder)


def put_shards(folder: Path, whole: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder / "s", max_shard_size="30kB")
    for file in (folder / "s").glob("model*"):
        file.rename(folder / file.name)


def put_index_alone(folder: Path, whole: Path) -> None:
    put_shards(folder, whole)
    for file in folder.glob("model-*"):
        file.unlink()


def put_bin(folder: Path, whole: Path) -> None:
    tensors = load_file(whole / "model.safetensors")
    torch.save({name: value + 1 for name, value in tensors.items()}, folder / "pytorch_model.bin")


def put_bin_index(folder: Path, whole: Path) -> None:
    tensors = load_file(whole / "model.safetensors")
    torch.save({name: value + 2 for name, value in tensors.items()}, folder / "pytorch_model-1-of-1.bin")
    weight_map = dict.fromkeys(tensors, "pytorch_model-1-of-1.bin")
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def put_named(folder: Path, whole: Path) -> None:
    tensors = load_file(whole / "model.safetensors")
    save_file({name: value + 3 for name, value in tensors.items()}, folder / "other.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))


PUT = (put_one_file, put_shards, put_bin, put_bin_index, put_named)


@pytest.mark.parametrize(
    "both",
    [*itertools.combinations(PUT, 2), (put_one_file, put_index_alone), PUT],
    ids=lambda both: "+".join(put.__name__.removeprefix("put_") for put in both),
)
def test_of_several_weights_in_a_folder_the_ones_are_read_that_transformers_loads(
    whole: Path, tmp_path: Path, both: tuple[Callable[[Path, Path], None], ...]
) -> None:
    shutil.copy(whole / "config.json", tmp_path)
    for put in both:
        put(tmp_path, whole)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert_holds(open_checkpoint(tmp_path), expected)


@pytest.mark.parametrize("named", ["../x.safetensors", "x.bin", 3, "", "not-there.safetensors"])
def test_a_configuration_that_names_weights_stays_inside_its_folder(whole: Path, tmp_path: Path, named: object) -> None:
    shutil.copytree(whole, tmp_path / "named")
    shutil.copy(whole / "model.safetensors", tmp_path / "x.safetensors")
    config = json.loads((whole / "config.json").read_text())
    (tmp_path / "named" / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
    assert "transformers_weights" in one_line(tmp_path / "named") and repr(named) in one_line(tmp_path / "named")


def test_a_variant_alone_is_named(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "variant")
    (tmp_path / "variant" / "model.safetensors").rename(tmp_path / "variant" / "model.fp16.safetensors")
    assert "model.fp16.safetensors" in one_line(tmp_path / "variant")


def test_what_is_read_is_the_readers_own_memory(whole: Path, sharded: Path, binary: Path, sharded_binary: Path) -> None:
    for folder in (whole, sharded, binary, sharded_binary):
        assert_reads_fresh(open_checkpoint(folder))


def one_line(source: Source | Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shards = sorted(file.name for file in sharded.glob("*.safetensors"))
    (sharded / shards[1]).unlink()
    message = one_line(sharded)
    assert INDEX in message and shards[1] in message and "missing" in message
    assert "more" not in message
    (sharded / shards[2]).unlink()
    assert "and 1 more" in one_line(sharded)


def test_a_missing_bin_shard_is_named(sharded_binary: Path) -> None:
    (sharded_binary / "pytorch_model-00002-of-00002.bin").unlink()
    message = one_line(sharded_binary)
    assert BIN_INDEX in message and "pytorch_model-00002-of-00002.bin" in message


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    first, second = sorted({*json.loads((sharded / INDEX).read_text())["weight_map"].values()})[:2]
    edit_index(sharded, lambda data: data["weight_map"].update({"model.norm.weight": first, "x.weight": second}))
    message = one_line(sharded)
    assert INDEX in message and "differ" in message
    assert ("'model.norm.weight'" in message and first in message) or ("'x.weight'" in message and second in message)


def test_a_tensor_that_the_index_lacks_is_named(sharded: Path) -> None:
    edit_index(sharded, lambda data: data["weight_map"].pop("model.norm.weight"))
    message = one_line(sharded)
    assert "'model.norm.weight'" in message and "is not in model.safetensors.index.json" in message


@pytest.mark.parametrize("name", [INDEX, BIN_INDEX])
@pytest.mark.parametrize(
    "file", ["../{other}", "sub/{other}", "/etc/passwd", "..", ".", "", "..\\{other}", "./../{other}", 7, None]
)
def test_an_index_cannot_leave_its_folder(
    sharded: Path, sharded_binary: Path, tmp_path: Path, name: str, file: object
) -> None:
    folder = sharded if name == INDEX else sharded_binary
    target = next(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    (folder / "sub").mkdir()
    for place in (tmp_path, folder / "sub"):
        shutil.copy(target, place / "other")  # the file is there: what refuses it is the rule
    if isinstance(file, str):
        file = file.format(other="other")
    edit_index(folder, lambda data: data["weight_map"].update({"model.norm.weight": file}), name)
    message = one_line(folder)
    assert name in message and repr(file) in message and "refused" in message


def test_shards_without_their_index_are_not_taken_for_a_checkpoint(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    message = one_line(sharded)
    assert INDEX in message and "copy the index" in message


@pytest.mark.parametrize("text", ["{", "[]", '"x"', '{"weight_map": []}', '{"weight_map": {}}', "{}", "\xff"])
def test_an_index_that_is_no_index_is_named(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_bytes(text.encode("latin-1"))
    assert INDEX in one_line(sharded)


class Bomb:
    """Pickles as a call."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_bin_file_is_refused_and_never_runs(binary: Path, tmp_path: Path, zipped: bool) -> None:
    ran = tmp_path / "ran"
    with (binary / "pytorch_model.bin").open("wb") as handle:
        if zipped:
            torch.save({"model.norm.weight": torch.zeros(2), "x": Bomb(ran)}, handle)
        else:
            pickle.dump({"x": Bomb(ran)}, handle)
    message = one_line(binary)
    assert "pytorch_model.bin" in message and "safetensors" in message
    assert not ran.exists()


@pytest.mark.parametrize("content", [{"step": 3}, {"model": {"w": torch.zeros(1)}}, [torch.zeros(1)], torch.zeros(1)])
def test_a_bin_file_of_something_else_is_refused(binary: Path, content: object) -> None:
    torch.save(content, binary / "pytorch_model.bin")
    assert "holds more than named tensors" in one_line(binary)


Asked = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, whole: Path) -> tuple[Asked, dict[str, Path]]:
    """A hub that serves local folders; what was asked of it, and what it has."""
    asked: Asked = []
    repos = {"org/model": whole}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        if repo not in repos:
            raise LocalEntryNotFoundError(f"cannot find {repo}\nand a second line")
        return str(repos[repo])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked, repos


@pytest.mark.parametrize(
    ("source", "revision"),
    [
        (Source(source="org/model"), None),
        (Source(source="org/model@v1.2"), "v1.2"),
        (Source(source="org/model", revision="abc123"), "abc123"),
    ],
)
def test_a_hub_id_is_asked_for_at_its_revision(
    hub: tuple[Asked, dict[str, Path]], whole: Path, source: Source, revision: str | None
) -> None:
    asked, _ = hub
    checkpoint = open_checkpoint(source)
    assert_holds(checkpoint, load_file(whole / "model.safetensors"))
    assert checkpoint.label == source.source
    assert [(repo, options["revision"]) for repo, options in asked] == [("org/model", revision)]


def test_a_hub_download_asks_for_weights_and_texts_but_never_for_code(hub: tuple[Asked, dict[str, Path]]) -> None:
    asked, _ = hub
    open_checkpoint("org/model")
    patterns = asked[0][1]["allow_patterns"]
    wanted = ["model.safetensors", INDEX, "config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    unwanted = ["modeling_evil.py", "pytorch_model.bin", "model.gguf", "flax_model.msgpack"]
    kept = list(huggingface_hub.utils.filter_repo_objects([*wanted, *unwanted], allow_patterns=patterns))
    assert kept == wanted


def test_bin_files_are_downloaded_only_where_there_are_no_safetensors(
    hub: tuple[Asked, dict[str, Path]], binary: Path, whole: Path
) -> None:
    asked, repos = hub
    repos["org/old"] = binary
    assert_holds(open_checkpoint("org/old@main"), load_file(whole / "model.safetensors"))
    assert [options["allow_patterns"][-1] for _, options in asked] == ["*.safetensors", "*.bin"]
    assert {options["revision"] for _, options in asked} == {"main"}


def test_what_the_hub_does_not_have_is_one_line(
    hub: tuple[Asked, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "hub_answers", lambda: True)
    message = one_line(Source(source="org/none"))
    assert message.startswith("org/none: ") and "hub" in message and "cannot find org/none" in message


def test_a_refusal_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo: str, **options: Any) -> str:
        request = sys.modules[Response.__module__.partition(".")[0]].Request("GET", "https://hub.invalid")
        response = Response(404, request=request)
        raise RepositoryNotFoundError("404 Client Error.\n\nRepository Not Found", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "org/private" in one_line(Source(source="org/private"))


@pytest.mark.parametrize(
    "text", ["nowhere", "./nowhere", "../nowhere", "/no/where/at/all", "a/b/c", "a b/c", "org/", "~/no-such-folder"]
)
def test_what_cannot_be_a_hub_id_is_not_asked_of_the_hub(hub: tuple[Asked, dict[str, Path]], text: str) -> None:
    message = one_line(Source(source=text))
    assert text in message and "no such folder" in message
    assert not hub[0]


def test_local_sources_never_ask_the_hub(
    hub: tuple[Asked, dict[str, Path]],
    whole: Path,
    sharded: Path,
    binary: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "org").mkdir()
    shutil.copytree(whole, tmp_path / "org" / "model")  # a folder that looks like a hub id is a folder
    monkeypatch.chdir(tmp_path)
    for source in (whole, sharded, binary, "org/model"):
        open_checkpoint(source)
    assert not hub[0]


def test_a_repository_without_weights_says_so(hub: tuple[Asked, dict[str, Path]], tmp_path: Path) -> None:
    ARCHITECTURES["llama"]().save_pretrained(tmp_path / "bare")
    hub[1]["org/bare"] = tmp_path / "bare"
    assert "org/bare: no weights found" in one_line(Source(source="org/bare"))


def test_the_fingerprint_changes_with_the_weights(sharded: Path) -> None:
    before = open_checkpoint(sharded).fingerprint()
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(before) == len(shards)
    shard = shards[1]
    save_file({name: value + 1 for name, value in load_file(shard).items()}, shard)
    after = open_checkpoint(sharded).fingerprint()
    assert after != before
    assert len(set(before) - set(after)) == len(set(after) - set(before)) == 1
