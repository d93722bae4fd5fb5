"""Bad input through the command line: exit code 2, one line that names the culprit, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import polymerge
from polymerge.cli.main import main
from tests.tiny import COMMON, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
SOURCE = str(Path(polymerge.__file__).parents[1])
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj.weight"


@dataclass
class Case:
    """A folder with two good experts, `e0` and `e1`, and a recipe of them, for a row of the table to spoil."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def e0(self) -> Path:
        return self.folder / "e0"

    @property
    def e1(self) -> Path:
        return self.folder / "e1"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def write(self, **changes: Any) -> None:
        """The recipe, with changes."""
        self.recipe.write_text(yaml.safe_dump({"experts": {"one": "./e0", "two": "./e1"}, **changes}, sort_keys=False))

    def text(self, text: str) -> None:
        self.recipe.write_text(text)

    def edit_json(self, name: str, folder: str = "e1", **changes: Any) -> None:
        file = self.folder / folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    def edit_tensors(self, change: Callable[[dict[str, torch.Tensor]], object], *folders: str) -> None:
        for folder in folders or ("e1",):
            file = self.folder / folder / WEIGHTS
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, {"format": "pt"})

    def edit_value(self, name: str, value: float, dtype: torch.dtype = torch.float32) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name] = tensors[name].to(dtype)
            tensors[name].view(-1)[5] = value

        self.edit_tensors(change)

    def edit_header(self, change: Callable[[dict[str, Any]], object]) -> None:
        data = (self.e1 / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        self.header(json.dumps(header).encode(), data[8 + length :])

    def header(self, text: bytes, data: bytes = b"", length: int | None = None) -> None:
        (self.e1 / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)

    def shard(self) -> dict[str, str]:
        """Splits e1 into two shards; the weight map."""
        tensors = load_file(self.e1 / WEIGHTS)
        (self.e1 / WEIGHTS).unlink()
        names = sorted(tensors)
        weight_map = {}
        for number, part in enumerate((names[:10], names[10:]), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, self.e1 / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        self.index(weight_map)
        return weight_map

    def index(self, weight_map: object) -> None:
        (self.e1 / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    def redirect(self, file: str) -> None:
        """Points one tensor of the index somewhere else."""
        self.index({**self.shard(), Q0: file})

    def replace_expert(self, **config: Any) -> None:
        shutil.rmtree(self.e1)
        made = make_experts("llama", self.folder, count=1, seed=9, config=LlamaConfig(**{**COMMON, **config}))
        made["e0"].rename(self.e1)

    def adapter(self, base: str | None) -> None:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(self.e0), LoraConfig(target_modules=["q_proj"]))
        model.save_pretrained(self.folder / "lora")
        self.edit_json("adapter_config.json", "lora", base_model_name_or_path=base)
        self.write(experts={"one": "./e0", "tuned": "./lora"})

    def gguf(self, content: bytes) -> None:
        (self.folder / "model.gguf").write_bytes(content)
        self.write(experts={"one": "./e0", "two": "./model.gguf"})

    def bundle(self) -> None:
        polymerge.merge({"experts": {"one": str(self.e0), "two": str(self.e1)}}, self.folder / "out")


class Bomb:
    """Pickles as a call."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def bin_with_code(case: Case, *, zipped: bool) -> None:
    (case.e1 / WEIGHTS).unlink()
    with (case.e1 / "pytorch_model.bin").open("wb") as handle:
        if zipped:
            torch.save({Q0: torch.zeros(2, 2), "x": Bomb(case.folder / "ran")}, handle)
        else:
            pickle.dump({Q0: Bomb(case.folder / "ran")}, handle)


def no_space(case: Case) -> None:
    usage = shutil.disk_usage(case.folder)
    case.monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))


def truncate(file: Path, keep: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


def swap(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    assert name in tensors
    tensors[name] = value


def in_place_of(path: Path, make: Callable[[Path], object]) -> None:
    """Something else where a file or a folder was."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


EXPERTS = "experts:\n  one: ./e0\n  two: ./e1\n"
# What is spoilt, how, and which words the line must have.
ROWS: dict[str, tuple[Callable[[Case], object], list[str]]] = {
    # the recipe
    "recipe missing": (lambda c: c.recipe.unlink(), ["recipe.yaml", "No such file"]),
    "recipe is a folder": (lambda c: in_place_of(c.recipe, Path.mkdir), ["recipe.yaml", "directory"]),
    "recipe is not text": (lambda c: c.recipe.write_bytes(b"\xff\xfe\x00\x80"), ["recipe.yaml", "cannot read"]),
    "recipe has a control character": (lambda c: c.text("experts: \x00"), ["recipe.yaml", "not valid YAML"]),
    "recipe is not YAML": (lambda c: c.text(EXPERTS + "seed: [1\n"), ["recipe.yaml", "line ", "not valid YAML"]),
    "recipe with a Python tag": (
        lambda c: c.text(EXPERTS + "seed: !!python/object/apply:os.system ['touch ran']\n"),
        ["recipe.yaml", "line 4", "not valid YAML"],
    ),
    "recipe that holds itself": (lambda c: c.text("experts: &a\n  one: *a\n  two: ./e1\n"), ["recipe.yaml"]),
    "recipe nested without end": (lambda c: c.text("[" * 5000), ["recipe.yaml"]),
    "recipe is empty": (lambda c: c.text(""), ["recipe.yaml"]),
    "unknown key": (
        lambda c: c.text(EXPERTS + "rate: 0.5\n"),
        ["recipe.yaml, line 4", "rate", "unknown", "compress_rate"],
    ),
    "expert twice": (
        lambda c: c.text("experts:\n  a: ./e0\n  a: ./e1\n"),
        ["recipe.yaml, line 3", "experts.a", "twice", "line 2"],
    ),
    "expert twice but for case": (lambda c: c.write(experts={"a": "./e0", "A": "./e1"}), ["line 1", "same name"]),
    "one expert": (lambda c: c.write(experts={"a": "./e0"}), ["line 1", "at least two experts, found 1"]),
    "no experts": (lambda c: c.write(experts={}), ["line 1", "at least two experts, found 0"]),
    "no experts key": (lambda c: c.text("seed: 1\n"), ["recipe.yaml", "experts"]),
    "name climbs": (lambda c: c.write(experts={"../x": "./e0", "b": "./e1"}), ["'../x'", "line 1"]),
    "name with a slash": (lambda c: c.write(experts={"a/b": "./e0", "b": "./e1"}), ["'a/b'"]),
    "name is empty": (lambda c: c.write(experts={"": "./e0", "b": "./e1"}), ["''", "letters"]),
    "name is a number": (lambda c: c.write(experts={1: "./e0", "b": "./e1"}), ["recipe.yaml", "line ", "experts"]),
    "rate over one": (lambda c: c.write(compress_rate=1.5), ["line 4", "compress_rate", "less than or equal to 1"]),
    "rate in words": (lambda c: c.write(compress_rate="high"), ["line 4", "compress_rate", "number"]),
    "rate is not a number": (lambda c: c.write(compress_rate=float("nan")), ["line 4", "compress_rate"]),
    "dtype": (lambda c: c.write(dtype="int8"), ["line 4", "dtype", "bfloat16"]),
    "scale": (lambda c: c.write(scale="both"), ["line 4", "scale", "shared"]),
    "device": (lambda c: c.write(device="tpu"), ["line 4", "device", "cuda"]),
    "device that is not there": (lambda c: c.write(device="cuda:99"), ["device", "cuda:99"]),
    "no workers": (lambda c: c.write(workers=0), ["line 4", "workers", "greater than or equal to 1"]),
    "source is empty": (lambda c: c.write(experts={"one": "", "two": "./e1"}), ["line 2", "experts.one"]),
    # the sources
    "source missing": (lambda c: shutil.rmtree(c.e1), ["e1", "no such folder"]),
    "source is a file": (lambda c: in_place_of(c.e1, Path.touch), ["e1", "a file", ".gguf"]),
    "source is the weights' file": (lambda c: c.write(experts={"a": "./e0", "b": f"./e1/{WEIGHTS}"}), ["e1", "folder"]),
    "package missing": (
        lambda c: c.write(experts={"a": "./e0", "b": "package:no-such-package"}),
        ["package:no-such-package", "not installed", "pip install"],
    ),
    "package inside a missing package": (
        lambda c: c.write(experts={"a": "./e0", "b": "package:no-such.package"}),
        ["package:no-such.package"],
    ),
    "package without a model": (
        lambda c: c.write(experts={"a": "./e0", "b": "package:yaml"}),
        ["package:yaml", ".gguf"],
    ),
    "no config.json": (lambda c: (c.e1 / "config.json").unlink(), ["e1", "config.json"]),
    "config.json is not JSON": (lambda c: (c.e1 / "config.json").write_text("{"), ["e1/config.json", "not valid JSON"]),
    "config.json is a list": (lambda c: (c.e1 / "config.json").write_text("[]"), ["e1/config.json", "object", "list"]),
    "config.json is not text": (lambda c: (c.e1 / "config.json").write_bytes(b"\xff\xfe{"), ["e1/config.json"]),
    "config.json is a folder": (lambda c: in_place_of(c.e1 / "config.json", Path.mkdir), ["e1/config.json"]),
    "config.json nested without end": (
        lambda c: (c.e1 / "config.json").write_text('{"a":' + "[" * 100_000),
        ["e1/config.json"],
    ),
    "architectures is a number": (lambda c: c.edit_json("config.json", architectures=7), ["architectures", "7"]),
    "no weights": (lambda c: (c.e1 / WEIGHTS).unlink(), ["e1", "no weights found"]),
    "weights are a folder": (lambda c: in_place_of(c.e1 / WEIGHTS, Path.mkdir), [f"e1/{WEIGHTS}"]),
    "weights are empty": (lambda c: (c.e1 / WEIGHTS).write_bytes(b""), [f"e1/{WEIGHTS}", "truncated"]),
    "weights without tensors": (lambda c: c.header(b"{}"), [f"e1/{WEIGHTS}", "no tensors"]),
    "truncated": (lambda c: truncate(c.e1 / WEIGHTS, 0.7), [f"e1/{WEIGHTS}", "truncated"]),
    "truncated in the header": (lambda c: truncate(c.e1 / WEIGHTS, 0.003), [f"e1/{WEIGHTS}", "truncated"]),
    "longer than it says": (
        lambda c: (c.e1 / WEIGHTS).write_bytes((c.e1 / WEIGHTS).read_bytes() + b"more"),
        [f"e1/{WEIGHTS}"],
    ),
    "header of 2^63 bytes": (lambda c: c.header(b"{}", length=2**63), [f"e1/{WEIGHTS}"]),
    "header of 99 MB": (lambda c: c.header(b"{}", length=99_000_000), [f"e1/{WEIGHTS}"]),
    "header is not JSON": (lambda c: c.header(b"not json"), [f"e1/{WEIGHTS}"]),
    "header is a list": (lambda c: c.header(b"[1, 2]"), [f"e1/{WEIGHTS}"]),
    "offsets beyond the file": (
        lambda c: c.edit_header(lambda h: h[Q0].update(data_offsets=[10**9, 10**9 + 9216])),
        [f"e1/{WEIGHTS}"],
    ),
    "offsets backwards": (lambda c: c.edit_header(lambda h: h[Q0]["data_offsets"].reverse()), [f"e1/{WEIGHTS}"]),
    "offsets overlap": (
        lambda c: c.edit_header(lambda h: h[Q0].update(data_offsets=h[Q0.replace("q_proj", "o_proj")]["data_offsets"])),
        [f"e1/{WEIGHTS}"],
    ),
    "shape larger than its data": (lambda c: c.edit_header(lambda h: h[Q0].update(shape=[480, 48])), [f"e1/{WEIGHTS}"]),
    "shape overflows": (lambda c: c.edit_header(lambda h: h[Q0].update(shape=[2**62, 2**62])), [f"e1/{WEIGHTS}"]),
    "unknown type": (lambda c: c.edit_header(lambda h: h[Q0].update(dtype="F7")), [f"e1/{WEIGHTS}"]),
    "shard missing": (
        lambda c: (c.shard(), (c.e1 / "model-00002-of-00002.safetensors").unlink()),
        [f"e1/{INDEX}", "model-00002-of-00002.safetensors", "missing"],
    ),
    "shard truncated": (
        lambda c: (c.shard(), truncate(c.e1 / "model-00002-of-00002.safetensors", 0.5)),
        ["e1/model-00002-of-00002.safetensors", "truncated"],
    ),
    "index climbs": (lambda c: c.redirect(f"../e0/{WEIGHTS}"), [f"e1/{INDEX}", f"'{Q0}'", "'../e0/", "refused"]),
    "index is absolute": (lambda c: c.redirect("/etc/passwd"), [f"e1/{INDEX}", f"'{Q0}'", "'/etc/passwd'", "refused"]),
    "index leads to a broken link": (
        lambda c: ((c.e1 / "x.safetensors").symlink_to("/nowhere/at/all"), c.redirect("x.safetensors")),
        [f"e1/{INDEX}", "x.safetensors", "missing"],
    ),
    "index leads to a link to something else": (
        lambda c: ((c.e1 / "x.safetensors").symlink_to("/etc/passwd"), c.redirect("x.safetensors")),
        ["e1/x.safetensors", "not a whole safetensors file"],
    ),
    "index is not JSON": (lambda c: (c.shard(), (c.e1 / INDEX).write_text("{")), [f"e1/{INDEX}", "not valid JSON"]),
    "index without a map": (lambda c: (c.shard(), (c.e1 / INDEX).write_text("{}")), [f"e1/{INDEX}", "weight_map"]),
    "index lists what the shard lacks": (
        lambda c: c.redirect("model-00002-of-00002.safetensors"),
        [f"e1/{INDEX}", f"'{Q0}'", "model-00002-of-00002.safetensors"],
    ),
    "index leaves out what the shard has": (
        lambda c: c.index({name: file for name, file in c.shard().items() if name != Q0}),
        ["e1/model-00001-of-00002.safetensors", f"'{Q0}'", INDEX],
    ),
    "index lost": (lambda c: (c.shard(), (c.e1 / INDEX).unlink()), ["e1", INDEX]),
    "pickle with code": (lambda c: bin_with_code(c, zipped=True), ["e1/pytorch_model.bin", "safetensors"]),
    "old pickle with code": (lambda c: bin_with_code(c, zipped=False), ["e1/pytorch_model.bin", "safetensors"]),
    "gguf with another start": (lambda c: c.gguf(b"GGML" + bytes(100)), ["model.gguf", "GGUF"]),
    "gguf cut off": (lambda c: c.gguf(b"GGUF" + struct.pack("<IQQ", 3, 5, 5)), ["model.gguf", "GGUF"]),
    "gguf is empty": (lambda c: c.gguf(b""), ["model.gguf", "GGUF"]),
    "adapter without a base": (lambda c: c.adapter(None), ["lora", "`base:`"]),
    "adapter whose base is gone": (lambda c: c.adapter("/no/such/base"), ["lora", "/no/such/base", "base"]),
    # sources that do not fit each other
    "other architecture": (
        lambda c: in_place_of(c.e1, lambda p: make_experts("gpt2", c.folder, count=1)["e0"].rename(p)),
        ["'one'", "'two'", "LlamaForCausalLM", "GPT2LMHeadModel"],
    ),
    "other number of heads": (
        lambda c: c.replace_expert(num_attention_heads=8, head_dim=12),
        ["'one'", "'two'", "differ in num_attention_heads: 4 and 8"],
    ),
    "other width": (
        lambda c: c.replace_expert(intermediate_size=96),
        ["'one'", "'two'", "differ in shape", "mlp", "[80, 48] and [96, 48]", "and 3 more"],
    ),
    "more layers": (lambda c: c.replace_expert(num_hidden_layers=3), ["'one'", "lacks", "model.layers.2."]),
    "tensor missing": (lambda c: c.edit_tensors(lambda t: t.pop(Q0)), ["e1", f"'{Q0}'", "missing"]),
    "both lack a tensor": (lambda c: c.edit_tensors(lambda t: t.pop(Q0), "e0", "e1"), ["e0", f"'{Q0}'", "missing"]),
    "shapes are not the configuration's": (
        lambda c: c.edit_tensors(lambda t: swap(t, Q0, torch.ones(50, 48)), "e0", "e1"),
        ["e0", Q0, "[50, 48]", "[48, 48]"],
    ),
    "quantised to int8": (
        lambda c: c.edit_tensors(lambda t: swap(t, Q0, torch.ones(48, 48, dtype=torch.int8))),
        ["'two'", f"'{Q0}'", "I8", "quantised"],
    ),
    "quantised to float8": (
        lambda c: c.edit_tensors(lambda t: swap(t, Q0, torch.ones(48, 48).to(torch.float8_e4m3fn))),
        ["'two'", f"'{Q0}'", "F8_E4M3", "quantised"],
    ),
    "different dtypes": (
        lambda c: c.edit_tensors(lambda t: t.update({n: v.bfloat16() for n, v in t.items()})),
        ["one: float32", "two: bfloat16", "`dtype:`"],
    ),
    # the place
    "too little disk": (no_space, ["out", "free"]),
    "output is there": (lambda c: (c.bundle(), c.write()), ["out", "exists", "--overwrite"]),
    "output is a file": (lambda c: (c.folder / "out").touch(), ["out", "exists"]),
}  # fmt: skip

# Found while the tensors are read: what was finished before stays in out.partial, for --resume.
WHILE_READING: dict[str, tuple[Callable[[Case], object], list[str]]] = {
    "NaN in a weight": (lambda c: c.edit_value(Q0, float("nan")), ["'two'", f"'{Q0}'", "1 NaN or infinite"]),
    "infinity in a norm": (
        lambda c: c.edit_value("model.norm.weight", float("inf")),
        ["'two'", "'model.norm.weight'", "1 NaN or infinite"],
    ),
    "NaN in an embedding, two workers": (
        lambda c: (c.edit_value("model.embed_tokens.weight", float("nan")), c.write(workers=2)),
        ["'two'", "'model.embed_tokens.weight'", "NaN"],
    ),
    "weight too large for the bundle's dtype": (
        lambda c: (c.edit_value(Q0, 1e6), c.write(dtype="float16", compress_rate=0.5)),
        ["two", Q0, "float16"],
    ),
    "norm too large for the bundle's dtype": (
        lambda c: (c.edit_value("model.norm.weight", 1e6), c.write(dtype="float16")),
        ["two", "model.norm.weight", "float16"],
    ),
    "weight too large for float32": (lambda c: c.edit_value(Q0, 1e300, torch.float64), ["two", Q0]),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_experts("llama", tmp_path_factory.mktemp("originals"), count=2)


@pytest.fixture
def case(originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    for name, path in originals.items():
        shutil.copytree(path, tmp_path / name)
    made = Case(tmp_path, monkeypatch)
    made.write()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLYMERGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "gguf").mkdir(parents=True)
    return made


def everything(folder: Path) -> dict[str, bytes | None]:
    """All files with their bytes, links and folders included."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
    }


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """The exit code and standard error of the command, in this process; an exception that escapes fails the test."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["polymerge", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, capsys.readouterr().err


def assert_one_line(error: str, words: list[str]) -> None:
    lines = [line for line in error.splitlines() if not line.startswith(("note: ", "merging: "))]
    assert len(lines) == 1, error
    assert lines[0].startswith("polymerge: ")
    assert "Traceback" not in error
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("row", ROWS)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    spoil, words = ROWS[row]
    spoil(case)
    before = everything(case.folder)
    code, error = run(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "out")
    assert code == 2
    assert_one_line(error, words)
    assert everything(case.folder) == before


@pytest.mark.parametrize("row", WHILE_READING)
def test_what_is_found_while_reading_is_one_line_and_no_bundle(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    spoil, words = WHILE_READING[row]
    spoil(case)
    before = everything(case.folder)
    code, error = run(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "out")
    assert code == 2
    assert_one_line(error, words)
    after = everything(case.folder)  # the lock, a file without content, stays for the next writer
    left = {name: value for name, value in after.items() if not name.startswith(("out.partial", ".out.polymerge.lock"))}
    assert left == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compress-rate", "1.5"], ["compress_rate", "less than or equal to 1"]),
        (["--workers", "0"], ["workers", "greater than or equal to 1"]),
        (["--device", "tpu"], ["device"]),
        (["-o", "."], ["."]),
        (["-o", "/"], ["/"]),
        (["-o", "recipe.yaml/out"], ["recipe.yaml"]),
        (["-o", "e0"], ["e0", "exists"]),
        (["-o", "e0", "--overwrite"], ["e0", "not a bundle"]),
    ],
    ids=str,
)
def test_bad_options_are_one_line_and_leave_nothing(
    case: Case,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: list[str],
) -> None:
    before = everything(case.folder)
    code, error = run(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "out", *arguments)
    assert code == 2
    assert_one_line(error, words)
    assert everything(case.folder) == before


@pytest.mark.parametrize("kind", ["file", "folder", "checkpoint"])
def test_what_is_not_a_bundle_is_never_overwritten(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out = case.folder / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "checkpoint":
        shutil.copytree(case.e0, out)
    else:
        (out / "photos").mkdir(parents=True)
        (out / "photos" / "one.jpg").write_text("mine")
    before = everything(case.folder)
    code, error = run(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "out", "--overwrite")
    assert code == 2
    assert_one_line(error, ["out", "is not a bundle"])
    assert everything(case.folder) == before


def test_a_bundle_that_is_a_source_of_its_successor_is_not_lost(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case.bundle()
    case.write(experts={"one": "./e0", "average-of-both": "./out"})
    average = load_file(case.folder / "out" / WEIGHTS)
    arguments = ["merge", "recipe.yaml", "-o", "out", "--overwrite", "--compress-rate", "0", "--quiet"]
    assert run(monkeypatch, capsys, *arguments) == (0, "")
    bundle = polymerge.Bundle.open(case.folder / "out")
    for name, value in average.items():
        assert torch.equal(bundle.reconstruct("average-of-both", name), value)


def test_a_local_path_in_a_recipe_never_asks_the_hub(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: asked.append(repo) or str(case.e1))
    (case.folder / "recipes").mkdir()
    text = "experts:\n  one: ../e0\n  two: ./e1\n"  # ./e1 is a mistake: there is no recipes/e1
    (case.folder / "recipes" / "r.yaml").write_text(text)
    code, error = run(monkeypatch, capsys, "merge", "recipes/r.yaml", "-o", "out")
    assert not asked
    assert code == 2
    assert_one_line(error, ["recipes/e1", "no such folder"])


@pytest.mark.parametrize("row", ["pickle with code", "old pickle with code", "recipe with a Python tag"])
def test_code_in_the_input_does_not_run(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    ROWS[row][0](case)
    run(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "out")
    assert not (case.folder / "ran").exists()


@pytest.mark.parametrize("row", ["expert twice", "truncated", "other width", "pickle with code"])
def test_a_real_process_says_the_same(case: Case, row: str) -> None:
    spoil, words = ROWS[row]
    spoil(case)
    before = everything(case.folder)
    done = subprocess.run(
        [sys.executable, "-m", "polymerge", "merge", "recipe.yaml", "-o", "out"],
        env={**os.environ, "PYTHONPATH": SOURCE, "COLUMNS": "40"},
        cwd=case.folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert_one_line(done.stderr, words)
    assert everything(case.folder) == before


def add(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    tensors[name] = value


def linked_like_the_hubs_cache(case: Case) -> None:
    """Snapshots of the hub's cache are folders of links to blobs elsewhere."""
    case.shard()
    blobs = case.folder / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(case.e1.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../blobs/{number}")


# Odd, but nothing is wrong with it.
VALID: dict[str, Callable[[Case], object]] = {
    "shards as links": linked_like_the_hubs_cache,
    "a weight of zeros": lambda c: c.edit_tensors(lambda t: swap(t, Q0, torch.zeros(48, 48))),
    "weights of zeros in all": lambda c: c.edit_tensors(lambda t: swap(t, Q0, torch.zeros(48, 48)), "e0", "e1"),
    "a norm of zeros": lambda c: c.edit_tensors(lambda t: swap(t, "model.norm.weight", torch.zeros(48))),
    "a small number beyond bfloat16": lambda c: c.edit_value(Q0, 1e-42),
    "a large number": lambda c: c.edit_value(Q0, 1e18),
    "a buffer that is no parameter": lambda c: c.edit_tensors(
        lambda t: add(t, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.arange(6.0)), "e0", "e1"
    ),
    "a number without dimensions": lambda c: c.edit_tensors(
        lambda t: add(t, "model.step", torch.tensor(7)), "e0", "e1"
    ),
    "a tensor without numbers": lambda c: c.edit_tensors(lambda t: add(t, "model.none", torch.zeros(0, 4)), "e0", "e1"),
    "an unknown model with a number without dimensions": lambda c: [
        (
            c.edit_json("config.json", folder, model_type="never-heard-of", architectures=["NeverHeardOf"]),
            c.edit_tensors(lambda t, number=number: add(t, "model.scale", torch.tensor(1.5 + number)), folder),
        )
        for number, folder in enumerate(("e0", "e1"))
    ],
    "a name with spaces and signs": lambda c: (
        c.e1.rename(c.folder / "my [model] ✓"),
        c.write(experts={"one": "./e0", "two": "./my [model] ✓"}),
    ),
}


@pytest.mark.parametrize("row", VALID)
@pytest.mark.parametrize("rate", ["0", "0.6", "1"])
def test_odd_but_valid_input_is_merged_and_verified(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, row: str, rate: str
) -> None:
    VALID[row](case)
    code, error = run(monkeypatch, capsys, "merge", "recipe.yaml", "-o", "out", "--compress-rate", rate, "--quiet")
    assert (code, error) == (0, "")
    report = polymerge.verify(case.folder / "out", sources=True)
    assert report.ok, report.problems
    if rate == "0":
        assert all(check.exact == check.tensors for check in report.sources)
