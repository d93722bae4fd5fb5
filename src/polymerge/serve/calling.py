"""How models write calls of tools: the common formats, told by an expert's chat template.

Hermes (Qwen, Nous and many more), Llama 3's JSON and Mistral's array. A template that knows no tools gets Hermes' words
in a system message. Knows formats, prompts and schemas of calls; reading an answer's calls is `polymerge.serve.calls`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.schema_parts import rebuilt
from ..engine.structure import Structure, calls_structure, json_structure
from .closing import closed
from .tools import Tool

HERMES_PROMPT = """You may call these tools:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments as JSON between tags:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


@dataclass(frozen=True)
class Format:
    """One way to write calls.

    Attributes:
        begin, end: around a call, or around all calls where they are an array.
        key: of the arguments.
        array: whether all calls are one JSON array.
        in_template: whether the chat template writes tools and calls itself.
    """

    begin: str
    end: str
    key: str = "arguments"
    array: bool = False
    in_template: bool = True

    def schema(self, tools: Sequence[Tool], *, several: bool) -> dict[str, Any]:
        """Of one call of any of the tools; of all calls where they are an array."""
        calls: dict[str, Any] = {"anyOf": []}
        before = "#/items/anyOf" if self.array else "#/anyOf"
        for number, tool in enumerate(tools):
            arguments = moved(closed(tool.parameters), f"{before}/{number}/properties/{self.key}")
            properties = {"name": {"const": tool.function.name}, self.key: arguments}
            required = {"required": ["name", self.key], "additionalProperties": False}
            calls["anyOf"].append({"type": "object", "properties": properties, **required})
        if not self.array:
            return calls
        return {"type": "array", "minItems": 1, "items": calls} | ({} if several else {"maxItems": 1})

    def structure(self, tools: Sequence[Tool], *, must: bool, several: bool) -> Structure:
        """The form of an answer that may call tools, or of one that begins inside of a call, which it must make."""
        schema = self.schema(tools, several=several)
        if must:
            return json_structure(schema, "tools")
        return calls_structure(self.begin, schema, self.end, several=several and not self.array)


HERMES = Format("<tool_call>\n", "\n</tool_call>")
LLAMA = Format("", "", key="parameters")
MISTRAL = Format("[TOOL_CALLS] ", "", array=True)
PLAIN = Format(HERMES.begin, HERMES.end, in_template=False)


def format_of(template: str | None) -> Format:
    """The format that a chat template writes."""
    code = " ".join(re.findall(r"\{[{%].*?[%}]\}", template or "", re.DOTALL))
    if not template or not re.search(r"\btools\b", code):
        return PLAIN
    if "[TOOL_CALLS]" in template:
        spaced = "[TOOL_CALLS] [" in template or '[TOOL_CALLS] "' in template
        return MISTRAL if spaced else Format("[TOOL_CALLS]", "", array=True)
    if "<tool_call>" in template:
        return HERMES
    return LLAMA if '"parameters"' in template or "<|python_tag|>" in template else PLAIN


def told_tools(messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """A conversation for a template that knows no tools: they, their calls and results written into its texts."""
    written = [_written(message) for message in messages]
    if not tools:
        return written
    said = HERMES_PROMPT.format(tools="\n".join(json.dumps(tool.for_template) for tool in tools))
    if written and written[0]["role"] == "system":
        return [written[0] | {"content": f"{written[0]['content']}\n\n{said}"}, *written[1:]]
    return [{"role": "system", "content": said}, *written]


def _written(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [f"{HERMES.begin}{json.dumps(call['function'])}{HERMES.end}" for call in message.get("tool_calls", ())]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return rest | {"content": "\n".join(filter(None, [message["content"], *calls]))}


def moved(schema: Any, path: str) -> Any:
    """A schema for its place inside of another: what refers to its own parts refers to them there.

    Args:
        path: of the place, such as "#/items".
    """

    def there(part: dict[str, Any]) -> dict[str, Any]:
        own = part.get("$ref")
        return part | {"$ref": path + own[1:]} if isinstance(own, str) and own.startswith("#") else part

    return rebuilt(schema, there)
