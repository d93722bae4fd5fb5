"""OpenAI's client of Python, whatever version is there: parse, stream, responses."""

import sys
from typing import Literal

sys.path.pop(0)

import openai
from pydantic import BaseModel


class Order(BaseModel):
    item: Literal["stamp", "pen"]


client = openai.OpenAI(base_url=sys.argv[1])
ask = {"model": "average", "messages": [{"role": "user", "content": "An order."}], "max_tokens": 1000}
assert client.chat.completions.parse(response_format=Order, **ask).choices[0].message.parsed
tools = [openai.pydantic_function_tool(Order)]
called = client.chat.completions.parse(tools=tools, tool_choice="required", **ask).choices[0].message
assert called.tool_calls[0].function.parsed_arguments.item in ("stamp", "pen")
assert client.responses.parse(model="average", input="x", text_format=Order, max_output_tokens=1000).output_parsed
with client.responses.stream(model="average", input="x", text_format=Order, max_output_tokens=1000) as stream:
    assert stream.get_final_response().output_parsed
