"""Damaged files, at random but with a seed: a refusal in one line or a whole bundle, and never anything else."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from polymerge import load_model, merge, verify
from polymerge.errors import PolymergeError
from tests.tiny import COMMON, make_experts

INDEX = "model.safetensors.index.json"
pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two one-layer experts, of which `e1` lies in two shards."""
    folder = tmp_path_factory.mktemp("originals")
    config = LlamaConfig(**{**COMMON, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24})
    for name, path in make_experts("llama", folder, count=2, config=config).items():
        path.rename(folder / name)
    tensors = load_file(folder / "e1" / WEIGHTS)
    (folder / "e1" / WEIGHTS).unlink()
    weight_map = {}
    for file, part in zip(SHARDS, (sorted(tensors)[:5], sorted(tensors)[5:]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / "e1" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "e1" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
    return folder


Damage = Callable[[bytes, random.Random], bytes]


def flip(data: bytes, draw: random.Random) -> bytes:
    """One to three bytes become others."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        changed[draw.randrange(len(changed))] ^= draw.randint(1, 255)
    return bytes(changed)


def flip_header(data: bytes, draw: random.Random) -> bytes:
    """The same, in the length and the JSON in front of the tensors."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return flip(data[:end], draw) + data[end:]


def flip_digit(data: bytes, draw: random.Random) -> bytes:
    """A digit of the header's JSON becomes another: the JSON stays whole, and lies."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    places = [place for place in range(8, end) if chr(data[place]).isdigit()]
    changed = bytearray(data)
    changed[draw.choice(places)] = ord(draw.choice("0123456789"))
    return bytes(changed)


def change_digit(data: bytes, draw: random.Random) -> bytes:
    """A digit anywhere becomes another: JSON of the same length that is whole, and lies."""
    place = draw.choice([place for place, byte in enumerate(data) if chr(byte).isdigit()])
    return data[:place] + draw.choice("123456789").encode() + data[place + 1 :]


def truncate(data: bytes, draw: random.Random) -> bytes:
    """The file ends early."""
    return data[: draw.randrange(len(data))]


def cut_out(data: bytes, draw: random.Random) -> bytes:
    """A few bytes in the middle are gone."""
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.randint(1, 20) :]


def wrong_value(data: bytes, draw: random.Random) -> bytes:
    """Whole JSON in which one value is of another kind."""
    document = json.loads(data)
    owner = draw.choice([document, *(value for value in document.values() if isinstance(value, dict) and value)])
    values = [None, -1, 0, 1.5, True, "", "x", [], {}, ["x"], {"x": 1}]
    owner[draw.choice(list(owner))] = draw.choice(values)
    return json.dumps(document).encode()


KINDS: dict[str, tuple[str, Damage, int]] = {
    "weights, header": (f"e0/{WEIGHTS}", flip_header, 25),
    "weights, numbers of the header": (f"e0/{WEIGHTS}", flip_digit, 20),
    "weights, anywhere": (f"e0/{WEIGHTS}", flip, 15),
    "weights, truncated": (f"e0/{WEIGHTS}", truncate, 15),
    "weights, bytes lost": (f"e0/{WEIGHTS}", cut_out, 10),
    "shard, header": (f"e1/{SHARDS[1]}", flip_header, 10),
    "index, bytes": (f"e1/{INDEX}", flip, 15),
    "index, truncated": (f"e1/{INDEX}", truncate, 5),
    "index, values": (f"e1/{INDEX}", wrong_value, 10),
    "configuration, bytes": ("e0/config.json", flip, 15),
    "configuration, numbers": ("e0/config.json", change_digit, 15),
    "configuration, truncated": ("e0/config.json", truncate, 5),
    "configuration, values": ("e0/config.json", wrong_value, 40),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind, row in KINDS.items() for seed in range(row[2])])
def test_a_damaged_source_is_refused_or_merged_whole(originals: Path, tmp_path: Path, kind: str, seed: int) -> None:
    shutil.copytree(originals, tmp_path / "x")
    name, damage, _ = KINDS[kind]
    file, out = tmp_path / "x" / name, tmp_path / "out"
    file.write_bytes(damage(file.read_bytes(), random.Random(f"{kind} {seed}")))
    sources = {expert: str(tmp_path / "x" / expert) for expert in ("e0", "e1")}
    try:
        merge({"experts": sources, "compress_rate": 1.0}, out)
    except PolymergeError as error:
        assert "\n" not in str(error), str(error)
        assert not out.exists()
    else:
        assert verify(out).ok
        assert not out.with_name("out.partial").exists()


@pytest.fixture(scope="module")
def bundle(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = {expert: str(originals / expert) for expert in ("e0", "e1")}
    return merge(
        {"experts": sources, "code": "factors", "compress_rate": 0.6}, tmp_path_factory.mktemp("bundle") / "b"
    ).path


MANIFEST: dict[str, tuple[Damage, int]] = {
    "bytes": (flip, 30),
    "numbers": (change_digit, 20),
    "truncated": (truncate, 5),
    "values": (wrong_value, 30),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind, row in MANIFEST.items() for seed in range(row[1])])
def test_a_damaged_manifest_is_refused_in_one_line_or_harmless(
    bundle: Path, tmp_path: Path, kind: str, seed: int
) -> None:
    copy = tmp_path / "b"
    shutil.copytree(bundle, copy)
    file = copy / "polymerge.json"
    file.write_bytes(MANIFEST[kind][0](file.read_bytes(), random.Random(f"{kind} {seed}")))
    for use in (verify, load_model):
        try:
            use(copy)
        except PolymergeError as error:
            assert "\n" not in str(error), str(error)


LOADED: dict[str, tuple[str, Damage, int]] = {
    "weights": (WEIGHTS, flip_header, 20),
    "numbers of the weights' header": (WEIGHTS, flip_digit, 10),
    "adapter": ("experts/e0/adapter_model.safetensors", flip_header, 15),
    "numbers of the adapter's header": ("experts/e0/adapter_model.safetensors", flip_digit, 10),
    "scales": ("experts/e1/scales.safetensors", flip_header, 10),
    "configuration": ("config.json", flip, 25),
    "numbers of the configuration": ("config.json", change_digit, 25),
    "numbers of an adapter's configuration": ("experts/e0/adapter_config.json", change_digit, 5),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind, row in LOADED.items() for seed in range(row[2])])
def test_a_damaged_bundle_loads_or_is_refused_in_one_line(bundle: Path, tmp_path: Path, kind: str, seed: int) -> None:
    copy = tmp_path / "b"
    shutil.copytree(bundle, copy)
    name, damage, _ = LOADED[kind]
    (copy / name).write_bytes(damage((copy / name).read_bytes(), random.Random(f"{kind} {seed}")))
    try:
        load_model(copy)
    except PolymergeError as error:
        assert "\n" not in str(error), str(error)
