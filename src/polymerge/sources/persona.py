"""What an expert has beside its weights: tokenizer, chat templates, generation settings, positions, processors.

Read from a folder group by group, and compared by what it means, not by bytes: two files that transformers reads alike
are one. Knows the files of a Hugging Face folder; does not know how a bundle keeps them (`polymerge.bundle.personas`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ModelError, SourceError
from .checkpoint import Checkpoint, read_json
from .configuration import positions_of, resolved

Group = Literal["tokenizer", "template", "generation", "positions", "processor"]
GROUPS: tuple[Group, ...] = get_args(Group)
_WORDS = {"template": "chat template", "generation": "generation settings"}  # the others are plain words

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
# Those that hold no words: a folder with nothing else has no tokenizer, unless its class reads bytes or is none of
# transformers'.
WORDLESS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
OF_BYTES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
# How images and sound become numbers.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
# What processors wrote before there was a file of its own.
OLD_TEMPLATE = "chat_template.json"
GENERATION = "generation_config.json"
# Keys that say who wrote a file, not what it means.
OF_THE_WRITER = (
    "transformers_version", "_from_model_config", "name_or_path", "_name_or_path", "_commit_hash", "tokenizer_file",
    "processor_class", "auto_map", "padding_side", "truncation_side", "is_local", "local_files_only", "backend",
)  # fmt: skip
OF_THE_PROCESSORS_WRITER = ("transformers_version", "processor_class", "auto_map", "name_or_path", "_commit_hash")
# Of a configuration: what a forward pass gives back, not how an answer is made.
OF_THE_RUN = ("use_cache", "output_attentions", "output_hidden_states")
# Generation settings that hold where nothing is said.
UNSAID = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "num_beams": 1}
DEFAULT = "default"

Templates = Mapping[str, str]


@dataclass(frozen=True)
class Persona:
    """An expert without its weights.

    Attributes:
        folder: where its tokenizer files lie.
        files: their names; none where the expert has no tokenizer.
        templates: name -> chat template; `default` is the one that is used where none is named. Empty: it has none.
        generation: generation_config.json, or what config.json says in its place.
        config: config.json.
        config_folder: where that lies.
        processors: file -> what it says of how images and sound become numbers.
    """

    folder: Path
    files: tuple[str, ...]
    templates: Templates
    generation: Mapping[str, Any]
    config: Mapping[str, Any]
    config_folder: Path
    processors: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def positions(self) -> dict[str, Any]:
        """What its configuration says of positions, resolved."""
        return positions_of(resolved(self.config_folder, self.config))

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """As a tokenizer of transformers has it."""
        if set(self.templates) == {DEFAULT}:
            return self.templates[DEFAULT]
        return dict(self.templates) or None

    @property
    def max_length(self) -> int | None:
        """Tokens of its context, where its configuration says them."""
        lengths = (
            value for key, value in self.positions.items() if key.rpartition(".")[2] == "max_position_embeddings"
        )
        return next((int(value) for value in lengths if value), None)

    def with_tokenizer_of(self, other: Persona) -> Persona:
        """This one with another's tokenizer and templates."""
        return replace(self, folder=other.folder, files=other.files, templates=other.templates)


def persona_of(checkpoint: Checkpoint) -> Persona:
    """A checkpoint's own. Raises SourceError for a file that is no JSON."""
    return read_persona(checkpoint.folder, checkpoint.config)


def read_persona(folder: Path, config: Mapping[str, Any]) -> Persona:
    """What lies in a folder. Raises SourceError for a file that is no JSON."""
    files = _of_a_tokenizer(folder, tuple(name for name in TOKENIZER_FILES if (folder / name).is_file()))
    processors = {name: read_json(folder / name) for name in PROCESSOR_FILES if (folder / name).is_file()}
    return Persona(folder, files, read_templates(folder), read_generation(folder, config), config, folder, processors)


def _of_a_tokenizer(folder: Path, files: tuple[str, ...]) -> tuple[str, ...]:
    """Those files, or none where they are only what lies beside a tokenizer's words."""
    if not files or not set(files) <= set(WORDLESS):
        return files
    config = read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in files else {}
    name = config.get("tokenizer_class")
    elsewhere = "auto_map" in config or (name is not None and not _is_known(str(name)))  # its words may have any name
    return files if name in OF_BYTES or elsewhere else ()


def _is_known(tokenizer_class: str) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return tokenizer_class_from_name(tokenizer_class) is not None


