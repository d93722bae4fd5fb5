"""An expert's Modelfile for Ollama: base, adapter, chat template and settings.

Ollama's templates are Go's, a bundle's are Jinja's. One is given only where both write the same text: the expert's own
template is rendered for some conversations and compared with forms whose Go template is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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


def _turns(begin: str, end: str, last: str) -> tuple[Callable[[Turns], str], str]:
    """What a form writes, and its Go template; {} in `begin` is the role."""

    def write(turns: Turns) -> str:
        return "".join(begin.format(turn["role"]) + turn["content"] + end for turn in turns) + last

    go = "{{ range .Messages }}" + begin.replace("{}", "{{ .Role }}") + "{{ .Content }}" + end + "{{ end }}" + last
    return write, go


_LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
FORMS = (
    _turns("", "\n", ""),
    _turns("<|im_start|>{}\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
    _turns(_LLAMA3, "<|eot_id|>", _LLAMA3.format("assistant")),
)


def go_template(tokenizer: Any) -> str | None:
    """The Go template that writes what the tokenizer's template writes; None where it is not known."""
    if not isinstance(tokenizer.chat_template, str):
        return FORMS[0][1] if tokenizer.chat_template is None else None
    first = tokenizer.bos_token or ""
    texts = [_rendered(tokenizer, probe) for probe in PROBES]
    for write, go in FORMS:
        # llama.cpp begins with the first special token itself where the tokenizer does
        if all(text is not None and text.removeprefix(first) == write(p).removeprefix(first)
               for text, p in zip(texts, PROBES, strict=True)):  # fmt: skip
            return go
    return None


def _rendered(tokenizer: Any, turns: Turns) -> str | None:
    try:
        text: str = tokenizer.apply_chat_template([dict(t) for t in turns], tokenize=False, add_generation_prompt=True)
        return text
    except Exception:  # a template may refuse a conversation, by raising what it likes
        return None


def modelfile(expert: str, base: str, adapter: str, tokenizer: Any, defaults: GenerationDefaults) -> str:
    """The file's text; paths are relative to its folder."""
    template = go_template(tokenizer)
    lines = [f"# expert {expert}: ollama create {expert} -f Modelfile", f"FROM {base}", f"ADAPTER {adapter}"]
    if template is None:
        lines.append("# its chat template has no known form in Ollama's language; write TEMPLATE yourself")
    else:
        lines.append(f'TEMPLATE """{template}"""')
    for token in sorted(defaults.ends):
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.decode([token]), ensure_ascii=False)}")
    settings = {"temperature": defaults.temperature, "top_p": defaults.top_p, "top_k": defaults.top_k}
    settings |= {"min_p": defaults.min_p, "repeat_penalty": defaults.repetition_penalty}
    lines += [f"PARAMETER {name} {value:g}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"
