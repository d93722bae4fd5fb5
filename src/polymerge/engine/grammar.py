"""An answer held to its form, token by token, by llguidance: which tokens may come next.

Knows structures, tokenizers and masks; `polymerge.engine.sampling` chooses among what a mask leaves. A form that cannot
be held exactly is refused when it is compiled. Does not know requests or batches.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ModelError, needs_extra
from .schemas import blamed, inexact
from .structure import Structure

if TYPE_CHECKING:
    import numpy.typing as npt

    from .voices import Voice

# Between two signs of JSON: enough for a deep line's indentation, and an end to a model that writes nothing else.
MOST_SPACE = 24
JSON_OPTIONS = {"whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{1,{MOST_SPACE}}}", "lenient": False}
# Compiled forms that are kept: those of a program that asks for a handful again and again.
REMEMBERED = 256
LONGEST_REASON = 300  # characters
LONGEST_BLAMED = 20_000  # of a schema whose keyword is looked for


class Matcher:
    """What one answer may go on with.

    Args:
        matcher: llguidance's.
        size: tokens that it knows.
    """

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size

    def allowed(self, vocabulary: int) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, of the first so many: [vocabulary]"""
        bits = np.zeros((self._size + 31) // 32, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        return np.unpackbits(bits.view(np.uint8), bitorder="little")[:vocabulary].astype(np.bool_)

    def take(self, token: int) -> bool:
        """One more token. False where the form does not allow it, or has become too large to be held."""
        return bool(self._matcher.consume_token(token))

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


class Grammars:
    """The compiled forms of one model.

    Args:
        vocabulary: how many tokens it has logits for.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._tokenizers: dict[int, tuple[Any, Any]] = {}
        self._compiled: OrderedDict[tuple[int, Structure], Any] = OrderedDict()  # or the refusal, as a text
        self._lock = threading.Lock()

    def matcher(self, structure: Structure | None, voice: Voice) -> Matcher | None:
        """A matcher at its beginning; None where any answer will do.

        Raises:
            ModelError: the form means nothing, holds what cannot be held exactly (named), or the tokenizer is none
                that it could be held with.
            MissingExtraError: the extra `structured` is not installed.
        """
        if structure is None:
            return None
        key = (id(voice.tokenizer), structure)
        try:
            with self._lock:
                tokenizer = self._tokenizer(structure, voice)
                if key not in self._compiled:
                    self._remember(key, _matcher(structure, tokenizer, voice.tokenizer))
                self._compiled.move_to_end(key)
                made = self._compiled[key]
                if not isinstance(made, str):
                    return Matcher(made.deep_copy(), tokenizer.vocab_size)
        except _UnheldError as error:
            made = str(_refused(structure, str(error)))  # takes its time, for which nobody should wait
            with self._lock:
                self._remember(key, made)
        raise ModelError(made)

    def _remember(self, key: tuple[int, Structure], made: Any) -> None:
        self._compiled[key] = made
        while len(self._compiled) > REMEMBERED:
            self._compiled.popitem(last=False)

    def _tokenizer(self, structure: Structure, voice: Voice) -> Any:
        """The tokenizer as llguidance reads it. The voice's own is kept too, so that its id stays its own."""
        key = id(voice.tokenizer)
        if key not in self._tokenizers:
            with needs_extra("structured"):
                from llguidance.hf import from_tokenizer

            ends = sorted(voice.defaults.ends)
            size = max(self._vocabulary, len(voice.tokenizer))
            try:
                with voice.lock:
                    made = from_tokenizer(voice.tokenizer, n_vocab=size, eos_token=ends or None)
            except Exception as error:  # of a tokenizer that has no bytes, or is none of the fast ones
                reason = f"the model's tokenizer spells no bytes ({_short(str(error))})"
                raise ModelError(f"{structure.name}: cannot be used: {reason}") from None
            self._tokenizers[key] = (made, voice.tokenizer)
        return self._tokenizers[key][0]


def in_lark(structure: Structure, tokenizer: Any) -> str | None:
    """JSON, and calls of tools, as a grammar for another server's llguidance: the one that holds them here. None for
    other forms, which say it in their own words.

    Args:
        tokenizer: transformers'.

    Raises:
        ValueError: a schema that cannot be held.
    """
    if structure.kind == "json":
        return "start: %json " + json.dumps({**json.loads(_schema(structure.text)), "x-guidance": JSON_OPTIONS})
    return _calls(json.loads(structure.text), tokenizer) if structure.kind == "calls" else None


def check_held(structure: Structure) -> None:
    """Raises ModelError, as `Grammars.matcher`, for what no answer can be held to, whatever model gives it."""
    _of_bytes(structure)


def has_form(structure: Structure, text: str) -> bool:
    """Whether a text is wholly of a form. Raises as `Grammars.matcher`."""
    matcher, tokenizer = _of_bytes(structure)
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and bool(matcher.is_accepting())


def _of_bytes(structure: Structure) -> tuple[Any, Any]:
    """llguidance's matcher over bytes, and these as its tokens."""
    with needs_extra("structured"):
        from llguidance import LLTokenizer
    tokenizer = LLTokenizer("byte")
    try:
        return _matcher(structure, tokenizer, None), tokenizer
    except _UnheldError as error:
        raise _refused(structure, str(error)) from None


class _UnheldError(Exception):
    """Why llguidance does not hold a form, in its words."""


def _matcher(structure: Structure, tokenizer: Any, spelling: Any) -> Any:
    """llguidance's, at its beginning. Raises _UnheldError.

    Args:
        tokenizer: llguidance's. spelling: the same as transformers has it, for calls of tools.
    """
    from llguidance import LLMatcher

    try:
        matcher = LLMatcher(tokenizer, _grammar(structure, spelling), log_level=0)
    except ValueError as error:
        raise _UnheldError(str(error)) from None
    if matcher.is_error():
        raise _UnheldError(matcher.get_error())
    if _is_endless(structure, matcher):
        raise _UnheldError("no answer has an end")
    return matcher


def _is_endless(structure: Structure, matcher: Any) -> bool:
    """Whether no answer has a beginning, as where a schema is itself and nothing else."""
    if structure.kind != "json":
        return False
    tried = matcher.deep_copy()
    tried.compute_bitmask()
    return bool(tried.is_stopped() or tried.is_error())


def _grammar(structure: Structure, tokenizer: Any) -> str:
    """In llguidance's own form. Raises ValueError."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if structure.kind == "json":
        return LLMatcher.grammar_from_json_schema(_schema(structure.text), overrides=JSON_OPTIONS)  # type: ignore[arg-type]
    if structure.kind == "regex":
        return LLMatcher.grammar_from_regex(structure.text)
    if structure.kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(structure.text))))
    if structure.kind == "calls":
        return LLMatcher.grammar_from_lark(_calls(json.loads(structure.text), tokenizer))
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(structure.text))
    except Exception as error:  # the reader of GBNF raises what it likes
        raise ValueError(f"neither Lark nor GBNF: {error}") from None


def _schema(text: str) -> str:
    """The schema, with what llguidance does not take: true is every value."""
    schema = json.loads(text)
    if schema is True:
        return "{}"
    if schema is False:
        raise ValueError("nothing fits the schema false")
    if not isinstance(schema, dict):
        raise ValueError("a schema is a JSON object, or true")
    _check_exact(schema)
    return text


def _check_exact(schema: dict[str, Any]) -> None:
    if keyword := inexact(schema):
        raise ValueError(f"{keyword} would not be held exactly")


def _calls(said: dict[str, Any], tokenizer: Any) -> str:
    """Free text that may go on with calls, in Lark: the beginning of a call makes the rest of it follow."""
    _check_exact(said["schema"])
    schema = json.dumps({**said["schema"], "x-guidance": JSON_OPTIONS})
    end = json.dumps(said["end"]) if said["end"] else ""
    body = f"call: %json {schema} {end}\n"
    again = "*" if said["several"] else "?"
    if not said["begin"]:
        return f"start: TEXT | call\nTEXT: /([^{{](.|\\n)*)?/\n{body}"
    words = said["begin"].strip()
    space = json.dumps(said["begin"][len(words) :]) if said["begin"][len(words) :] else ""
    ids = tokenizer.encode(words, add_special_tokens=False)
    if len(ids) == 1 and ids[0] in tokenizer.all_special_ids:
        opening = f"begin: TEXT <[{ids[0]}]> {space}\n"
    else:
        opening = f"begin: head {space}\nhead[lazy]: TEXT {json.dumps(words)}\n"
    return f"start: (begin call){again} TEXT\nTEXT: /(.|\\n)*/\n{opening}{body}"


def _refused(structure: Structure, reason: str) -> ModelError:
    unknown = re.search(r"Unimplemented keys: \[(.*)\]", reason)
    if unknown:
        return ModelError(f"{structure.name}: the keyword {unknown[1]} cannot be held exactly; leave it out")
    if "Resource '" in reason:
        return ModelError(f"{structure.name}: the keyword $ref refers to another place: {_short(reason)}")
    to_blame = _blamed(structure) if len(structure.text) < LONGEST_BLAMED else None
    if to_blame:
        keyword, place = to_blame
        return ModelError(f"{structure.name}: the keyword {keyword} ({place}) cannot be held: {_short(reason)}")
    return ModelError(f"{structure.name}: cannot be used: {_short(reason)}")


def _blamed(structure: Structure) -> tuple[str, str] | None:
    """The keyword of its schema, or of its calls', as `blamed` has it; None where the schema is not to blame."""
    from llguidance import LLTokenizer

    if structure.kind not in ("json", "calls"):
        return None
    tokenizer = LLTokenizer("byte")

    def compiles(schema: Any) -> bool:
        try:
            _matcher(Structure("json", json.dumps(schema)), tokenizer, None)
        except _UnheldError:
            return False
        return True

    try:
        said = json.loads(structure.text)
    except ValueError:  # it is no JSON
        return None
    return blamed(said["schema"] if structure.kind == "calls" else said, compiles)


def _short(reason: str) -> str:
    return " ".join(reason.split())[:LONGEST_REASON]
