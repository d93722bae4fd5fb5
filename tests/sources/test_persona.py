"""What a folder says beside its weights, and which two say the same. The oracle is transformers' own reading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from polymerge.errors import ModelError, SourceError
from polymerge.sources.persona import (
    Persona,
    differing,
    load_tokenizer,
    read_generation,
    read_persona,
    read_templates,
    same_words,
)
from tests.tiny import tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
OTHER = "{% for m in messages %}w7 {{ m['content'] }} w8 {% endfor %}"


def folder_of(path: Path, template: Any = None, generation: dict[str, Any] | None = None, **config: Any) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    hf.LlamaConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, **config).save_pretrained(path)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def persona(path: Path) -> Persona:
    return read_persona(path, json.loads((path / "config.json").read_text()))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data, indent=7))


def inline(path: Path, value: Any, name: str = "tokenizer_config.json") -> None:
    """Puts templates where older versions had them."""
    for file in [*path.glob("*.jinja"), *path.glob("*/*.jinja")]:
        file.unlink()
    file = path / name
    if not file.exists():
        file.write_text("{}")
    edit(file, lambda data: data.update(chat_template=value))


@pytest.mark.parametrize("templates", [None, TEMPLATE, {"default": TEMPLATE, "tool_use": OTHER}])
@pytest.mark.parametrize("place", ["files", "inside"])
def test_templates_are_those_of_transformers(tmp_path: Path, templates: Any, place: str) -> None:
    path = folder_of(tmp_path, templates)
    if place == "inside" and templates:
        named = isinstance(templates, dict)
        inline(path, [{"name": n, "template": t} for n, t in templates.items()] if named else templates)
    expected = hf.AutoTokenizer.from_pretrained(path).chat_template
    assert persona(path).chat_template == load_tokenizer(persona(path)).chat_template == expected == templates


def test_files_go_before_what_stands_inside(tmp_path: Path) -> None:
    path = folder_of(tmp_path, TEMPLATE)
    edit(path / "tokenizer_config.json", lambda data: data.update(chat_template=OTHER))
    assert read_templates(path) == {"default": TEMPLATE}
    assert hf.AutoTokenizer.from_pretrained(path).chat_template == TEMPLATE


def test_an_old_processor_s_template_is_found(tmp_path: Path) -> None:
    inline(folder_of(tmp_path), TEMPLATE, "chat_template.json")
    assert read_templates(tmp_path) == {"default": TEMPLATE}


@pytest.mark.parametrize("value", [[{"name": "../out", "template": TEMPLATE}], [{"name": "a"}], [7], {"a": 1}, 7])
def test_templates_that_are_none_are_refused(tmp_path: Path, value: Any) -> None:
    inline(folder_of(tmp_path), value)
    with pytest.raises(SourceError, match=r"tokenizer_config\.json: its chat_template is neither"):
        read_templates(tmp_path)


def test_generation_settings_are_the_file_s_or_the_configuration_s(tmp_path: Path) -> None:
    path = folder_of(tmp_path)
    config = json.loads((path / "config.json").read_text())
    assert read_generation(path, config) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 9], "transformers_version": "4.1"}')
    assert read_generation(path, config) == {"eos_token_id": [2, 9]}


def other_pad(path: Path) -> None:
    edit(path / "tokenizer_config.json", lambda data: data.update(pad_token="</s>"))


def other_word(path: Path) -> None:
    def swap(data: dict[str, Any]) -> None:
        words = data["model"]["vocab"]
        words["w3"], words["w4"] = words["w4"], words["w3"]

    edit(path / "tokenizer.json", swap)


SAME: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "layout of the files": lambda path: [edit(file, lambda data: None) for file in path.glob("*.json")],
    "padding and truncation": lambda path: edit(
        path / "tokenizer.json", lambda data: data.update(truncation={"max_length": 9, "stride": 0, "strategy":
        "LongestFirst", "direction": "Right"})
    ),
    "who wrote it": lambda path: edit(
        path / "tokenizer_config.json", lambda data: data.update(name_or_path="/somewhere", padding_side="right")
    ),
    "special tokens said twice": lambda path: (path / "special_tokens_map.json").write_text(
        '{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}'
    ),
    "the template inside": lambda path: inline(path, TEMPLATE),
    "end tokens as a list": lambda path: (path / "generation_config.json").write_text(
        '{"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0, "do_sample": false, "transformers_version": "4"}'
    ),
    "rope as older versions said it": lambda path: edit(
        path / "config.json", lambda data: (data.pop("rope_parameters"), data.update(rope_theta=10000.0))
    ),
    "no tokenizer at all": lambda path: [file.unlink() for file in [*path.glob("token*"), *path.glob("*.jinja")]],
}  # fmt: skip
UNLIKE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another word": (other_word, ("tokenizer",)),
    "another padding token": (other_pad, ("tokenizer",)),
    "another template": (lambda path: inline(path, OTHER), ("template",)),
    "no template": (lambda path: [file.unlink() for file in path.glob("*.jinja")], ("template",)),
    "one template more": (
        lambda path: inline(path, [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": OTHER}]),
        ("template",),
    ),
    "another end token": (
        lambda path: edit(path / "config.json", lambda data: data.update(eos_token_id=5)), ("generation",)
    ),
    "a temperature": (
        lambda path: (path / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.3}'),
        ("generation",),
    ),
    "a longer context": (
        lambda path: edit(path / "config.json", lambda data: data.update(max_position_embeddings=9999)), ("positions",)
    ),
    "all of them": (
        lambda path: (
            other_word(path), inline(path, OTHER),
            edit(path / "config.json", lambda data: data.update(eos_token_id=5, max_position_embeddings=9999)),
        ),
        ("tokenizer", "template", "generation", "positions"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", SAME)
def test_what_transformers_reads_alike_is_the_same(tmp_path: Path, row: str) -> None:
    one, other = (folder_of(tmp_path / name, TEMPLATE) for name in ("one", "other"))
    SAME[row](other)
    assert differing(persona(one), persona(other)) == ()


@pytest.mark.parametrize("row", UNLIKE)
def test_groups_differ_by_what_they_mean(tmp_path: Path, row: str) -> None:
    one, other = (folder_of(tmp_path / name, TEMPLATE) for name in ("one", "other"))
    change, groups = UNLIKE[row]
    change(other)
    assert differing(persona(one), persona(other)) == groups


def test_a_tokenizer_beside_none_differs(tmp_path: Path) -> None:
    one, other = (folder_of(tmp_path / name) for name in ("one", "other"))
    SAME["no tokenizer at all"](one)
    assert differing(persona(one), persona(other)) == ("tokenizer",)


def test_the_same_words_with_other_special_tokens(tmp_path: Path) -> None:
    one, pad, word = (folder_of(tmp_path / name) for name in ("one", "pad", "word"))
    other_pad(pad)
    other_word(word)
    tokenizers = [load_tokenizer(persona(path)) for path in (one, pad, word)]
    assert same_words(tokenizers[0], tokenizers[1]) and not same_words(tokenizers[0], tokenizers[2])


def test_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    hf.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(persona(tmp_path))


@pytest.mark.parametrize("left", [["tokenizer_config.json"], ["special_tokens_map.json", "added_tokens.json"]])
def test_files_without_words_are_no_tokenizer(tmp_path: Path, left: list[str]) -> None:
    path = folder_of(tmp_path)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").rename(path / left[0])
    for name in left[1:]:
        (path / name).write_text("{}")
    assert persona(path).files == ()
    with pytest.raises(ModelError, match="holds no tokenizer, so it takes token ids and no text; copy the files"):
        load_tokenizer(persona(path))


def test_a_tokenizer_of_bytes_needs_no_words(tmp_path: Path) -> None:
    hf.ByT5Tokenizer().save_pretrained(tmp_path)
    hf.LlamaConfig().save_pretrained(tmp_path)
    assert persona(tmp_path).files and load_tokenizer(persona(tmp_path))("abc").input_ids[:3] == [100, 101, 102]