def read_templates(folder: Path) -> dict[str, str]:
    """Name -> chat template, by transformers' rule: files go before what tokenizer_config.json holds."""
    files = {DEFAULT: folder / TEMPLATE} if (folder / TEMPLATE).is_file() else {}
    files |= {file.stem: file for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if files:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    for file in (folder / "tokenizer_config.json", folder / OLD_TEMPLATE):
        inside = read_json(file).get("chat_template") if file.is_file() else None
        if inside:
            return _named_templates(inside, file)
    return {}


def _named_templates(inside: Any, file: Path) -> dict[str, str]:
    """The one template of a JSON file, or those of its list, whose names will be files' names."""
    if isinstance(inside, str):
        return {DEFAULT: inside}
    try:
        named = inside if isinstance(inside, dict) else {entry["name"]: entry["template"] for entry in inside}
        fits = all(re.fullmatch(r"\w[\w.-]*", name) and isinstance(text, str) for name, text in named.items())
    except (TypeError, KeyError):
        fits = False
    if not fits:
        raise SourceError(f"{file}: its chat_template is neither a text nor a list of named ones")
    return dict(named)


def read_generation(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Generation settings and end tokens: the file's, or, as transformers has it, what config.json says of them."""
    if (folder / GENERATION).is_file():
        return _meant(read_json(folder / GENERATION))
    from transformers import GenerationConfig

    text = config.get("text_config")
    both = {**(text if isinstance(text, Mapping) else {}), **config}
    known = [key for key in GenerationConfig().to_dict() if key not in OF_THE_RUN]
    return _meant({key: both[key] for key in known if both.get(key) is not None})


def differing(one: Persona, other: Persona) -> tuple[Group, ...]:
    """The groups in which another expert is not the same. One without a tokenizer takes whatever there is, with its
    templates; one without processors takes those."""
    unlike: dict[Group, bool] = {
        "tokenizer": bool(other.files) and not same_tokenizer(one, other),
        "template": bool(other.files or other.templates) and dict(one.templates) != dict(other.templates),
        "generation": spoken_settings(one.generation) != spoken_settings(other.generation),
        "positions": one.positions != other.positions,
        "processor": bool(other.processors) and not same_processors(one, other),
    }
    return tuple(group for group in GROUPS if unlike[group])


def end_tokens(generation: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer, by generation settings alone."""
    ends = generation.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    return sorted(int(token) for token in listed if token is not None)


def same_tokenizer(one: Persona, other: Persona) -> bool:
    """Whether both make the same tokens of every text, and the same text of tokens."""
    if one.folder == other.folder or _tokenizer_files(one) == _tokenizer_files(other):
        return True
    if not one.files:
        return False
    try:
        return tokenizer_meaning(load_tokenizer(one)) == tokenizer_meaning(load_tokenizer(other))
    except ModelError:  # one that this machine cannot open, so that only its files are known
        return False


def same_processors(one: Persona, other: Persona) -> bool:
    """Whether both make the same numbers of images and sound, as far as their files say."""

    def meant(persona: Persona) -> dict[str, dict[str, Any]]:
        return {
            name: {key: value for key, value in data.items() if key not in OF_THE_PROCESSORS_WRITER}
            for name, data in persona.processors.items()
        }

    return meant(one) == meant(other)


def same_words(one: Any, other: Any) -> bool:
    """Whether two loaded tokenizers make the same tokens of every text, whatever they call special."""
    return _inside(one) == _inside(other)


def tokenizer_meaning(tokenizer: Any) -> dict[str, Any]:
    """What a loaded tokenizer does with texts and tokens, as plain data that can be compared."""
    return {
        "inside": _inside(tokenizer),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "added": {place: str(token) for place, token in tokenizer.added_tokens_decoder.items()},
        "cleans": bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)),
        "longest": tokenizer.model_max_length,
    }


def _inside(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inside: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"words": tokenizer.get_vocab()}
    for setting in ("truncation", "padding"):  # every call says its own
        inside.pop(setting, None)
    return inside


def load_tokenizer(persona: Persona, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of transformers, with this persona's chat templates, padding on the left as generation needs it.

    Raises:
        ModelError: there is none, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    if not persona.files:
        raise ModelError(
            f"{persona.folder}: holds no tokenizer, so it takes token ids and no text; copy the files of one into it "
            "(tokenizer.json, tokenizer_config.json)"
        )
    options: dict[str, Any] = {"local_files_only": True, "padding_side": "left"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(persona.folder, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # transformers raises many types for one unusable folder
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{persona.folder}: no usable tokenizer ({reason})") from None
    tokenizer.chat_template = persona.chat_template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_files(persona: Persona) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    for name in persona.files:
        file = persona.folder / name
        if file.suffix != ".json":
            contents[name] = file.read_bytes()
            continue
        contents[name] = {key: value for key, value in _meant(read_json(file)).items() if key != "chat_template"}
        if name == "tokenizer.json":
            contents[name] = {
                key: value for key, value in contents[name].items() if key not in ("truncation", "padding")
            }
    return contents


def _meant(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in OF_THE_WRITER}


def spoken_settings(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are set, with end tokens as a sorted list, and without those that say what holds anyway."""
    settings = {key: value for key, value in _meant(generation).items() if value is not None and key not in OF_THE_RUN}
    settings = {key: value for key, value in settings.items() if UNSAID.get(key) != value}
    return {**settings, "eos_token_id": end_tokens(settings)}


def in_words(groups: Iterable[str]) -> str:
    """Groups as people call them."""
    return ", ".join(_WORDS.get(group, group) for group in groups)
