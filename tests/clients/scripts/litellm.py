"""Answers, streams, tools and a JSON schema by LiteLLM."""

import json
import sys

sys.path.pop(0)

import litellm

ask = {"model": "openai/average", "api_base": sys.argv[1], "api_key": "none", "max_tokens": 1000}
hello = [{"role": "user", "content": "Hello?"}]
properties = {"sum": {"enum": [1, 2]}}
parameters = {"type": "object", "properties": properties, "required": ["sum"], "additionalProperties": False}
tool = {"type": "function", "function": {"name": "pay", "parameters": parameters}}
assert isinstance(litellm.completion(messages=hello, **ask).choices[0].message.content, str)
assert list(litellm.completion(messages=hello, stream=True, **ask))
called = litellm.completion(messages=hello, tools=[tool], tool_choice="required", **ask).choices[0]
assert called.finish_reason == "tool_calls"
assert json.loads(called.message.tool_calls[0].function.arguments)["sum"] in (1, 2)
form = {"type": "json_schema", "json_schema": {"name": "x", "schema": parameters}}
formed = litellm.completion(messages=hello, response_format=form, **ask)
assert json.loads(formed.choices[0].message.content)["sum"] in (1, 2)
at = {"model": "openai/average", "api_base": sys.argv[1], "api_key": "none"}
answered = litellm.responses(input="Hello?", max_output_tokens=8, **at)
assert answered.status == "incomplete", answered
