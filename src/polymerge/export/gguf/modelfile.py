"""An expert's Modelfile for Ollama: base, adapter, chat template and settings.

Ollama's templates are Go's, a bundle's are Jinja's. One is given only where both write the same text: the expert's own
template is rendered for some conversations and compared with forms whose Go template is known. A system text that it
puts before conversations without one becomes SYSTEM, which Ollama takes for these alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...engine.defaults import GenerationDefaults

Turns = Sequence[Mapping[str, str]]
PROBES: tuple[Turns, ...] = (
    ({"role": "user", "content": "Who?"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}),
    (
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "You."},
        {"role": "user", "content": "Why?"},
    ),
)


@dataclass(frozen=True)
class Form:
    """How a conversation is written: what stands before and after every turn, {} for its role, and at the end."""

    begin: str
    end: str
    last: str

    def write(self, turns: Turns) -> str:
        return "".join(self.begin.format(turn["role"]) + turn["content"] + self.end for turn in turns) + self.last

    @property
    def go(self) -> str:
        begin = self.begin.replace("{}", "{{ .Role }}")
        return "{{ range .Messages }}" + begin + "{{ .Content }}" + self.end + "{{ end }}" + self.last

    def own_system(self, text: str, turns: Turns) -> str | None:
        """The system text that stands before the turns in a text of this form; None where nothing does."""
        before, after = self.begin.format("system"), self.end + self.write(turns)
        found = text[len(before) : -len(after)]
        return found if found and text == before + found + after else None


_LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
FORMS = (
    Form("", "\n", ""),
    Form("<|im_start|>{}\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
    Form(_LLAMA3, "<|eot_id|>", _LLAMA3.format("assistant")),
)


def chat_lines(tokenizer: Any) -> list[str]:
    """TEMPLATE, and SYSTEM where there is one, that write what the tokenizer's template writes; none: not known."""
    if not isinstance(tokenizer.chat_template, str):
        return [_quoted("TEMPLATE", FORMS[0].go)] if tokenizer.chat_template is None else []
    texts = [_rendered(tokenizer, probe) for probe in PROBES]

    def bare(text: str) -> str:  # llama.cpp begins with the first special token itself where the tokenizer does
        return text.removeprefix(tokenizer.bos_token or "")

    for form in FORMS:
        system = form.own_system(texts[0], PROBES[0]) or form.own_system(bare(texts[0]), PROBES[0])
        if system and '"""' in system:
            continue
        own = ({"role": "system", "content": system},) if system else ()
        turns = [probe if probe[0]["role"] == "system" else (*own, *probe) for probe in PROBES]
        if [bare(text) for text in texts] == [bare(form.write(each)) for each in turns]:
            return [_quoted("TEMPLATE", form.go), *([_quoted("SYSTEM", system)] if system else [])]
    return []


def _quoted(word: str, text: str) -> str:
    return f'{word} """{text}"""'


def _rendered(tokenizer: Any, turns: Turns) -> str:
    try:
        text: str = tokenizer.apply_chat_template([dict(t) for t in turns], tokenize=False, add_generation_prompt=True)
        return text
    except Exception:  # a template may refuse a conversation, by raising what it likes
        return "\0"  # no form's


def modelfile(expert: str, base: str, adapter: str, tokenizer: Any, defaults: GenerationDefaults) -> str:
    """The file's text; paths are relative to its folder."""
    lines = [f"# expert {expert}: ollama create {expert} -f Modelfile", f"FROM {base}", f"ADAPTER {adapter}"]
    unknown = "# its chat template has no known form in Ollama's language; write TEMPLATE yourself"
    lines += chat_lines(tokenizer) or [unknown]
    for token in sorted(defaults.ends):
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.decode([token]), ensure_ascii=False)}")
    settings = {"temperature": defaults.temperature, "top_p": defaults.top_p, "top_k": defaults.top_k}
    settings |= {"min_p": defaults.min_p, "repeat_penalty": defaults.repetition_penalty}
    lines += [f"PARAMETER {name} {value:g}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"
